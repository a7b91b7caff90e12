"""Preference pairs for TRL's DPOTrainer, and for what reads its conversational format."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.formats.export_format import MESSAGES, ExportFormat, ExportSettings, Part, Row
from pipeline.formats.labelled_pairs import DPO_OPTIMUM, LABEL_FIELDS, check_label, label_pairs
from pipeline.formats.prompt_rows import PromptRows
from pipeline.formats.row_checks import check_answer, check_prompt, each_row

SCHEMA = pa.schema(
    [*(pa.field(name, MESSAGES, nullable=False) for name in ("prompt", "chosen", "rejected")), *LABEL_FIELDS]
)


def build_preferences(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """Pairs of :func:`~pipeline.formats.labelled_pairs.label_pairs`, prompt and answers as messages."""
    for pair in label_pairs(rows, settings, rng):
        yield {
            "prompt": rows.prompt,
            "chosen": [rows.answer(pair.chosen)],
            "rejected": [rows.answer(pair.rejected)],
            **pair.label,
        }


def _check(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["prompt"])
    yield from check_answer(row["chosen"][-1], row["rejected"][-1])
    yield from check_label(row)


FORMAT = ExportFormat(
    name="trl-preference",
    parts=(Part(build_preferences, SCHEMA, each_row(_check)),),
    drawn_by=("seed", "pairs_per_prompt"),
    optimum=DPO_OPTIMUM,
)
