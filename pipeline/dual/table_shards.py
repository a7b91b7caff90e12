"""The files of a table of scores, each as batches of the columns that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contracts.errors import InputError
from pipeline.contracts.table_files import FoundTable, TableFile
from pipeline.contracts.table_rows import TableRows, integer_in, number_in


@dataclass(frozen=True, eq=False)
class Shard:
    """One file.

    Attributes:
        path: of the file.
        is_of_partition: whether the folders above it give columns.
        schema: of its columns; a text is ``string`` however the file stores it.
        n_rows: rows in it.
        n_values: numbers in a column, those in lists counted one by one.
        read: its batches of some of the columns, at most so many rows each, as they are stored.
    """

    path: Path
    is_of_partition: bool
    schema: pa.Schema
    n_rows: int
    n_values: Callable[[str], int]
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
        columns: that will be read. Where the format says no types, they are numbers or lists of them, but for
        texts: which are texts (or, in JSON, whole numbers), and
        integers: which are whole numbers. These two are read where they are there.

    Raises:
        InputError: it cannot be read, or a value is not what its column must be; names the row.
    """
    rows = TableRows(file, what="the table")
    given = {name: _partition_value(name, file, table) for name in file.partition}
    if file.format == "parquet":
        with _faults_named(file.path):
            metadata = pq.read_metadata(file.path)
        stored: Any = rows.schema
        fields = [pa.field(name, _plain(stored.field(name).type)) for name in stored.names]
        n_rows, n_values = metadata.num_rows, partial(_count_values, metadata, stored)
        read = partial(_read_parquet, file.path)
    else:
        wanted = [name for name in rows.names if name in {*columns, *texts, *integers}]
        whole = _typed(rows, file, wanted, texts=texts, integers=integers)
        fields = [whole.schema.field(name) if name in wanted else pa.field(name, pa.string()) for name in rows.names]
        n_rows, n_values = rows.n_rows, partial(_count_in_memory, whole)
        read = partial(_read_memory, whole)
    fields += [pa.field(name, value.type) for name, value in given.items()]
    return Shard(file.path, bool(given), pa.schema(fields), n_rows, n_values, partial(_with_partition, read, given))


def is_list(kind: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type without the ways in which texts and repeated values can be stored."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _count_in_memory(table: pa.Table, name: str) -> int:
    if name not in table.column_names or not is_list(table.schema.field(name).type):
        return int(table.num_rows)
    return int(pc.sum(pc.list_value_length(table[name])).as_py() or 0)


def _count_values(metadata: pq.FileMetaData, schema: pa.Schema, name: str) -> int:
    """Values of a column, in lists or not; another column's name may begin like its own."""
    if name not in schema.names or not is_list(schema.field(name).type):
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
    if not given:
        yield from read(own, rows_at_once)
        return
    for batch in read(own, rows_at_once):
        arrays = {name: pa.repeat(value, batch.num_rows) for name, value in given.items() if name in columns}
        arrays |= {name: batch.column(name) for name in own}
        yield pa.RecordBatch.from_pydict(arrays)


def _partition_value(name: str, file: TableFile, table: FoundTable) -> pa.Scalar:
    """A folder's value: a whole number where all folders of the column are named like one, else a text."""
    values = [other.partition[name] for other in table.files]
    value = file.partition[name]
    if all(one is None or (one.removeprefix("-").isdecimal() and str(int(one)) == one) for one in values):
        return pa.scalar(None if value is None else int(value), pa.int64())
    return pa.scalar(value, pa.string())


def _typed(
    rows: TableRows, file: TableFile, columns: Sequence[str], *, texts: Sequence[str], integers: Sequence[str]
) -> pa.Table:
    """The columns of a file whose format says less of types than a table of scores needs."""
    found: dict[str, pa.Array] = {}
    for name in columns:
        values = rows.column(name)
        place = f"{file.path}: column {name!r}, row"
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
        raise InputError(f"{path} cannot be read: {error}") from error
