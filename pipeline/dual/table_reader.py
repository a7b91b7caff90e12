"""Tables of scores from anywhere: one row a response, or one row a prompt with lists, read in chunks.

Where the rows lie, in Parquet files or in memory, is a source's affair (:mod:`pipeline.dual.table_sources`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.artifacts import content_sha256
from pipeline.contracts.errors import InputError
from pipeline.dual.table_sources import OPTIONAL, SAMPLE_INDEX, SPLIT, ScoreSource, require_columns

# Responses of a chunk: some ten megabytes of scores.
_CHUNK_ROWS = 500_000


@dataclass(frozen=True, eq=False)
class ScoreChunk:
    """Some rows of a table, one a response.

    Attributes:
        prompt_n: 64-bit id of the prompt, shape (n,).
        prompt_id_n: the prompt's id as the table has it.
        sample_index_n: the table's ``sample_index``, the place in a list, or the number of the row in the table.
        row_n: number of the table's row that the response stands in.
        scores_ns: score columns in the order asked for, in their own directions, shape (n, s).
        split_n: the row's split, or None where the table has none.
    """

    prompt_n: np.ndarray
    prompt_id_n: pa.Array
    sample_index_n: np.ndarray
    row_n: np.ndarray
    scores_ns: np.ndarray
    split_n: np.ndarray | None


@dataclass(frozen=True)
class ScoreTable:
    """The columns of a table that a problem is made of.

    Attributes:
        source: holds the rows.
        prompt_id: column that says which prompt a row answers: strings or integers.
        scores: score columns, numbers or, with one row a prompt, lists of numbers.
    """

    source: ScoreSource
    prompt_id: str
    scores: tuple[str, ...]

    def require_columns(self) -> None:
        """Check what can be checked without reading rows.

        Raises:
            InputError: no such file, not Parquet, no rows, or a column that is missing, there twice or of the wrong
                type.
        """
        schema, table = self.source.schema, self.source.name
        require_columns(schema.names, (self.prompt_id, *self.scores), table=table)
        kind = self.prompt_type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"{table}: column {self.prompt_id!r} is of type {kind}; an id must be text or an integer")
        if SAMPLE_INDEX in schema.names and not pa.types.is_integer(schema.field(SAMPLE_INDEX).type):
            kind = schema.field(SAMPLE_INDEX).type
            raise InputError(f"{table}: column {SAMPLE_INDEX!r} is of type {kind}; it must be an integer")
        kinds = {name: schema.field(name).type for name in self.scores}
        for name, kind in kinds.items():
            number = kind.value_type if _is_list(kind) else kind
            if not (pa.types.is_floating(number) or pa.types.is_integer(number)):
                raise InputError(f"{table}: column {name!r} is of type {kind}; a score must be a number")
        listed = [name for name, kind in kinds.items() if _is_list(kind)]
        if listed and len(listed) < len(kinds):
            single = next(name for name in kinds if name not in listed)
            raise InputError(
                f"{table}: column {listed[0]!r} holds lists and {single!r} numbers; give one row a response "
                "with numbers, or one row a prompt with lists"
            )
        self.source.require_agreement((self.prompt_id, *self.scores))
        if self.n_responses == 0:
            raise InputError(f"{table} has no rows")

    @cached_property
    def n_responses(self) -> int:
        """Responses in the table; of files, from their footers."""
        return self.source.n_values(self.scores[0])

    @property
    def has_split(self) -> bool:
        """Whether the table has a column ``split``."""
        return SPLIT in self.source.schema.names

    @property
    def has_lists(self) -> bool:
        """Whether a row is a prompt and its scores are lists."""
        return _is_list(self.source.schema.field(self.scores[0]).type)

    @property
    def prompt_type(self) -> pa.DataType:
        """Type of the prompt ids as they are written back."""
        kind = self.source.schema.field(self.prompt_id).type
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    def identity(self) -> dict[str, str]:
        """What the rows were: sha256 of each file by its name, or of the values of a table in memory."""
        return self.source.file_hashes() or {"table in memory": self._values_sha256()}

    def _values_sha256(self) -> str:
        """Of ids, places, scores and splits in the table's order; however they are stored, and cut into chunks."""
        ids, places, scores, splits = digests = [hashlib.sha256() for _ in range(4)]
        for chunk in self.chunks():
            ids.update(chunk.prompt_n.tobytes())
            places.update(chunk.sample_index_n.tobytes())
            scores.update(chunk.scores_ns.tobytes())
            if chunk.split_n is not None:
                splits.update(f"{chunk.split_n.tolist()!r}"[1:-1].encode() + b", ")
        return content_sha256([digest.hexdigest() for digest in digests])

    def chunks(self) -> Iterator[ScoreChunk]:
        """The rows in the table's order, checked.

        Raises:
            InputError: an empty id, or a score that is empty, NaN or infinite; names column and row.
        """
        done = 0
        rows_at_once = max(1, _CHUNK_ROWS * self.source.n_rows // max(self.n_responses, 1))
        for batch in self.source.batches(self._columns, rows_at_once=rows_at_once):
            if batch.num_rows:
                yield self._read(batch, done)
                done += batch.num_rows

    @property
    def _columns(self) -> list[str]:
        optional = [name for name in OPTIONAL if name in self.source.schema.names]
        return list(dict.fromkeys([self.prompt_id, *self.scores, *optional]))

    def _read(self, batch: pa.RecordBatch, done: int) -> ScoreChunk:
        ids = batch.column(self.prompt_id)
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        row_n = index_n = done + np.arange(batch.num_rows)
        self._require_whole(ids, self.prompt_id, row_n)
        split = batch.column(SPLIT) if self.has_split else None
        if SAMPLE_INDEX in batch.schema.names:
            self._require_whole(batch.column(SAMPLE_INDEX), SAMPLE_INDEX, row_n)
            index_n = batch.column(SAMPLE_INDEX).to_numpy(zero_copy_only=False)
        columns = [batch.column(name) for name in self.scores]
        if self.has_lists:
            parents = self._list_parents(columns, row_n)
            row_n = row_n[parents]
            starts = np.flatnonzero(np.diff(parents, prepend=-1))
            index_n = np.arange(len(parents)) - np.repeat(starts, np.diff(np.append(starts, len(parents))))
            ids = ids.take(pa.array(parents))
            split = split.take(pa.array(parents)) if split is not None else None
            columns = [column.flatten() for column in columns]
        values = [self._numbers(column, name, row_n) for column, name in zip(columns, self.scores, strict=True)]
        return ScoreChunk(
            prompt_n=_hash_ids(ids),
            prompt_id_n=ids,
            sample_index_n=np.asarray(index_n, dtype=np.int64),
            row_n=row_n,
            scores_ns=np.stack(values, axis=1),
            split_n=None if split is None else np.asarray(split.to_pylist(), dtype=object),
        )

    def _list_parents(self, columns: Sequence[pa.Array], row_n: np.ndarray) -> np.ndarray:
        for column, name in zip(columns, self.scores, strict=True):
            self._require_whole(column, name, row_n)
        lengths = [pc.list_value_length(column).to_numpy() for column in columns]
        for length, name in zip(lengths, self.scores, strict=True):
            wrong = np.flatnonzero((length != lengths[0]) | (length == 0))
            if len(wrong):
                raise InputError(
                    f"{self.source.name}: row {row_n[wrong[0]]} has {length[wrong[0]]} scores in {name!r} and "
                    f"{lengths[0][wrong[0]]} in {self.scores[0]!r}; a prompt needs one of each for every response"
                )
        return np.asarray(pc.list_parent_indices(columns[0]).to_numpy())

    def _numbers(self, column: pa.Array, name: str, row_n: np.ndarray) -> np.ndarray:
        """Values of a column whose rows have these numbers in the table."""
        self._require_whole(column, name, row_n)
        values = np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            shown = ", ".join(f"row {row_n[place]}: {values[place]}" for place in wrong[:3])
            raise InputError(
                f"{self.source.name}: column {name!r} has {len(wrong)} values that are not finite ({shown})"
            )
        return values

    def _require_whole(self, column: pa.Array, name: str, row_n: np.ndarray) -> None:
        if column.null_count:
            rows = row_n[np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False))[:3]].tolist()
            raise InputError(
                f"{self.source.name}: column {name!r} has {column.null_count} empty values (first rows: {rows})"
            )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _hash_ids(ids: pa.Array) -> np.ndarray:
    """64-bit ids: integers as they are, anything else by a hash of its text.

    Two of a million prompts collide with a probability of 3e-8.
    """
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.to_numpy(zero_copy_only=False)).astype(np.int64).view(np.uint64)
    codes = ids.dictionary_encode()
    texts = codes.dictionary.to_pylist()
    hashed = [int.from_bytes(hashlib.blake2b(str(text).encode(), digest_size=8).digest(), "little") for text in texts]
    hashed_d = np.array(hashed, dtype=np.uint64)
    return np.asarray(hashed_d[codes.indices.to_numpy()])
