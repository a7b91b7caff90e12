"""A table written in shards as the work finishes, so that a killed run loses one shard and repeats none.

Layout of a folder: ``parts/`` holds finished shards of an unfinished step, ``data/<split>-00000-of-0000N.parquet`` the
finished table, which ``datasets``, pandas, DuckDB and Ray read as it is. Finishing is renaming: no row is copied.
A shard's place comes from its own metadata, never from its file name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contracts.artifacts import atomic_write_bytes, file_sha256, require_file, shown
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.tables import SAMPLE_KEY, SPLITS, with_metadata

_ROWS_PER_GROUP = 4096
_MOST_CELLS = 2**31
_ORDER = b"dualign.shard"
_SPLIT = b"dualign.split"
_REPAIR = "delete it and run the step again: only its rows are computed anew"


@dataclass(frozen=True)
class ShardedTable:
    """One table of a run.

    Attributes:
        folder: the step's folder.
        schema: the table's schema, checked on every write.
        metadata: key-value entries for every file (run, config hash, model revisions, versions).
    """

    folder: Path
    schema: pa.Schema
    metadata: Mapping[str, str]

    def write_shard(self, table: pa.Table, *, split: str, order: str) -> Path:
        """Write one finished shard atomically.

        Args:
            table: rows with exactly this table's columns.
            split: the split all its rows belong to.
            order: sorts the shard among its split's shards and names its file; unique within the split.
        """
        schema = with_metadata(self.schema, {**self.metadata, "shard": order, "split": split})
        sink = io.BytesIO()
        pq.write_table(
            table.cast(schema).replace_schema_metadata(schema.metadata),
            sink,
            compression="zstd",
            row_group_size=_ROWS_PER_GROUP,
            write_page_checksum=True,
        )
        path = self.folder / "parts" / f"{split}-{order}.parquet"
        atomic_write_bytes(path, sink.getvalue())
        return path

    def paths(self, split: str) -> list[Path]:
        """Finished files of a split, of an unfinished step too, in shard order."""
        found = [*self.folder.glob(f"data/{split}-*.parquet"), *self.folder.glob(f"parts/{split}-*.parquet")]
        return [path for _, path in sorted((_shard_order(path), path) for path in found)]

    def prompt_ids(self, split: str) -> list[str]:
        """The prompts that have rows in a split, sorted.

        Raises:
            CorruptArtifactError: a file cannot be read.
        """
        found: set[str] = set()
        for path in self.paths(split):
            table = read_parquet(path, columns=["prompt_id"], schema=self.schema, as_dictionary=["prompt_id"])
            found.update(table["prompt_id"].unique().to_pylist())
        return sorted(found)

    def keys(self, path: Path, prompts: PromptPlaces) -> tuple[np.ndarray, np.ndarray]:
        """Place of the prompt (-1 where it is not among ``prompts``) and ``sample_index`` of each row of one file.

        Returns:
            Two arrays of shape (n,), int64.

        Raises:
            CorruptArtifactError: the file cannot be read, or an index is negative.
        """
        columns = read_parquet(path, columns=SAMPLE_KEY, schema=self.schema, as_dictionary=["prompt_id"])
        index_n = columns["sample_index"].to_numpy().astype(np.int64)
        if index_n.min(initial=0) < 0:
            raise CorruptArtifactError(f"{path} has the sample_index {index_n.min()}; it must not be negative")
        return prompts.of(columns["prompt_id"]), index_n

    def presence(self, split: str, prompts: PromptPlaces, *, n_samples: int) -> np.ndarray:
        """Which rows of the grid of prompts and samples are on disk, of an unfinished step too.

        Rows of other prompts, and of samples from ``n_samples`` on, are passed over.

        Returns:
            Booleans, shape (prompts, n_samples).

        Raises:
            CorruptArtifactError: a shard cannot be read, a row is there twice, or the grid would be larger than any
                table of samples, which is what a damaged ``sample_index`` asks for.
        """
        if len(prompts) * n_samples > _MOST_CELLS:
            raise CorruptArtifactError(
                f"{self.folder} asks for {n_samples} samples of each of {len(prompts)} prompts; a table has at most "
                f"{_MOST_CELLS} rows, so that a sample_index or the number of samples is damaged"
            )
        grid = np.zeros((len(prompts), n_samples), dtype=bool)
        for path in self.paths(split):
            place, sample = self.keys(path, prompts)
            inside = (place >= 0) & (sample < n_samples)
            flat = place[inside] * n_samples + sample[inside]
            distinct = np.unique(flat)
            repeats = len(flat) - len(distinct) + int(np.count_nonzero(grid.ravel()[distinct]))
            if repeats:
                raise CorruptArtifactError(f"{path} repeats {repeats} rows of the table; {_REPAIR}")
            grid.ravel()[distinct] = True
        return grid

    def read(self, split: str, *, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a split on disk, checksums verified.

        Raises:
            CorruptArtifactError: a shard is missing its footer, damaged, or has another schema.
        """
        tables = [read_parquet(path, columns=columns, schema=self.schema) for path in self.paths(split)]
        if tables:
            return pa.concat_tables(tables)
        names = self.schema.names if columns is None else columns
        return pa.schema([self.schema.field(name) for name in names]).empty_table()

    def finish(self) -> dict[str, str]:
        """Move every shard to its final name; safe to repeat after a kill at any point.

        Returns:
            The path of each file relative to the folder, and its sha256.
        """
        for name in ("data", "parts"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        files: dict[str, str] = {}
        for split in SPLITS:
            paths = self.paths(split)
            final = [self.folder / "data" / _file_name(split, place, len(paths)) for place in range(len(paths))]
            # Two passes, because a final name may still be the present name of another shard.
            waiting = []
            for path, target in zip(paths, final, strict=True):
                if path == target:
                    waiting.append(path)
                else:
                    waiting.append(path.replace(self.folder / "parts" / f"{split}-{_shard_order(path)}.parquet"))
            for path, target in zip(waiting, final, strict=True):
                path.replace(target)
                files[str(target.relative_to(self.folder))] = file_sha256(target)
        for leftover in (self.folder / "parts").iterdir():  # temporary files of a killed write; every shard has moved
            leftover.unlink()
        (self.folder / "parts").rmdir()
        return files


def write_table(
    folder: Path, table: pa.Table, *, metadata: Mapping[str, str], rows_per_file: int = 1_000_000
) -> dict[str, str]:
    """Write a whole table that has a ``split`` column under ``folder/data``, one run of files a split.

    Returns:
        The path of each file relative to the folder, and its sha256.
    """
    sharded = ShardedTable(folder=folder, schema=table.schema.remove_metadata(), metadata=metadata)
    for split in SPLITS:
        rows = table.filter(pc.equal(table["split"], split))
        for place, start in enumerate(range(0, rows.num_rows, rows_per_file)):
            sharded.write_shard(rows.slice(start, rows_per_file), split=split, order=f"{place:06d}")
    return sharded.finish()


def write_parquet(path: Path, table: pa.Table, *, metadata: Mapping[str, str]) -> None:
    """Write a small table as one file, atomically."""
    schema = with_metadata(table.schema, metadata)
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(schema.metadata), sink, compression="zstd")
    atomic_write_bytes(path, sink.getvalue())


