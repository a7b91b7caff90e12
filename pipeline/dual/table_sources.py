"""Where the rows of a table of scores lie: Parquet files, or memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contracts.artifacts import file_sha256
from pipeline.contracts.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SPLIT = "split"
SAMPLE_INDEX = "sample_index"
OPTIONAL = (SPLIT, SAMPLE_INDEX)
"""Columns that are read where a table has them."""


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

    def require_agreement(self, columns: Sequence[str]) -> None:
        """Check that all parts of the source have these columns, of one kind."""

    def n_values(self, column: str) -> int:
        """Numbers in a column, those in its lists counted one by one."""

    def batches(self, columns: Sequence[str], *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows in their order."""

    def file_hashes(self) -> dict[str, str]:
        """Name and sha256 of each file the rows come from; empty for rows in memory."""


@dataclass(frozen=True)
class ParquetFiles:
    """A Parquet file, or a folder of them, read in the order of their names.

    Attributes:
        path: the file or folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the first file.

        Raises:
            InputError: no such file, or one of them is not Parquet.
        """
        return self._footers[0].schema.to_arrow_schema()

    def require_agreement(self, columns: Sequence[str]) -> None:
        """Check that all files have these columns, of one kind, and that all or none have the optional ones.

        Raises:
            InputError: a file differs from the first.
        """
        first = self.schema
        for path, footer in zip(self._paths[1:], self._footers[1:], strict=True):
            schema = footer.schema.to_arrow_schema()
            require_columns(schema.names, columns, table=str(path))
            for name in OPTIONAL:
                if (name in schema.names) != (name in first.names):
                    having, lacking = (path, self._paths[0]) if name in schema.names else (self._paths[0], path)
                    raise InputError(f"{having} has a column {name!r} and {lacking} has none; all files or none must")
            for name in (*columns, *(one for one in OPTIONAL if one in first.names)):
                kind, expected = schema.field(name).type, first.field(name).type
                if _kind(kind) != _kind(expected):
                    raise InputError(
                        f"{path}: column {name!r} is of type {kind}, in {self._paths[0]} of type {expected}"
                    )

    @cached_property
    def n_rows(self) -> int:
        """Rows of all files, from their footers."""
        return sum(metadata.num_rows for metadata in self._footers)

    def n_values(self, column: str) -> int:
        """Numbers in a column, from the footers; an empty list counts as one."""
        return sum(
            group.column(place).num_values
            for metadata in self._footers
            for group in map(metadata.row_group, range(metadata.num_row_groups))
            for place in range(group.num_columns)
            if f"{group.column(place).path_in_schema}.".startswith(f"{column}.")
        )

    def batches(self, columns: Sequence[str], *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows in their order, one file after the other: a dataset's scanner reads far ahead.

        Raises:
            InputError: a file is damaged, or has changed since it was first looked at.
        """
        if _state(self._paths) != self._first_look[0]:
            raise InputError(f"{self.path} has changed since it was first read: solve it again")
        try:
            for path in self._paths:
                with pq.ParquetFile(path) as file:
                    yield from file.iter_batches(batch_size=rows_at_once, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path} cannot be read as Parquet: {error}") from error

    def file_hashes(self) -> dict[str, str]:
        """sha256 of each file by its name."""
        return {
            path.name if path == self.path else str(path.relative_to(self.path)): file_sha256(path)
            for path in self._paths
        }

    @cached_property
    def _paths(self) -> list[Path]:
        paths = [self.path] if self.path.is_file() else sorted(self.path.rglob("*.parquet"))
        if not paths:
            raise InputError(f"the table is {self.name!r}; there is no such file, nor a folder with Parquet files")
        return paths

    @property
    def _footers(self) -> list[pq.FileMetaData]:
        return self._first_look[1]

    @cached_property
    def _first_look(self) -> tuple[list[tuple[int, int]], list[pq.FileMetaData]]:
        """Size and time of each file, and its footer."""
        state, found = _state(self._paths), []
        for path in self._paths:
            try:
                found.append(pq.read_metadata(path))
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path} cannot be read as Parquet: {error}") from error
        return state, found


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

    def require_agreement(self, columns: Sequence[str]) -> None:
        """A table in memory has one schema."""

    def n_values(self, column: str) -> int:
        """Numbers in a column, those in its lists counted one by one."""
        values = self.table.column(column)
        is_number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
        return len(values) if is_number else int(pc.sum(pc.list_value_length(values)).as_py() or 0)

    def batches(self, columns: Sequence[str], *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows in their order."""
        yield from self.table.select(list(columns)).to_batches(max_chunksize=rows_at_once)

    def file_hashes(self) -> dict[str, str]:
        """None."""
        return {}


def open_source(table: pd.DataFrame | pa.Table | str | Path, columns: Sequence[str]) -> ScoreSource:
    """A source from what a user has.

    Args:
        table: the rows. Of a DataFrame the columns asked for are copied, so that a later change of it changes nothing
            here; its index is no column.
        columns: those that will be read.

    Raises:
        InputError: it is something else, or a column of a DataFrame is missing or mixes types.
    """
    if isinstance(table, (str, Path)):
        return ParquetFiles(Path(table))
    if isinstance(table, pa.Table):
        return TableInMemory(table)
    if is_data_frame(table):
        return _from_data_frame(table, columns)
    raise InputError(
        f"the table is of type {type(table).__name__}; it must be a pandas DataFrame, a pyarrow Table or the path of "
        "a Parquet file or folder"
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
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
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
