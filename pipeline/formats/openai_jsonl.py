"""Resampled chat lines in OpenAI's format, which most services and trainers read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.formats.export_format import ExportFormat, ExportSettings, Part, Row
from pipeline.formats.prompt_rows import PromptRows
from pipeline.formats.resampling import RESAMPLED_OPTIMUM, resample
from pipeline.formats.row_checks import check_answer, each_row

SCHEMA = pa.schema(
    [
        pa.field(
            "messages",
            pa.list_(
                pa.struct(
                    [
                        pa.field("role", pa.string()),
                        pa.field("content", pa.string()),
                        pa.field("weight", pa.int64()),
                    ]
                )
            ),
            nullable=False,
        )
    ]
)


def build_chat_lines(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """Responses of :func:`~pipeline.formats.resampling.resample`.

    Assistant turns of the prompt get the weight 0, so that only the response is learnt.
    """
    prompt = [{**turn, "weight": 0} if turn["role"] == "assistant" else dict(turn) for turn in rows.prompt]
    for place in resample(rows, settings, rng):
        yield {"messages": [*prompt, rows.answer(place)]}


def _check(row: Row) -> Iterator[str]:
    *prompt, answer = row["messages"]
    yield from check_answer(answer)
    if answer.get("weight", 1) != 1:
        yield "has an answer that is not learnt: its `weight` is not 1"
    if any(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in prompt):
        yield "has a turn of the prompt that is learnt: its `weight` is not 0"


FORMAT = ExportFormat(
    name="openai-jsonl",
    parts=(Part(build_chat_lines, SCHEMA, each_row(_check), lines=True),),
    drawn_by=("seed", "lines_per_prompt"),
    optimum=RESAMPLED_OPTIMUM,
)
