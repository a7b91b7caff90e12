"""Preference pairs and resampled chat lines as Axolotl reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.formats.export_format import MESSAGE, MESSAGES, ExportFormat, ExportSettings, Part, Row
from pipeline.formats.labelled_pairs import DPO_OPTIMUM, LABEL_FIELDS, check_label, label_pairs
from pipeline.formats.prompt_rows import PromptRows
from pipeline.formats.resampling import RESAMPLED_OPTIMUM, resample
from pipeline.formats.row_checks import check_answer, check_prompt, each_row

PREFERENCE_SCHEMA = pa.schema(
    [
        pa.field("messages", MESSAGES, nullable=False),
        *(pa.field(name, MESSAGE, nullable=False) for name in ("chosen", "rejected")),
        *LABEL_FIELDS,
    ]
)
SFT_SCHEMA = pa.schema(
    [
        pa.field(
            "messages",
            pa.list_(pa.struct([*MESSAGE, pa.field("training", pa.bool_())])),
            nullable=False,
        ),
        pa.field("prompt_id", pa.string(), nullable=False),
    ]
)


def build_chosen(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """The pairs of ``trl-preference`` but those with an empty response.

    Axolotl renders the prompt apart, generation prompt and all, so no answer begins with a prefill. It finds where an
    answer begins by its text, and would take the whole conversation for an empty one.
    """
    for pair in label_pairs(rows, settings, rng):
        if rows.completion[pair.chosen] and rows.completion[pair.rejected]:
            yield {
                "messages": rows.prompt,
                "chosen": rows.bare_answer(pair.chosen),
                "rejected": rows.bare_answer(pair.rejected),
                **pair.label,
            }


def build_trained_turns(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """The lines of ``openai-jsonl``; each message says whether it is learnt, and only the last one is."""
    prompt = [{**turn, "training": False} for turn in rows.prompt]
    for place in resample(rows, settings, rng):
        yield {"messages": [*prompt, {**rows.answer(place), "training": True}], "prompt_id": rows.prompt_id}


def _check_chosen(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["messages"])
    yield from check_answer(row["chosen"], row["rejected"])
    if not (row["chosen"]["content"] and row["rejected"]["content"]):
        yield "has an empty answer, for which Axolotl would take the whole conversation"
    yield from check_label(row)


def _check_turns(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["messages"][:-1])
    yield from check_answer(row["messages"][-1])
    if [turn["training"] for turn in row["messages"]] != [False] * (len(row["messages"]) - 1) + [True]:
        yield "does not say that the last message alone is learnt"


FORMAT = ExportFormat(
    name="axolotl",
    parts=(
        Part(build_chosen, PREFERENCE_SCHEMA, each_row(_check_chosen), name="preference", lines=True),
        Part(build_trained_turns, SFT_SCHEMA, each_row(_check_turns), name="sft", lines=True),
    ),
    drawn_by=("seed", "pairs_per_prompt", "lines_per_prompt"),
    optimum=f"`preference/`: {DPO_OPTIMUM} Pairs with an empty response are left out.\n\n`sft/`: {RESAMPLED_OPTIMUM}",
    prefilled="The answers in `sft/` begin with it, where Axolotl renders whole conversations. Those in `preference/` "
    "do not: there it renders the prompt apart, and that text with it.",
    takes_template="`chat_template: jinja` and the text of `chat_template.jinja` as `chat_template_jinja`",
)