def read_parquet(
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    as_dictionary: Sequence[str] = (),
) -> pa.Table:
    """Read one Parquet file, verifying page checksums.

    Args:
        path: the file.
        columns: columns to read, or None for all.
        schema: columns and types it must have; of these, the types of ``columns`` where those are given.
        as_dictionary: columns of strings to read as dictionaries of their distinct values.

    Raises:
        CorruptArtifactError: truncated, damaged, without one of the columns, or (where ``schema`` is given) with other
            columns or types.
    """
    require_file(path)
    with _damage_named(path), _opened(path, as_dictionary) as file:
        _require_fields(path, file.schema_arrow, columns, schema)  # before anything is read
        table = file.read(columns=list(columns) if columns is not None else None)
        _require_valid(path, table)
    return table


def iterate_parquet(
    path: Path, *, columns: Sequence[str], schema: pa.Schema, as_dictionary: Sequence[str] = ()
) -> Iterator[pa.Table]:
    """Read one Parquet file a row group at a time; arguments and errors as of :func:`read_parquet`."""
    require_file(path)
    with _damage_named(path), _opened(path, as_dictionary) as file:
        _require_fields(path, file.schema_arrow, columns, schema)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(columns))
            _require_valid(path, table)
            yield table


def count_parquet(path: Path, columns: Sequence[str]) -> tuple[int, list[int]]:
    """Rows of one Parquet file, and the values in each of some columns of lists, from its footer alone.

    Raises:
        CorruptArtifactError: the footer is damaged.
    """
    require_file(path)
    with _damage_named(path):
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        values = [
            sum(
                group.column(place).num_values
                for group in groups
                for place in range(group.num_columns)
                if group.column(place).path_in_schema.partition(".")[0] == name
            )
            for name in columns
        ]
    return int(metadata.num_rows), values


