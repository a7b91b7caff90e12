"""Tables of scores from anywhere: one row a response, or one row a prompt with lists, read in chunks.

Where the rows lie, in Parquet files or in memory, is a source's affair (:mod:`pipeline.dual.table_sources`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.artifacts import content_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import check_name
from pipeline.contracts.statistics import Statistic, StatisticColumns, statistic_columns
from pipeline.dual.table_shards import is_list
from pipeline.dual.table_sources import OPTIONAL, SAMPLE_INDEX, SPLIT, ScoreSource, require_columns
from stage1_dual.dual import GroupedSamples

# Responses of a chunk: some ten megabytes of scores.
_CHUNK_ROWS = 500_000
# The columns of weights.parquet besides the prompt's id.
_OF_THE_WEIGHTS = (SAMPLE_INDEX, "weight", SPLIT)
# Beyond this, neighbouring whole numbers are one number of float64.
_LARGEST_WHOLE = 2**53
_EXAMPLES = 3


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
        labels: the columns that say which rows count for a constraint, texts of shape (n,) by name.
        score_names: of the score columns.
    """

    prompt_n: np.ndarray
    prompt_id_n: pa.Array
    sample_index_n: np.ndarray
    row_n: np.ndarray
    scores_ns: np.ndarray
    split_n: np.ndarray | None
    labels: Mapping[str, np.ndarray]
    score_names: tuple[str, ...]

    @property
    def reward_n(self) -> np.ndarray:
        """The first score, shape (n,)."""
        return np.asarray(self.scores_ns[:, 0])

    def score_n(self, name: str) -> np.ndarray:
        """The raw scores of a column, shape (n,)."""
        return np.asarray(self.scores_ns[:, self.score_names.index(name)])

    def statistic_columns(self, statistic: Statistic, *, at: float | None = None) -> StatisticColumns:
        """U and h of each row; ``at`` is t of a cvar."""
        scores = {name: self.score_n(name) for name in statistic.scores}
        return statistic_columns(statistic, scores, self.labels, at=at)

    def select(self, mask_n: np.ndarray) -> ScoreChunk:
        """The rows where a boolean mask, shape (n,), is true."""
        return ScoreChunk(
            self.prompt_n[mask_n],
            self.prompt_id_n.filter(pa.array(mask_n)),
            self.sample_index_n[mask_n],
            self.row_n[mask_n],
            self.scores_ns[mask_n],
            None if self.split_n is None else self.split_n[mask_n],
            {name: values_n[mask_n] for name, values_n in self.labels.items()},
            self.score_names,
        )

    @classmethod
    def concatenate(cls, chunks: Sequence[ScoreChunk]) -> ScoreChunk:
        """The rows of several chunks of one table, in order."""
        first = chunks[0]
        splits = [chunk.split_n for chunk in chunks if chunk.split_n is not None]
        return cls(
            np.concatenate([chunk.prompt_n for chunk in chunks]),
            pa.concat_arrays([chunk.prompt_id_n for chunk in chunks]),
            np.concatenate([chunk.sample_index_n for chunk in chunks]),
            np.concatenate([chunk.row_n for chunk in chunks]),
            np.concatenate([chunk.scores_ns for chunk in chunks]),
            np.concatenate(splits) if splits else None,
            {name: np.concatenate([chunk.labels[name] for chunk in chunks]) for name in first.labels},
            first.score_names,
        )


