"""The files of a table of scores, each as batches of the columns that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.errors import InputError
from pipeline.contracts.table_files import FoundTable, TableFile
from pipeline.contracts.table_rows import TableRows, integer_in, number_in


@dataclass(frozen=True, eq=False)
class Shard:
    """One file.

    Attributes:
        path: of the file.
        partition: whether the folders above it give columns.
        names: all columns of it.
        schema: of those asked for that it has; a text is ``string`` however the file stores it.
        n_rows: rows in it.
        n_responses: responses in it, more than rows where scores are lists.
        read: its batches of some of the columns, at most so many rows each, as they are stored.
    """

    path: Path
    partition: bool
    names: Sequence[str]
    schema: pa.Schema
    n_rows: int
    n_responses: int
    read: Callable[[Sequence[str], int], Iterator[pa.RecordBatch]]

    def batches(self, columns: Sequence[str], *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows, with these columns in the types of the schema.

        Raises:
            InputError: the file cannot be read.
        """
        schema = pa.schema([self.schema.field(name) for name in columns])
        with _faults_named(self.path):
            for batch in self.read(columns, rows_at_once):
                arrays = [batch.column(name).cast(schema.field(name).type) for name in columns]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def open_shard(
    file: TableFile, table: FoundTable, *, columns: Sequence[str], texts: Sequence[str], integers: Sequence[str]
) -> Shard:
    """Open a file of a table.

    Args:
        file: the file.
        table: the files it belongs to.
        columns: that are asked for; those that are not there are not in the schema either. The third is a score.
        texts: those that are texts where the file does not say what they are.
        integers: those that are whole numbers there; the others are numbers.

    Raises:
        InputError: it cannot be read, or a value is not what its column must be; names the row.
    """
    given = {name: _partition_array(name, file, table) for name in columns if name in file.partition}
    rows = TableRows(file, what="--table")
    names = [*rows.names, *file.partition]
    present = [name for name in columns if name in names]
    own = [name for name in present if name not in given]
    if file.format == "parquet":
        with _faults_named(file.path):
            metadata = pq.read_metadata(file.path)
        stored = rows.schema
        schema = pa.schema([pa.field(name, _plain(stored.field(name).type)) for name in own])
        n_rows = metadata.num_rows
        n_responses = _count_values(metadata, stored, columns[1]) if columns[1] in own else n_rows
        read = partial(_read_parquet, file.path)
    else:
        whole = _typed(rows, file, own, texts=texts, integers=integers)
        schema, n_rows = whole.schema, whole.num_rows
        listed = columns[1] in own and is_list(whole.schema.field(columns[1]).type)
        n_responses = len(whole[columns[1]].combine_chunks().flatten()) if listed else n_rows
        read = partial(_read_memory, whole)
    for name, value in given.items():
        schema = schema.append(pa.field(name, value.type))
    ordered = pa.schema([schema.field(name) for name in present])
    return Shard(
        file.path, bool(file.partition), names, ordered, n_rows, n_responses, partial(_with_partition, read, given)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type without the ways in which texts and repeated values can be stored."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _count_values(metadata: pq.FileMetaData, schema: pa.Schema, name: str) -> int:
    """Values of a column, in lists or not; another column's name may begin like its own."""
    if not is_list(schema.field(name).type):
        return int(metadata.num_rows)
    return sum(
        group.column(place).num_values
        for group in (metadata.row_group(number) for number in range(metadata.num_row_groups))
        for place in range(group.num_columns)
        if (path := group.column(place).path_in_schema).startswith(f"{name}.") and path not in schema.names
    )


def _read_parquet(path: Path, columns: Sequence[str], rows_at_once: int) -> Iterator[pa.RecordBatch]:
    # One file after the other, a batch at a time: a dataset's scanner reads far ahead.
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=rows_at_once, columns=list(columns))


def _read_memory(table: pa.Table, columns: Sequence[str], rows_at_once: int) -> Iterator[pa.RecordBatch]:
    yield from table.select(list(columns)).to_batches(max_chunksize=rows_at_once)


def _with_partition(
    read: Callable[[Sequence[str], int], Iterator[pa.RecordBatch]],
    given: dict[str, pa.Scalar],
    columns: Sequence[str],
    rows_at_once: int,
) -> Iterator[pa.RecordBatch]:
    own = [name for name in columns if name not in given]
    for batch in read(own, rows_at_once):
        arrays = {name: pa.repeat(value, batch.num_rows) for name, value in given.items() if name in columns}
        arrays |= {name: batch.column(name) for name in own}
        yield pa.RecordBatch.from_pydict(arrays)


def _partition_array(name: str, file: TableFile, table: FoundTable) -> pa.Scalar:
    """A folder's value: a whole number where all folders of the column are named like one, else a text."""
    values = [other.partition[name] for other in table.files]
    value = file.partition[name]
    if all(one is None or one.removeprefix("-").isdecimal() and str(int(one)) == one for one in values):
        return pa.scalar(None if value is None else int(value), pa.int64())
    return pa.scalar(value, pa.string())


def _typed(
    rows: TableRows, file: TableFile, columns: Sequence[str], *, texts: Sequence[str], integers: Sequence[str]
) -> pa.Table:
    """The columns of a file whose format says less of types than a table of scores needs."""
    found: dict[str, pa.Array] = {}
    for name in columns:
        values = rows.column(name)
        place = f"--table {file.path}: column {name!r}, row"
        if rows.is_text and name not in texts:
            read = integer_in if name in integers else number_in
            values = [read(value, place=f"{place} {row}") for row, value in enumerate(values)]
            found[name] = pa.array(values, pa.int64() if name in integers else pa.float64())
        elif rows.is_text:
            # An empty field says nothing of a prompt or a split.
            found[name] = pa.array([value or None for value in values], pa.string())
        else:
            found[name] = _json_array(values, place=place, is_score=name not in (*texts, *integers))
    return pa.table(found)


def _json_array(values: list[Any], *, place: str, is_score: bool) -> pa.Array:
    """Values of one kind: a column of JSON may hold anything in any row. Scores are of one type in all files."""
    kinds: dict[type, int] = {}
    for row, value in enumerate(values):
        if value is not None:
            kind = float if isinstance(value, int) and not isinstance(value, bool) else type(value)
            kinds.setdefault(kind, row)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise InputError(
            f"{place} {second} is of another kind ({_named(other)}) than row {first} ({_named(one)}); a column is of "
            "one kind"
        )
    score_types = {float: pa.float64(), list: pa.list_(pa.float64())}
    try:
        return pa.array(values, score_types.get(next(iter(kinds), float)) if is_score else None)
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(f"{place}s: {error}") from error


def _named(kind: type) -> str:
    return {float: "number", str: "text", list: "list", dict: "object", bool: "true or false"}.get(kind, kind.__name__)


@contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"--table {path} cannot be read: {error}") from error
