"""Preference pairs and resampled chat lines as LLaMA-Factory reads them, with its `dataset_info.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.artifacts import read_json_object
from pipeline.contracts.solution import Solution
from pipeline.formats.export_format import MESSAGE, MESSAGES, ExportFormat, ExportSettings, HandOff, Part, Row
from pipeline.formats.labelled_pairs import DPO_OPTIMUM, LABEL_FIELDS, check_label, label_pairs
from pipeline.formats.prompt_rows import Message, PromptRows
from pipeline.formats.resampling import RESAMPLED_OPTIMUM, resample
from pipeline.formats.row_checks import check_answer, check_prompt, each_row

INFO = "dataset_info.json"

# Not its `openai` formatting, which puts the system prompt "detailed thinking off" before every conversation that has
# none (OpenAIDatasetConverter of 0.9.5).
_FORMATTING: dict[str, Any] = {
    "formatting": "sharegpt",
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
_COLUMNS: dict[str, dict[str, Any]] = {
    "preference": {
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "sft": {"columns": {"messages": "conversations"}},
}

PREFERENCE_SCHEMA = pa.schema(
    [
        pa.field("conversations", MESSAGES, nullable=False),
        *(pa.field(name, MESSAGE, nullable=False) for name in ("chosen", "rejected")),
        *LABEL_FIELDS,
    ]
)
SFT_SCHEMA = pa.schema(
    [pa.field("conversations", MESSAGES, nullable=False), pa.field("prompt_id", pa.string(), nullable=False)]
)


def build_ranking(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """The pairs of ``trl-preference``."""
    for pair in label_pairs(rows, settings, rng):
        yield {
            "conversations": rows.prompt,
            "chosen": rows.answer(pair.chosen),
            "rejected": rows.answer(pair.rejected),
            **pair.label,
        }


def build_conversations(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """The lines of ``openai-jsonl``."""
    for place in resample(rows, settings, rng):
        yield {"conversations": [*rows.prompt, rows.answer(place)], "prompt_id": rows.prompt_id}


def refuse_prompt(prompt: Sequence[Message]) -> str | None:
    """Why LLaMA-Factory would pass a prompt over: it takes turns of user and assistant alone, user first and last."""
    roles = [turn["role"] for turn in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if turns == expected and len(turns) % 2 == 1:
        return None
    return (
        f"its messages are of {', '.join(roles)}; LLaMA-Factory passes over all but an optional system message and "
        "turns of user and assistant that begin and end with the user"
    )


def dataset_info(source: HandOff) -> Mapping[str, bytes]:
    """The `dataset_info.json` that names the files of the hand-off and how they are read."""
    info = {
        _name(part, split): {"file_name": f"{part}/{split}.jsonl", **_COLUMNS[part], **_FORMATTING}
        for part, splits in source.splits.items()
        for split in splits
    }
    return {INFO: (json.dumps(info, indent=2) + "\n").encode()}


def check_info(folder: Path, solution: Solution) -> Iterator[str]:
    """That every data set that `dataset_info.json` names is there, and every table of the folder is named."""
    del solution
    info = read_json_object(folder / INFO)
    named = {entry.get("file_name") if isinstance(entry, dict) else None for entry in info.values()}
    there = {f"{path.parent.name}/{path.name}" for part in _COLUMNS for path in (folder / part).glob("*.jsonl")}
    for name in sorted(map(str, named - there)):
        yield f"{folder / INFO} names the file {name}, which is not there"
    for name in sorted(there - named):
        yield f"{folder / INFO} does not name {name}"


def _name(part: str, split: str) -> str:
    return f"dualign_{part}" + ("" if split == "train" else f"_{split}")


def _check_ranking(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["conversations"])
    yield from check_answer(row["chosen"], row["rejected"])
    yield from check_label(row)


def _check_conversation(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["conversations"][:-1])
    yield from check_answer(row["conversations"][-1])


FORMAT = ExportFormat(
    name="llama-factory",
    parts=(
        Part(build_ranking, PREFERENCE_SCHEMA, each_row(_check_ranking), name="preference", lines=True),
        Part(build_conversations, SFT_SCHEMA, each_row(_check_conversation), name="sft", lines=True),
    ),
    drawn_by=("seed", "pairs_per_prompt", "lines_per_prompt"),
    optimum=f"`preference/`: {DPO_OPTIMUM}\n\n`sft/`: {RESAMPLED_OPTIMUM}",
    beside=dataset_info,
    refuses=refuse_prompt,
    check=check_info,
    prefilled="The answers of the rows begin with it. LLaMA-Factory cannot be told so: name a template of its own "
    "that does not write it (those of reasoning models do not), and compare its first example with the one below.",
    takes_template=None,
)
