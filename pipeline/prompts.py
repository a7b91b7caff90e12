"""Prompts into their table: read from a file or given, split by prompt, checked before anything expensive runs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.config import PromptSettings
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import PROMPTS, SPLITS, prompt_id

Messages = Sequence[Mapping[str, str]]


def build_prompt_table(prompts: Iterable[tuple[Messages, str, str]], *, source: str) -> pa.Table:
    """The prompts table from (messages, split, category) triples.

    Raises:
        InputError: a malformed prompt, an unknown split, duplicate prompts, or a split without prompts.
    """
    rows = [
        {
            "prompt_id": prompt_id(messages),
            "prompt": [{"role": message["role"], "content": message["content"]} for message in messages],
            "split": split,
            "source": source,
            "category": category,
        }
        for messages, split, category in prompts
    ]
    for row in rows:
        if row["split"] not in SPLITS:
            raise InputError(
                f"{source}: a prompt has the split {row['split']!r}; it must be one of {', '.join(SPLITS)}"
            )
    _require_distinct(rows, source)
    for split in SPLITS:
        if not any(row["split"] == split for row in rows):
            raise InputError(
                f"{source} has no {split} prompts ({len(rows)} in all); each of {', '.join(SPLITS)} needs some"
            )
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def read_prompts(settings: PromptSettings) -> pa.Table:
    """Read a Parquet or JSON Lines file of prompts.

    Raises:
        InputError: the file or a column is not there, the suffix is unknown, or a row is malformed.
    """
    path = Path(settings.source)
    rows = _read_rows(path)
    for setting, column in (
        ("prompt_column", settings.prompt_column),
        ("split_column", settings.split_column),
        ("category_column", settings.category_column),
    ):
        if column is not None and column not in rows.column_names:
            raise InputError(f"`prompts.{setting}` is {column!r}, but {path} has the columns {rows.column_names}")
    prompts = []
    for number, row in enumerate(rows.to_pylist()):
        messages = _messages(row[settings.prompt_column], place=f"{path}, row {number}")
        split = row[settings.split_column] if settings.split_column else hash_split(messages, settings.test_fraction)
        category = row[settings.category_column] if settings.category_column else ""
        prompts.append((messages, split, category or ""))
    return build_prompt_table(prompts, source=str(path))


def hash_split(messages: Messages, test_fraction: float) -> str:
    """The split of a prompt by its own hash: it never moves when prompts are added, removed or reordered."""
    digest = hashlib.sha256(f"split:{prompt_id(messages)}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else "train"


def _read_rows(path: Path) -> pa.Table:
    if not path.is_file():
        raise InputError(f"`prompts.source` is {str(path)!r}; there is no such file")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        if path.suffix in {".jsonl", ".json"}:
            return pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"`prompts.source` {path} cannot be read: {error}") from error
    raise InputError(f"`prompts.source` is {str(path)!r}; its name must end in .parquet, .jsonl or .json")


def _messages(value: Any, *, place: str) -> Messages:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return value
    raise InputError(f"{place}: the prompt is {value!r}; it must be a non-empty text or a list of messages")


def _require_distinct(rows: Sequence[Mapping[str, Any]], source: str) -> None:
    counts = Counter(row["prompt_id"] for row in rows)
    repeated = [row["prompt"][-1]["content"] for row in rows if counts[row["prompt_id"]] > 1]
    if repeated:
        examples = "; ".join(repr(text[:60]) for text in dict.fromkeys(repeated[:4]))
        raise InputError(f"{source}: {len(rows) - len(counts)} duplicate prompts ({examples}); each may occur once")