@dataclass(frozen=True)
class ScoreTable:
    """The columns of a table that a problem is made of.

    Attributes:
        source: holds the rows.
        prompt_id: column that says which prompt a row answers: strings or integers.
        scores: score columns, numbers or, with one row a prompt, lists of numbers.
        labels: columns that say which rows count for a constraint, texts or whole numbers.
    """

    source: ScoreSource
    prompt_id: str
    scores: tuple[str, ...]
    labels: tuple[str, ...] = ()

    def require_columns(self) -> None:
        """Check what can be checked without reading rows.

        Raises:
            InputError: no such file, one that cannot be read, no rows, a column that is missing, there twice or of the
                wrong type, a name that the results cannot have, or files that do not make one table.
        """
        self._require_names()
        schema, table = self.source.schema, self.source.name
        require_columns(schema.names, (self.prompt_id, *self.scores, *self.labels), table=table)
        for name in self.labels:
            kind = _decoded(schema.field(name).type)
            if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
                raise InputError(
                    f"{table}: column {name!r} is of type {kind}; what says which rows count is a text, a whole "
                    "number or true and false"
                )
        kind = self.prompt_type
        if not (pa.types.is_integer(kind) or _is_text(kind)):
            raise InputError(f"{table}: column {self.prompt_id!r} is of type {kind}; an id must be text or an integer")
        if SAMPLE_INDEX in schema.names and not pa.types.is_integer(kind := schema.field(SAMPLE_INDEX).type):
            raise InputError(f"{table}: column {SAMPLE_INDEX!r} is of type {kind}; it must be an integer")
        if self.has_split and not _is_text(_decoded(kind := schema.field(SPLIT).type)):
            raise InputError(f"{table}: column {SPLIT!r} is of type {kind}; a split is a text")
        kinds = {name: schema.field(name).type for name in self.scores}
        for name, kind in kinds.items():
            number = _decoded(kind.value_type if is_list(kind) else kind)
            if not (pa.types.is_floating(number) or pa.types.is_integer(number) or pa.types.is_decimal(number)):
                raise InputError(f"{table}: column {name!r} is of type {kind}; a score must be a number")
        listed = [name for name, kind in kinds.items() if is_list(kind)]
        if listed and len(listed) < len(kinds):
            single = next(name for name in kinds if name not in listed)
            raise InputError(
                f"{table}: column {listed[0]!r} holds lists and {single!r} numbers; give one row a response "
                "with numbers, or one row a prompt with lists"
            )
        if listed and SAMPLE_INDEX in schema.names:
            raise InputError(
                f"{table}: column {SAMPLE_INDEX!r} beside lists of scores: with one row a prompt, the index of a "
                "response is its place in the lists"
            )
        self.source.require_agreement((self.prompt_id, *dict.fromkeys((*self.scores, *self.labels))))
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
        return is_list(self.source.schema.field(self.scores[0]).type)

    @property
    def has_sample_index(self) -> bool:
        """Whether the table says which response of its prompt a row is."""
        return self.has_lists or SAMPLE_INDEX in self.source.schema.names

    @property
    def prompt_type(self) -> pa.DataType:
        """Type of the prompt ids as they are written back."""
        return _decoded(self.source.schema.field(self.prompt_id).type)

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

    def split_counts(self) -> dict[str, int]:
        """Rows of each split, in the order of their names.

        Raises:
            InputError: a row without a split; names the first ones.
        """
        counts: dict[str, int] = {}
        done = 0
        for batch in self.source.batches([SPLIT], rows_at_once=_CHUNK_ROWS):
            self._require_whole(batch.column(0), SPLIT, done + np.arange(batch.num_rows))
            for entry in pc.value_counts(batch.column(0)).to_pylist():
                counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
            done += batch.num_rows
        return dict(sorted(counts.items()))

    def notes(self, splits: Sequence[str]) -> list[str]:
        """What the result does not hold, though it lies in the table: rows of other splits, and other files.

        Args:
            splits: that take part.

        Raises:
            InputError: no row is of the first of them, or as :meth:`split_counts`.
        """
        notes: list[str] = []
        left_out = self.source.left_out
        if left_out:
            shown = ", ".join(map(repr, left_out[:_EXAMPLES]))
            notes.append(f"{self.source.name}: {len(left_out)} names in it are not read as data ({shown})")
        if not self.has_split:
            return notes
        counts = self.split_counts()
        if splits[0] not in counts:
            raise InputError(
                f"{self.source.name} has a column {SPLIT!r}, but no row of the split {splits[0]!r}; its splits are "
                f"{', '.join(map(repr, counts))}"
            )
        return notes + [
            f"{self.source.name}: {count} rows of the split {split!r} are left out; {' and '.join(splits)} are read"
            for split, count in counts.items()
            if split not in splits
        ]

    def require_distinct(self, found: Mapping[str, GroupedSamples]) -> list[str]:
        """Check the keys of the rows that were read: a response counts once, and a prompt is in one split.

        Returns:
            What cannot be told of a table whose rows have no key.

        Raises:
            InputError: a key occurs twice, or a prompt is in two splits; says how many and names the first ones.
        """
        if len(found) == 2:
            (first, one), (second, other) = found.items()
            both = np.intersect1d(one.prompt_p, other.prompt_p)
            if len(both):
                shown = ", ".join(map(repr, self._prompt_names(both[:_EXAMPLES]).values()))
                raise InputError(
                    f"{self.source.name}: {len(both)} prompts are in both splits, {first} and {second} (column "
                    f"{self.prompt_id!r}: {shown}); a prompt is in one of them, or nothing is held out"
                )
        parts = [group.repeated for group in found.values()]
        n_repeated = sum(part.n_rows for part in parts)
        if not n_repeated:
            return []
        if not self.has_sample_index:
            n_samples = sum(group.scores.facts.n_samples for group in found.values())
            note = (
                f"{self.source.name}: {n_repeated} of {n_samples} rows have the scores of an earlier row of their "
                f"prompt; without a column {SAMPLE_INDEX!r} a response that was drawn twice cannot be told from a row "
                "that was written twice, and each row counts"
            )
            return [note]
        keys = [
            (int(prompt), index)
            for part in parts
            if part.sample_index_e is not None
            for prompt, index in zip(part.prompt_e, part.sample_index_e.tolist(), strict=True)
        ][:_EXAMPLES]
        names = self._prompt_names(np.array([prompt for prompt, _ in keys], dtype=np.uint64))
        shown = ", ".join(f"{names[prompt]!r} {index}" for prompt, index in keys)
        key = "its place in the lists" if self.has_lists else repr(SAMPLE_INDEX)
        raise InputError(
            f"{self.source.name}: {n_repeated} rows are of responses that are there before (by {self.prompt_id!r} and "
            f"{key}: {shown}); a response counts once"
        )

    def chunks(self) -> Iterator[ScoreChunk]:
        """The rows in the table's order, checked.

        Raises:
            InputError: an empty id, or a score that is empty, NaN or infinite; names column and row.
        """
        done = 0
        rows_at_once = max(1, _CHUNK_ROWS * self.source.n_rows // max(self.n_responses, 1))
        for batch in self.source.batches(self._columns, rows_at_once=rows_at_once):
            if not batch.num_rows:
                continue
            try:
                yield self._read(batch, done)
            except UnicodeDecodeError as error:
                raise InputError(f"{self.source.place(done)}: a text is not UTF-8 ({error})") from error
            done += batch.num_rows

    @property
    def _columns(self) -> list[str]:
        optional = [name for name in OPTIONAL if name in self.source.schema.names]
        return list(dict.fromkeys([self.prompt_id, *self.scores, *self.labels, *optional]))

    def _require_names(self) -> None:
        for what, name in (("the prompt's id", self.prompt_id), ("the reward", self.scores[0])):
            check_name(name, what=f"{what} is")
        if self.prompt_id in _OF_THE_WEIGHTS:
            raise InputError(
                f"the prompt's id is the column {self.prompt_id!r}: weights.parquet has columns "
                f"{', '.join(_OF_THE_WEIGHTS)} of its own; rename the column"
            )
        if self.prompt_id in self.scores:
            raise InputError(f"the prompt's id is {self.prompt_id!r}, which is a score too; an id is no score")

    def _prompt_names(self, wanted_e: np.ndarray) -> dict[int, Any]:
        """The ids, as the table has them, of some prompts."""
        names: dict[int, Any] = {}
        for batch in self.source.batches([self.prompt_id], rows_at_once=_CHUNK_ROWS):
            ids = batch.column(0)
            hashed = _hash_ids(ids)
            for place in np.flatnonzero(np.isin(hashed, wanted_e)):
                names.setdefault(int(hashed[place]), ids[int(place)].as_py())
            if len(names) == len(set(wanted_e.tolist())):
                break
        return names

    def _indices(self, column: pa.Array, row: int) -> np.ndarray:
        try:
            return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.source.place(row)}: column {SAMPLE_INDEX!r}: {error}") from error

    def _read(self, batch: pa.RecordBatch, done: int) -> ScoreChunk:
        ids = batch.column(self.prompt_id)
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        row_n = index_n = done + np.arange(batch.num_rows)
        self._require_whole(ids, self.prompt_id, row_n)
        split = batch.column(SPLIT) if self.has_split else None
        if SAMPLE_INDEX in batch.schema.names:
            self._require_whole(batch.column(SAMPLE_INDEX), SAMPLE_INDEX, row_n)
            index_n = self._indices(batch.column(SAMPLE_INDEX), done)
        columns = [batch.column(name) for name in self.scores]
        labels = {name: self._texts(batch.column(name), name, row_n) for name in self.labels}
        if self.has_lists:
            parents = self._list_parents(columns, row_n)
            row_n = row_n[parents]
            starts = np.flatnonzero(np.diff(parents, prepend=-1))
            index_n = np.arange(len(parents)) - np.repeat(starts, np.diff(np.append(starts, len(parents))))
            ids = ids.take(pa.array(parents))
            split = split.take(pa.array(parents)) if split is not None else None
            labels = {name: values_n[parents] for name, values_n in labels.items()}
            columns = [column.flatten() for column in columns]
        values = [self._numbers(column, name, row_n) for column, name in zip(columns, self.scores, strict=True)]
        return ScoreChunk(
            prompt_n=_hash_ids(ids),
            prompt_id_n=ids,
            sample_index_n=np.asarray(index_n, dtype=np.int64),
            row_n=row_n,
            scores_ns=np.stack(values, axis=1),
            split_n=None if split is None else np.asarray(split.to_pylist(), dtype=object),
            labels=labels,
            score_names=self.scores,
        )

    def _list_parents(self, columns: Sequence[pa.Array], row_n: np.ndarray) -> np.ndarray:
        for column, name in zip(columns, self.scores, strict=True):
            self._require_whole(column, name, row_n)
        lengths = [pc.list_value_length(column).to_numpy() for column in columns]
        for length, name in zip(lengths, self.scores, strict=True):
            wrong = np.flatnonzero((length != lengths[0]) | (length == 0))
            if len(wrong):
                raise InputError(
                    f"{self.source.place(row_n[wrong[0]])}: row {row_n[wrong[0]]} has {length[wrong[0]]} scores in "
                    f"{name!r} and {lengths[0][wrong[0]]} in {self.scores[0]!r}; a prompt needs one of each for "
                    "every response"
                )
        return np.asarray(pc.list_parent_indices(columns[0]).to_numpy())

    def _texts(self, column: pa.Array, name: str, row_n: np.ndarray) -> np.ndarray:
        """Values of a column as texts; each is there."""
        self._require_whole(column, name, row_n)
        return np.asarray(column.cast(pa.string()).to_pylist(), dtype=object)

    def _numbers(self, column: pa.Array, name: str, row_n: np.ndarray) -> np.ndarray:
        """Values of a column whose rows have these numbers in the table."""
        self._require_whole(column, name, row_n)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_integer(column.type) and column.type.bit_width == 64:
            whole_n = column.to_numpy()
            wrong = np.flatnonzero((whole_n > _LARGEST_WHOLE) | (whole_n < -_LARGEST_WHOLE))
            if len(wrong):
                raise InputError(
                    f"{self.source.place(row_n[wrong[0]])}: column {name!r} has {len(wrong)} whole numbers beyond "
                    f"2^53 (row {row_n[wrong[0]]}: {whole_n[wrong[0]]}), which float64 does not tell apart"
                )
        values = np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            shown = ", ".join(f"row {row_n[place]}: {values[place]}" for place in wrong[:3])
            raise InputError(
                f"{self.source.place(row_n[wrong[0]])}: column {name!r} has {len(wrong)} values that are not finite "
                f"({shown})"
            )
        return values

    def _require_whole(self, column: pa.Array, name: str, row_n: np.ndarray) -> None:
        if column.null_count:
            rows = row_n[np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False))[:3]].tolist()
            raise InputError(
                f"{self.source.place(rows[0])}: column {name!r} has {column.null_count} empty values (first rows: "
                f"{rows})"
            )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _hash_ids(ids: pa.Array) -> np.ndarray:
    """64-bit ids: integers as they are, anything else by a hash of its text.

    Two of a million prompts collide with a probability of 3e-8.
    """
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.to_numpy(zero_copy_only=False)).astype(np.int64).view(np.uint64)
    codes = ids.dictionary_encode()
    texts = codes.dictionary.to_pylist()
    hashed = [int.from_bytes(hashlib.blake2b(str(text).encode(), digest_size=8).digest(), "little") for text in texts]
    hashed_d = np.array(hashed, dtype=np.uint64)
    return np.asarray(hashed_d[codes.indices.to_numpy()])