def _opened(path: Path, as_dictionary: Sequence[str]) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=list(as_dictionary))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError, MemoryError) as error:
        raise CorruptArtifactError(
            f"{path} is damaged or not Parquet: {shown(str(error), limit=300)}; {_REPAIR}"
        ) from error


def _require_valid(path: Path, table: pa.Table) -> None:
    table.validate(full=True)  # texts that are not UTF-8, lengths that do not fit
    _require_no_inner_nulls(path, table)


def _require_fields(path: Path, found: pa.Schema, columns: Sequence[str] | None, schema: pa.Schema | None) -> None:
    repeated = sorted({name for name in found.names if found.names.count(name) > 1})
    if repeated:
        raise CorruptArtifactError(f"{path} has the column {repeated[0]!r} twice")
    missing = [name for name in columns or () if name not in found.names]
    if missing:
        raise CorruptArtifactError(f"{path} lacks the columns {missing}; it has {found.names}")
    if schema is None:
        return
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    fields = [_as_written(found.field(name)) for name in (found.names if columns is None else columns)]
    if not pa.schema(fields).equals(wanted.remove_metadata()):
        raise CorruptArtifactError(
            f"{path} has the columns {[field.name for field in fields]} of types "
            f"{[_described(field) for field in fields]}, expected {wanted.names} of types "
            f"{[_described(field) for field in wanted]}"
        )


def _require_no_inner_nulls(path: Path, table: pa.Table) -> None:
    """Token ids and messages have values where the schema cannot say so: fields within lists may always be null."""
    for name in table.column_names:
        if any(_has_inner_nulls(chunk) for chunk in table[name].chunks):
            raise CorruptArtifactError(f"{path} has a null within a value of the column {name!r}")


def _has_inner_nulls(array: pa.Array) -> bool:
    if pa.types.is_list(array.type):
        inner = [array.flatten()]
    elif pa.types.is_struct(array.type):
        inner = array.flatten()
    else:
        return False
    return any(one.null_count or _has_inner_nulls(one) for one in inner)


def _as_written(field: pa.Field) -> pa.Field:
    """A field as it is without being read as a dictionary."""
    return field.with_type(field.type.value_type) if isinstance(field.type, pa.DictionaryType) else field


def _described(field: pa.Field) -> str:
    return f"{field.type} or null" if field.nullable else str(field.type)


def _shard_order(path: Path) -> str:
    require_file(path)
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise CorruptArtifactError(f"{path} is damaged or not Parquet: {error}; {_REPAIR}") from error
    if _ORDER not in metadata or _SPLIT not in metadata:
        raise CorruptArtifactError(f"{path} is not a shard of this project: its metadata has no shard entry")
    return str(metadata[_ORDER].decode(errors="replace"))


def _file_name(split: str, place: int, total: int) -> str:
    return f"{split}-{place:05d}-of-{total:05d}.parquet"
