"""Every response with its tilted weight, for trainers that weight examples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.formats.export_format import MESSAGES, ExportFormat, ExportSettings, Part, Row
from pipeline.formats.prompt_rows import PromptRows
from pipeline.formats.row_checks import (
    TOLERANCE,
    check_answer,
    check_probability,
    check_prompt,
    each_prompt,
    log_mean_exp,
)

SCHEMA = pa.schema(
    [
        pa.field("messages", MESSAGES, nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
    ]
)


def build_weighted(
    rows: PromptRows,
    settings: ExportSettings,  # noqa: ARG001  # the signature of a format
    rng: np.random.Generator,  # noqa: ARG001  # the signature of a format
) -> Iterator[Row]:
    """Every response with its tilted weight and its score in nats; nothing is drawn."""
    for place in range(len(rows.completion)):
        yield {
            "messages": [*rows.prompt, rows.answer(place)],
            "weight": float(rows.weight[place]),
            "score": float(rows.score[place]),
            "prompt_id": rows.prompt_id,
            "sample_index": int(rows.sample_index[place]),
        }


def _check(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["messages"][:-1])
    yield from check_answer(row["messages"][-1])
    yield from check_probability(row, "weight")


def _check_prompt(rows: list[Row]) -> Iterator[str]:
    total = sum(row["weight"] for row in rows)
    if not abs(total - 1.0) <= TOLERANCE:
        yield f"has weights that do not sum to 1: {total:.12g}"
    norm = log_mean_exp([row["score"] for row in rows]) + np.log(len(rows))
    if not all(abs(row["weight"] - np.exp(row["score"] - norm)) <= TOLERANCE for row in rows):
        yield "has weights that are not those of its scores"


FORMAT = ExportFormat(
    name="weighted-sft",
    parts=(Part(build_weighted, SCHEMA, each_prompt(_check, _check_prompt)),),
    drawn_by=(),
    optimum="`weight` sums to 1 over the responses to a prompt, and is proportional to exp(`score`). Likelihood of "
    "the last message times `weight` has the reweighted responses as its optimum, which estimate the tilted policy "
    "with an error of one over the root of their number. A trainer that does not read `weight` learns the reference: "
    "use `openai-jsonl` there.",
)
