"""Prompts into their table: read from a file or a data set, split by prompt, checked before anything runs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.config.sections import PromptSettings
from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.tables import PROMPTS, SPLITS, prompt_id
from pipeline.scorers.models import is_hub_id

Messages = Sequence[Mapping[str, str]]

_READERS = {
    ".parquet": pq.read_table,
    ".jsonl": pyarrow.json.read_json,
    ".json": pyarrow.json.read_json,
    ".csv": pyarrow.csv.read_csv,
}


@dataclass(frozen=True)
class SourceRow:
    """One row of a source.

    Attributes:
        place: of the row, for messages.
        split: of the data set's own that it is of, as the run calls it; None where the source has none.
        values: by column.
    """

    place: str
    split: str | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """One prompt as it is read."""

    messages: Messages
    split: str
    category: str


def build_prompt_table(
    prompts: Iterable[PromptRow], *, source: str, drop_repeated: bool = False
) -> tuple[pa.Table, int]:
    """The prompts table, and the number of prompts dropped because they occur earlier.

    Raises:
        InputError: a malformed prompt, an unknown split, a split without prompts, or a repeated prompt that is not to
            be dropped.
    """
    rows = [
        {
            "prompt_id": prompt_id(prompt.messages),
            "prompt": [{"role": message["role"], "content": message["content"]} for message in prompt.messages],
            "split": prompt.split,
            "source": source,
            "category": prompt.category,
        }
        for prompt in prompts
    ]
    for row in rows:
        if row["split"] not in SPLITS:
            raise InputError(
                f"{source}: a prompt has the split {row['split']!r}; it must be one of {', '.join(SPLITS)}"
            )
    distinct = _drop_repeated(rows, source) if drop_repeated else _require_distinct(rows, source)
    for split in SPLITS:
        if not any(row["split"] == split for row in distinct):
            raise InputError(
                f"{source} has no {split} prompts ({len(distinct)} in all); each of {', '.join(SPLITS)} needs some"
            )
    return pa.Table.from_pylist(distinct, schema=PROMPTS), len(rows) - len(distinct)


def read_prompts(settings: PromptSettings) -> tuple[pa.Table, int]:
    """Read the prompts of a recipe.

    Returns:
        The prompts table, and the number of repeated prompts that were dropped.

    Raises:
        InputError: the source or a column is not there, cannot be read, or a row is malformed.
        MissingExtraError: the source is a data set, and `datasets` is not installed.
    """
    prompts = [read_prompt_row(settings, row) for row in read_source(settings, section="prompts")]
    return build_prompt_table(prompts, source=settings.source, drop_repeated=settings.repeated == "drop")


def read_source(
    settings: PromptSettings, *, section: str, response_columns: Sequence[str] = ()
) -> Iterator[SourceRow]:
    """The rows of a source, in its order.

    Args:
        settings: of the source.
        section: of the recipe that names it, for messages.
        response_columns: columns to read besides those of the settings.

    Raises:
        InputError: the source or a column is not there, or cannot be read.
        MissingExtraError: the source is a data set, and `datasets` is not installed.
    """
    named = [(setting, getattr(settings, setting)) for setting in ("prompt_column", "split_column", "category_column")]
    named += [("response_columns", column) for column in response_columns]
    for place, split, rows in _read_tables(settings, section):
        for setting, column in named:
            if column is not None and column not in rows.column_names:
                raise InputError(
                    f"`{section}.{setting}` is {column!r}, but {place} has the columns {rows.column_names}"
                )
        columns = [column for _, column in named if column is not None]
        for number, row in enumerate(rows.select(list(dict.fromkeys(columns))).to_pylist()):
            yield SourceRow(f"{place}, row {number}", split, row)


def read_prompt_row(settings: PromptSettings, row: SourceRow) -> PromptRow:
    """The prompt of a row of a source, and its split.

    Raises:
        InputError: it is neither a non-empty text nor a list of messages.
    """
    messages = _messages(row.values[settings.prompt_column], settings.system, place=row.place)
    if settings.split_column:
        split = row.values[settings.split_column]
    else:
        split = row.split or hash_split(messages, settings.test_fraction)
    category = row.values[settings.category_column] if settings.category_column else None
    return PromptRow(messages, split, "" if category is None else str(category))


def limit_prompts(prompts: pa.Table, limit: int | None) -> pa.Table:
    """At most ``limit`` prompts of each split: those whose ``prompt_id``, a hash, comes first; the order stays.

    The choice depends on nothing but the prompts themselves, and a larger limit adds to a smaller one. A prompt that
    is added to the source may displace another.
    """
    if limit is None:
        return prompts
    ids, splits = (np.array(prompts[name].to_pylist(), dtype=object) for name in ("prompt_id", "split"))
    chosen = np.zeros(prompts.num_rows, dtype=bool)
    for split in SPLITS:
        rows = np.flatnonzero(splits == split)
        chosen[rows[np.argsort(ids[rows], kind="stable")[:limit]]] = True
    return prompts.filter(pa.array(chosen))


def hash_split(messages: Messages, test_fraction: float) -> str:
    """The split of a prompt by its own hash: it never moves when prompts are added, removed or reordered."""
    digest = hashlib.sha256(f"split:{prompt_id(messages)}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else "train"


def _read_tables(settings: PromptSettings, section: str) -> Iterator[tuple[str, str | None, pa.Table]]:
    """Tables of rows, each with its name for messages and the split it says it is."""
    path = Path(settings.source)
    if path.is_file():
        yield settings.source, None, _read_file(path, section)
    elif path.is_dir() or is_hub_id(settings.source):
        yield from _read_dataset(settings, section)
    else:
        raise InputError(
            f"`{section}.source` is {settings.source!r}; there is no such file or folder, and it is not a Hub id "
            "(owner/name)"
        )


def _read_file(path: Path, section: str) -> pa.Table:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"`{section}.source` is {str(path)!r}; its name must end in one of {', '.join(_READERS)}")
    try:
        return reader(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"`{section}.source` {path} cannot be read: {error}") from error


def _read_dataset(settings: PromptSettings, section: str) -> Iterator[tuple[str, str | None, pa.Table]]:
    try:
        import datasets
    except ImportError as error:
        raise import_failure(error, package="datasets", extra="train", purpose="reading a data set") from error
    if is_hub_id(settings.source) and settings.revision is None:
        raise InputError(f"`{section}.source` is {settings.source!r}, on the Hub; give its `{section}.revision` too")
    try:
        found = datasets.load_dataset(settings.source, settings.dataset_config, revision=settings.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"`{section}.source` {settings.source} cannot be read as a data set: {error}") from error
    splits: Mapping[str, str | None]
    if settings.dataset_splits is not None:
        splits = settings.dataset_splits
    elif set(SPLITS) <= set(found):
        splits = {name: name for name in SPLITS}
    else:
        splits = dict.fromkeys(found)
    for name, split in splits.items():
        if name not in found:
            raise InputError(
                f"`{section}.dataset_splits` names {name!r}, but {settings.source} has the splits {sorted(found)}"
            )
        yield f"{settings.source}, split {name}", split, found[name].with_format("arrow")[:]


def _messages(value: Any, system: str | None, *, place: str) -> Messages:
    if isinstance(value, str) and value.strip():
        messages: list[Mapping[str, str]] = [{"role": "user", "content": value}]
    elif isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        messages = list(value)
    else:
        raise InputError(f"{place}: the prompt is {value!r}; it must be a non-empty text or a list of messages")
    if system is not None and not any(message.get("role") == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _require_distinct(rows: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    counts = Counter(row["prompt_id"] for row in rows)
    repeated = [row["prompt"][-1]["content"] for row in rows if counts[row["prompt_id"]] > 1]
    if repeated:
        examples = "; ".join(repr(text[:60]) for text in dict.fromkeys(repeated[:4]))
        raise InputError(
            f"{source}: {len(rows) - len(counts)} duplicate prompts ({examples}); each may occur once, or set "
            "`prompts.repeated: drop`"
        )
    return rows


def _drop_repeated(rows: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept = first.setdefault(row["prompt_id"], row)
        if kept["split"] != row["split"]:
            text = row["prompt"][-1]["content"][:60]
            raise InputError(f"{source}: the prompt {text!r} is in both splits; a prompt is in one of them")
    return list(first.values())
