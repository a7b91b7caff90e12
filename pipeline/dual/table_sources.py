"""Where the rows of a table of scores lie: files, or memory."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.artifacts import file_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.table_files import FoundTable, find_table
from pipeline.dual.table_shards import Shard, is_list, open_shard

if TYPE_CHECKING:
    import pandas as pd

SPLIT = "split"
SAMPLE_INDEX = "sample_index"
OPTIONAL = (SPLIT, SAMPLE_INDEX)
"""Columns that are read where a table has them."""

# How writers name the files of a split.
_SPLIT_NAME = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./0-9]|$)", re.IGNORECASE)


class ScoreSource(Protocol):
    """Rows that can be read several times, batch by batch."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""

    @property
    def n_rows(self) -> int:
        """Rows, of lists or of numbers."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of what lies beside the rows and is not read."""

    def place(self, row: int) -> str:
        """What messages call the part of the source that a row stands in."""

    def require_agreement(self, columns: Sequence[str]) -> None:
        """Check that all parts of the source have these columns, of one kind."""

    def n_values(self, column: str) -> int:
        """Numbers in a column, those in its lists counted one by one."""

    def batches(self, columns: Sequence[str], *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows in their order."""

    def file_hashes(self) -> dict[str, str]:
        """Name and sha256 of each file the rows come from; empty for rows in memory."""


@dataclass(frozen=True)
class ScoreFiles:
    """A file of scores (Parquet, CSV or JSON Lines), or a folder of such files, read in the order of their names.

    Attributes:
        path: the file or folder.
        columns: those that will be read: the prompt's id, then scores. Of a format that says nothing of types they
            have the types that a table of scores needs.
        texts: others that will be read, as texts.
    """

    path: Path
    columns: tuple[str, ...]
    texts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the first file.

        Raises:
            InputError: no such file, one that cannot be read, or a folder that cannot be read whole as one table.
        """
        return self._shards[0].schema

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of what lies in the folder and is not read."""
        return self._found.left_out

    def require_agreement(self, columns: Sequence[str]) -> None:
        """Check that all files have these columns, of one kind, and that all or none have the optional ones.

        Raises:
            InputError: a file differs from the first or is a copy of another, or files are named after several splits
                and no column says which rows are whose.
        """
        first = self._shards[0]
        for shard in self._shards[1:]:
            require_columns(shard.schema.names, columns, table=str(shard.path))
            for name in OPTIONAL:
                if (name in shard.schema.names) != (name in first.schema.names):
                    having, lacking = (shard, first) if name in shard.schema.names else (first, shard)
                    raise InputError(
                        f"{having.path} has a column {name!r} and {lacking.path} has none; all files or none must"
                    )
            for name in (*columns, *(one for one in OPTIONAL if one in first.schema.names)):
                kind, expected = shard.schema.field(name).type, first.schema.field(name).type
                if _kind(kind) != _kind(expected) or (name not in columns[1:] and kind != expected):
                    raise InputError(
                        f"{shard.path}: column {name!r} is of type {kind}, in {first.path} of type {expected}"
                    )
        self._require_one_split_of_names()
        self._require_different_files()

    @cached_property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(shard.n_rows for shard in self._shards)

    def n_values(self, column: str) -> int:
        """Numbers in a column, of Parquet from the footers; an empty list counts as one."""
        return sum(shard.n_values(column) for shard in self._shards)

    def place(self, row: int) -> str:
        """What messages call the file that a row stands in."""
        done = 0
        for shard in self._shards:
            done += shard.n_rows
            if row < done:
                return str(shard.path)
        return self.name

    def batches(self, columns: Sequence[str], *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows in their order.

        Raises:
            InputError: a file is damaged, or has changed since it was first looked at.
        """
        if _state([file.path for file in self._found.files]) != self._first_look:
            raise InputError(f"{self.path} has changed since it was first read: solve it again")
        schema = pa.schema([self.schema.field(name) for name in columns])
        for shard in self._shards:
            for batch in shard.batches(columns, rows_at_once=rows_at_once):
                # Whole numbers in one file and others in the next are one column.
                yield batch if batch.schema.equals(schema) else batch.cast(schema, safe=False)

    def file_hashes(self) -> dict[str, str]:
        """sha256 of each file by its name."""
        return {self._name_of(shard.path): file_sha256(shard.path) for shard in self._shards}

    @cached_property
    def _found(self) -> FoundTable:
        return find_table(self.path, what="the table")

    @cached_property
    def _first_look(self) -> list[tuple[int, int]]:
        """Size and time of each file."""
        return _state([file.path for file in self._found.files])

    @cached_property
    def _shards(self) -> tuple[Shard, ...]:
        """The files, opened; those that hold text are read."""
        assert self._first_look  # before anything else is looked at
        return tuple(
            open_shard(
                file,
                self._found,
                columns=(*self.columns, *self.texts),
                texts=(self.columns[0], SPLIT, *self.texts),
                integers=(SAMPLE_INDEX,),
            )
            for file in self._found.files
        )

    def _name_of(self, path: Path) -> str:
        return path.name if path == self.path else str(path.relative_to(self.path))

    def _require_one_split_of_names(self) -> None:
        """Names may be all there is of a split: they are not read, and so not passed over."""
        if SPLIT in self.schema.names or not self.path.is_dir():
            return
        named: dict[str, str] = {}
        for shard in self._shards:
            match = _SPLIT_NAME.search(self._name_of(shard.path))
            if match is not None:
                named.setdefault(match[1].lower(), self._name_of(shard.path))
        if len(named) > 1:
            raise InputError(
                f"{self.path} has files named after several splits ({', '.join(named.values())}) and no column "
                f"{SPLIT!r}: give it one, or the files of one split alone"
            )

    def _require_different_files(self) -> None:
        """Two files of the same bytes are one file and its copy."""
        known: dict[str, Path] = {}
        sizes = Counter(size for size, _ in self._first_look)
        for shard, (size, _) in zip(self._shards, self._first_look, strict=True):
            if sizes[size] > 1 and not shard.is_of_partition:
                path = known.setdefault(file_sha256(shard.path), shard.path)
                if path != shard.path:
                    raise InputError(f"{shard.path} is a copy of {path}; its rows would count twice")


@dataclass(frozen=True, eq=False)
class TableInMemory:
    """A table of Arrow.

    Attributes:
        table: the rows.
        name: what messages call it.
    """

    table: pa.Table
    name: str = "the table"

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self.table.schema

    @property
    def n_rows(self) -> int:
        """Rows, of lists or of numbers."""
        return int(self.table.num_rows)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def place(self, row: int) -> str:  # noqa: ARG002  # a table in memory is one part
        """The name."""
        return self.name

    def require_agreement(self, columns: Sequence[str]) -> None:
        """A table in memory has one schema."""

    def n_values(self, column: str) -> int:
        """Numbers in a column, those in its lists counted one by one."""
        values = self.table.column(column)
        return int(pc.sum(pc.list_value_length(values)).as_py() or 0) if is_list(values.type) else len(values)

    def batches(self, columns: Sequence[str], *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows in their order."""
        yield from self.table.select(list(columns)).to_batches(max_chunksize=rows_at_once)

    def file_hashes(self) -> dict[str, str]:
        """None."""
        return {}


def open_source(
    table: pd.DataFrame | pa.Table | str | Path, columns: Sequence[str], texts: Sequence[str] = ()
) -> ScoreSource:
    """A source from what a user has.

    Args:
        table: the rows. Of a DataFrame the columns asked for are copied, so that a later change of it changes nothing
            here; its index is no column.
        columns: those that will be read: the prompt's id, then scores.
        texts: others that will be read.

    Raises:
        InputError: it is something else, or a column of a DataFrame is missing or mixes types.
    """
    if isinstance(table, (str, Path)):
        return ScoreFiles(Path(table), tuple(columns), tuple(texts))
    if isinstance(table, pa.Table):
        return TableInMemory(table)
    if is_data_frame(table):
        return _from_data_frame(table, tuple(dict.fromkeys((*columns, *texts))))
    raise InputError(
        f"the table is of type {type(table).__name__}; it must be a pandas DataFrame, a pyarrow Table or the path of "
        "a file or folder"
    )


def require_columns(names: Sequence[str], wanted: Sequence[str], *, table: str) -> None:
    """Check that every column wanted is among ``names``, those of a table that messages call ``table``.

    Raises:
        InputError: one is missing, or there twice.
    """
    for name in wanted:
        if name not in names:
            from pipeline.contracts.section import nearest  # brings pydantic along, a tenth of a second

            raise InputError(f"{table} has no column {name!r}{nearest(name, names)}")
    for name in (*wanted, *OPTIONAL):
        if names.count(name) > 1:
            raise InputError(f"{table} has {names.count(name)} columns {name!r}; it must have one")


def is_data_frame(table: object) -> TypeGuard[pd.DataFrame]:
    """Whether it is a DataFrame of pandas, which is not imported for that: who has one has imported it."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(table, pandas.DataFrame)


def _from_data_frame(frame: pd.DataFrame, columns: Sequence[str]) -> TableInMemory:
    name = "the DataFrame"
    known = [str(label) for label in frame.columns]
    require_columns(known, columns, table=name)
    arrays: dict[str, pa.Array] = {}
    for column in (*columns, *(one for one in OPTIONAL if one in known)):
        try:
            arrays[column] = pa.array(frame.iloc[:, known.index(column)].copy(), from_pandas=True)
        except pa.ArrowException as error:
            raise InputError(f"{name}: column {column!r} holds values of several types: {error}") from error
    return TableInMemory(pa.table(arrays), name)


def _kind(kind: pa.DataType) -> str:
    """What a column holds, however wide: whole and other numbers are one kind, as are texts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_list(kind):
        return f"list of {_kind(kind.value_type)}"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)


def _state(paths: Sequence[Path]) -> list[tuple[int, int]]:
    try:
        found = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return [(one.st_size, one.st_mtime_ns) for one in found]
