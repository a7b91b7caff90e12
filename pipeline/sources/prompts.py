"""Prompts into their table: read from a file or a data set, split by prompt, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.sections import WIDER, PromptSettings
from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.messages import plain_messages
from pipeline.contracts.table_files import FORMATS, TableFile, file_format, find_table, list_files
from pipeline.contracts.table_rows import TableRows
from pipeline.contracts.tables import INFO, PROMPTS, SPLITS, prompt_id
from pipeline.scorers.models import is_hub_id
from pipeline.sources.wider_prompts import split_wider_prompts, wider_prompts

Messages = Sequence[Mapping[str, str]]

_log = logging.getLogger("dualign")

# A list of messages that was written as a text, by JSON or by Python's own print.
_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content|from|value)\1\s*:""")


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
    info: Mapping[str, Any] = field(default_factory=dict)


def build_prompt_table(
    prompts: Iterable[PromptRow], *, source: str, drop_repeated: bool = False
) -> tuple[pa.Table, int]:
    """The prompts table, and the number of prompts dropped because they occur earlier.

    Where the prompts have ``info``, the table has a further column ``info`` with it as JSON.

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
            **({"info": json.dumps(prompt.info, ensure_ascii=False)} if prompt.info else {}),
        }
        for prompt in prompts
    ]
    schema = PROMPTS.append(INFO.field("info")) if any("info" in row for row in rows) else PROMPTS
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
    return pa.Table.from_pylist(distinct, schema=schema), len(rows) - len(distinct)


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
    named += [("info_columns", column) for column in settings.info_columns]
    named += [("response_columns", column) for column in response_columns]
    columns = list(dict.fromkeys(column for _, column in named if column is not None))
    for table in _tables(settings, section):
        for setting, column in named:
            if column is not None and column not in table.names:
                raise InputError(
                    f"`{section}.{setting}` is {column!r}, but {table.place} has the columns {table.names}"
                )
        for number, row in enumerate(table.rows(columns)):
            yield SourceRow(f"{table.place}, row {number}", table.split, row)


def read_prompt_row(settings: PromptSettings, row: SourceRow) -> PromptRow:
    """The prompt of a row of a source, and its split.

    Raises:
        InputError: it is neither a non-empty text nor a list of messages.
    """
    messages = _messages(row.values[settings.prompt_column], settings, place=row.place)
    if settings.split_column:
        split = row.values[settings.split_column]
        if split not in SPLITS:
            raise InputError(f"{row.place}: the prompt has the split {split!r}; it must be one of {', '.join(SPLITS)}")
    else:
        split = row.split or hash_split(messages, settings.test_fraction)
    category = row.values[settings.category_column] if settings.category_column else None
    if isinstance(category, list | Mapping | bytes):
        raise InputError(f"{row.place}: the category is {str(category)[:60]!r}; it must be a text or a number")
    info = {name: row.values[name] for name in settings.info_columns}
    for name, value in info.items():
        try:
            json.dumps(value, allow_nan=False).encode()
        except (TypeError, ValueError):
            raise InputError(
                f"{row.place}: `{name}` is {str(value)[:60]!r}; a column of `prompts.info_columns` holds what JSON can"
            ) from None
    return PromptRow(messages, split, "" if category is None else str(category), info)


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


@dataclass(frozen=True)
class _SourceTable:
    """Some rows of a source.

    Attributes:
        place: what they are called in messages.
        split: that the source says they are of, or None.
        names: of their columns.
        rows: the rows with some of the columns.
    """

    place: str
    split: str | None
    names: Sequence[str]
    rows: Callable[[Sequence[str]], Iterator[Mapping[str, Any]]]


def _tables(settings: PromptSettings, section: str) -> Iterator[_SourceTable]:
    path, what = Path(settings.source), f"`{section}.source`"
    if settings.source == WIDER:
        yield _wider_table()
    elif path.is_file():
        yield _file_table(TableFile(path, file_format(path, what=what), {}), None, what=what)
    elif path.is_dir() and any(path.glob("**/*=*/")):
        found = find_table(path, what=what)
        if "split" in found.files[0].partition and settings.split_column is None:
            raise InputError(f"{what} {path} has folders for the column 'split'; set `{section}.split_column: split`")
        _say_left_out(path, found.left_out)
        yield from (_file_table(file, None, what=what) for file in found.files)
    elif path.is_dir() or is_hub_id(settings.source):
        yield from _data_set_tables(settings, section)
    else:
        raise InputError(
            f"{what} is {settings.source!r}; there is no such file or folder, and it is not a Hub id (owner/name)"
        )


def _wider_table() -> _SourceTable:
    split = split_wider_prompts()
    rows = [
        {"prompt": one.text, "split": split[one.text], "category": one.topic, "mood": one.mood}
        for one in wider_prompts()
    ]
    return _SourceTable(WIDER, None, list(rows[0]), lambda _: iter(rows))


def _file_table(file: TableFile, split: str | None, *, what: str) -> _SourceTable:
    table = TableRows(file, what=what)

    def rows(columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        for row in table.rows([name for name in columns if name not in file.partition]):
            yield {**row, **{name: file.partition[name] for name in columns if name in file.partition}}

    return _SourceTable(str(file.path), split, [*table.names, *file.partition], rows)


def _data_set_tables(settings: PromptSettings, section: str) -> Iterator[_SourceTable]:
    """The splits of a data set; files on this disk are read as any other file, those of the Hub by `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise import_failure(error, package="datasets", extra="train", purpose="reading a data set") from error
    what = f"`{section}.source`"
    if is_hub_id(settings.source) and not Path(settings.source).is_dir() and settings.revision is None:
        raise InputError(f"{what} is {settings.source!r}, on the Hub; give its `{section}.revision` too")
    try:
        files = _local_files(settings)
        found: Any = {}
        if files is None:
            found = datasets.load_dataset(settings.source, settings.dataset_config, revision=settings.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{what} {settings.source} cannot be read as a data set: {error}") from error
    for name, split in _chosen_splits(settings, list(found if files is None else files), section).items():
        if files is not None:
            yield from (_file_table(file, split, what=what) for file in files[name])
        else:
            rows = found[name].with_format("arrow")[:]
            yield _SourceTable(f"{settings.source}, split {name}", split, rows.column_names, _rows_of(rows))


def _rows_of(table: pa.Table) -> Callable[[Sequence[str]], Iterator[Mapping[str, Any]]]:
    return lambda columns: iter(table.select(list(columns)).to_pylist())


def _chosen_splits(settings: PromptSettings, known: Sequence[str], section: str) -> Mapping[str, str | None]:
    """The splits of a data set to read, and what they are here; says which are left out."""
    splits: Mapping[str, str | None]
    if settings.dataset_splits is not None:
        splits = settings.dataset_splits
    elif set(SPLITS) <= set(known):
        splits = {name: name for name in SPLITS}
    else:
        splits = dict.fromkeys(known)
    unknown = [name for name in splits if name not in known]
    if unknown:
        raise InputError(
            f"`{section}.dataset_splits` names {unknown[0]!r}, but {settings.source} has the splits {sorted(known)}"
        )
    left_out = [name for name in known if name not in splits]
    if left_out:
        _log.warning(
            "%s: the splits %s are left out; `%s.dataset_splits` can name them",
            settings.source,
            ", ".join(left_out),
            section,
        )
    return splits


def _local_files(settings: PromptSettings) -> dict[str, list[TableFile]] | None:
    """The files of each split of a folder that holds nothing but tables known here; None for any other data set."""
    folder = Path(settings.source)
    if not folder.is_dir():
        return None
    import datasets

    builder = datasets.load_dataset_builder(settings.source, settings.dataset_config)
    files = {str(split): [Path(name) for name in names] for split, names in (builder.config.data_files or {}).items()}
    if not files or any(path.suffix.lower() not in FORMATS for paths in files.values() for path in paths):
        return None
    read = {path.resolve() for paths in files.values() for path in paths}
    present, hidden = list_files(folder, what="the source")
    _say_left_out(
        folder, [str(path.relative_to(folder)) for path in (*present, *hidden) if path.resolve() not in read]
    )
    return {
        split: [TableFile(path, FORMATS[path.suffix.lower()], {}) for path in paths] for split, paths in files.items()
    }


def _say_left_out(folder: Path, names: Sequence[str]) -> None:
    if names:
        _log.warning("%s: %d files are not read as data: %s", folder, len(names), ", ".join(names[:5]))


def _messages(value: Any, settings: PromptSettings, *, place: str) -> Messages:
    if isinstance(value, str) and value.strip():
        if _WRITTEN_OUT.match(value):
            raise InputError(
                f"{place}: the prompt is a list of messages written as a text, {value[:60]!r}; JSON Lines and Parquet "
                "hold such a list as what it is (and a prompt that is to be this very text as a list of one message)"
            )
        messages: list[Mapping[str, str]] = [{"role": "user", "content": value}]
    elif isinstance(value, list) and value:
        messages = list(_without_answer(plain_messages(value, place=place), settings, place=place))
    else:
        raise InputError(
            f"{place}: the prompt is {repr(value)[:120]}; it must be a non-empty text or a list of messages"
        )
    if settings.system is not None and not any(message.get("role") == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": settings.system})
    return messages


def _without_answer(messages: Messages, settings: PromptSettings, *, place: str) -> Messages:
    """The messages up to the one that a model is to answer."""
    if messages[-1]["role"] != "assistant" or settings.last_assistant_turn == "keep":
        return messages
    if settings.last_assistant_turn == "refuse":
        raise InputError(
            f"{place}: the prompt ends in an answer of the assistant, {messages[-1]['content'][:60]!r}; set "
            "`prompts.last_assistant_turn: drop` to leave that turn out (or `keep`, where the model is to go on from "
            "it)"
        )
    if len(messages) == 1:
        raise InputError(f"{place}: the prompt is an answer of the assistant and nothing else")
    return messages[:-1]


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
