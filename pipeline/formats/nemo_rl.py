"""Preference pairs and resampled chat lines as NeMo RL reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.formats.export_format import MESSAGES, ExportFormat, ExportSettings, Part, Row
from pipeline.formats.labelled_pairs import DPO_OPTIMUM, LABEL_FIELDS, check_label, label_pairs
from pipeline.formats.prompt_rows import PromptRows
from pipeline.formats.resampling import RESAMPLED_OPTIMUM, resample
from pipeline.formats.row_checks import check_answer, check_prompt, each_row

PREFERENCE_SCHEMA = pa.schema(
    [
        pa.field("context", MESSAGES, nullable=False),
        pa.field(
            "completions",
            pa.list_(pa.struct([pa.field("rank", pa.int64()), pa.field("completion", MESSAGES)])),
            nullable=False,
        ),
        *LABEL_FIELDS,
    ]
)
SFT_SCHEMA = pa.schema(
    [
        pa.field("messages", MESSAGES, nullable=False),
        pa.field("message_loss_mask", pa.list_(pa.int64()), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
    ]
)


def build_ranked(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """The pairs of ``trl-preference`` in NeMo RL's rank format; the lower rank is preferred."""
    for pair in label_pairs(rows, settings, rng):
        answers = (rows.answer(pair.chosen), rows.answer(pair.rejected))
        yield {
            "context": rows.prompt,
            "completions": [{"rank": rank, "completion": [answer]} for rank, answer in enumerate(answers)],
            **pair.label,
        }


def build_masked_lines(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """The lines of ``openai-jsonl``, with a mask by which only the last message is learnt."""
    for place in resample(rows, settings, rng):
        messages = [*rows.prompt, rows.answer(place)]
        mask = [0] * len(rows.prompt) + [1]
        yield {"messages": messages, "message_loss_mask": mask, "prompt_id": rows.prompt_id}


def _check_ranked(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["context"])
    if [one["rank"] for one in row["completions"]] != [0, 1]:
        yield "has not exactly a completion of rank 0 and one of rank 1"
    yield from check_answer(*(one["completion"][-1] for one in row["completions"]))
    yield from check_label(row)


def _check_line(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["messages"][:-1])
    yield from check_answer(row["messages"][-1])
    if row["message_loss_mask"] != [0] * (len(row["messages"]) - 1) + [1]:
        yield "has a mask by which other messages than the last are learnt"


FORMAT = ExportFormat(
    name="nemo-rl",
    parts=(
        Part(build_ranked, PREFERENCE_SCHEMA, each_row(_check_ranked), name="preference", lines=True),
        Part(build_masked_lines, SFT_SCHEMA, each_row(_check_line), name="sft", lines=True),
    ),
    drawn_by=("seed", "pairs_per_prompt", "lines_per_prompt"),
    optimum=f"`preference/`: {DPO_OPTIMUM}\n\n`sft/`: {RESAMPLED_OPTIMUM}",
    takes_template="the text of `chat_template.jinja` as `policy.tokenizer.chat_template`",
)
