"""Single responses with a drawn label, in the format of TRL's BCO and KTO."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.formats.export_format import MESSAGES, ExportFormat, ExportSettings, Part, Row, sigmoid
from pipeline.formats.prompt_rows import PromptRows
from pipeline.formats.row_checks import (
    TOLERANCE,
    check_answer,
    check_close,
    check_probability,
    check_prompt,
    each_prompt,
    log_mean_exp,
)

SCHEMA = pa.schema(
    [
        *(pa.field(name, MESSAGES, nullable=False) for name in ("prompt", "completion")),
        pa.field("label", pa.bool_(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("label_probability", "log_ratio")),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
    ]
)


def build_unpaired(
    rows: PromptRows,
    settings: ExportSettings,  # noqa: ARG001  # the signature of a format
    rng: np.random.Generator,
) -> Iterator[Row]:
    """Every response with a drawn label: true with probability K w / (1 + K w).

    That is the posterior probability that a response comes from the tilted policy and not from the reference, before
    which both are equally likely: K w estimates pi_lambda / pi_ref. The minimiser of the logistic loss of
    log rho = log pi_theta - log pi_ref to labels of that probability is log rho = log K w, the tilted policy.
    """
    log_ratio = rows.score - log_mean_exp(rows.score)  # from the scores: weights may be too small for a float
    probability = sigmoid(log_ratio)
    labels = rng.random(len(probability)) < probability
    for place in range(len(rows.completion)):
        yield {
            "prompt": rows.prompt,
            "completion": [rows.answer(place)],
            "label": bool(labels[place]),
            "label_probability": float(probability[place] if labels[place] else 1.0 - probability[place]),
            "log_ratio": float(log_ratio[place]),
            "prompt_id": rows.prompt_id,
            "sample_index": int(rows.sample_index[place]),
        }


def _check(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["prompt"])
    yield from check_answer(row["completion"][-1])
    yield from check_probability(row, "label_probability")
    expected = float(sigmoid(row["log_ratio"] if row["label"] else -row["log_ratio"]))
    yield from check_close(row, "label_probability", expected, of="log_ratio")


def _check_prompt(rows: list[Row]) -> Iterator[str]:
    off = log_mean_exp([row["log_ratio"] for row in rows])
    if not abs(off) <= TOLERANCE * max(1.0, *(abs(row["log_ratio"]) for row in rows)):
        yield f"has ratios to the reference that do not average to 1: log of their mean {off:.3g}"


FORMAT = ExportFormat(
    name="trl-unpaired",
    parts=(Part(build_unpaired, SCHEMA, each_prompt(_check, _check_prompt)),),
    drawn_by=("seed",),
    optimum="`label` is true with probability K w / (1 + K w), the posterior probability that the response comes from "
    "the tilted policy and not from the reference. The logistic loss of log(pi/pi_ref) to these labels, beta 1 and no "
    "shift, has the tilted policy as its optimum. BCO is this loss with a running shift; KTO's loss is no proper "
    "scoring rule, and its optimum is not the tilted policy whatever the labels.",
)
