"""Tables of scores from anywhere: one row a response, or one row a prompt with lists, read in chunks."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.artifacts import file_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import check_name
from pipeline.contracts.section import nearest
from pipeline.contracts.table_files import FoundTable, find_table
from pipeline.dual.table_shards import Shard, is_list, open_shard
from stage1_dual.dual import GroupedSamples

_SPLIT = "split"
_SAMPLE_INDEX = "sample_index"
# The columns of weights.parquet besides the prompt's id.
_OF_THE_WEIGHTS = (_SAMPLE_INDEX, "weight", _SPLIT)
# Responses of a chunk: some ten megabytes of scores.
_CHUNK_ROWS = 500_000
# Beyond this, neighbouring whole numbers are one number of float64.
_LARGEST_WHOLE = 2**53
# How writers name the files of a split.
_SPLIT_NAME = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./0-9]|$)", re.IGNORECASE)
_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class ScoreChunk:
    """Some rows of a table, one a response.

    Attributes:
        prompt_n: 64-bit id of the prompt, shape (n,).
        prompt_id_n: the prompt's id as the table has it.
        sample_index_n: the table's ``sample_index``, the place in a list, or the number of the row in the table.
        scores_ns: score columns in the order asked for, in their own directions, shape (n, s).
        split_n: the row's split, or None where the table has none.
    """

    prompt_n: np.ndarray
    prompt_id_n: pa.Array
    sample_index_n: np.ndarray
    scores_ns: np.ndarray
    split_n: np.ndarray | None


@dataclass(frozen=True)
class ScoreTable:
    """A file of scores (Parquet, CSV or JSON Lines), or a folder of such files.

    Attributes:
        path: the file or folder.
        prompt_id: column that says which prompt a row answers: strings or integers.
        scores: score columns, numbers or, with one row a prompt, lists of numbers.
    """

    path: Path
    prompt_id: str
    scores: tuple[str, ...]

    def require_columns(self) -> None:
        """Check what can be checked without reading rows of Parquet.

        Raises:
            InputError: no such file, one that cannot be read, no rows, a column that is missing, of the wrong type or
                of another type in another file, a name that the results cannot have, or files of several splits
                without a column that says so.
        """
        self._require_names()
        for shard in self._shards:
            for name in (self.prompt_id, *self.scores):
                if name not in shard.names:
                    raise InputError(f"{shard.path} has no column {name!r}{nearest(name, shard.names)}")
        self._require_equal_types()
        kind = self.prompt_type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
            raise InputError(
                f"{self._place()}: column {self.prompt_id!r} is of type {kind}; an id must be text or an integer"
            )
        names = self._schema.names
        if _SAMPLE_INDEX in names and not pa.types.is_integer(kind := self._schema.field(_SAMPLE_INDEX).type):
            raise InputError(f"{self._place()}: column {_SAMPLE_INDEX!r} is of type {kind}; it must be an integer")
        if self.has_split and not pa.types.is_string(kind := self._schema.field(_SPLIT).type):
            raise InputError(f"{self._place()}: column {_SPLIT!r} is of type {kind}; a split is a text")
        kinds = {name: self._schema.field(name).type for name in self.scores}
        for name, kind in kinds.items():
            number = kind.value_type if is_list(kind) else kind
            if not (pa.types.is_floating(number) or pa.types.is_integer(number) or pa.types.is_decimal(number)):
                raise InputError(f"{self._place()}: column {name!r} is of type {kind}; a score must be a number")
        listed = [name for name, kind in kinds.items() if is_list(kind)]
        if listed and len(listed) < len(kinds):
            single = next(name for name in kinds if name not in listed)
            raise InputError(
                f"{self._place()}: column {listed[0]!r} holds lists and {single!r} numbers; give one row a response "
                "with numbers, or one row a prompt with lists"
            )
        if listed and _SAMPLE_INDEX in names:
            raise InputError(
                f"{self._place()}: column {_SAMPLE_INDEX!r} beside lists of scores: with one row a prompt, a "
                "response's index is its place in the lists"
            )
        if self.n_responses == 0:
            raise InputError(f"{self._place()} has no rows")
        self._require_one_split_of_files()
        self._require_different_files()

    @cached_property
    def n_responses(self) -> int:
        """Responses in the table, from its footers."""
        return sum(shard.n_responses for shard in self._shards)

    @property
    def has_split(self) -> bool:
        """Whether the table has a column ``split``."""
        return _SPLIT in self._schema.names

    @property
    def has_lists(self) -> bool:
        """Whether a row is a prompt and its scores are lists."""
        return is_list(self._schema.field(self.scores[0]).type)

    @property
    def has_sample_index(self) -> bool:
        """Whether the table says which response of its prompt a row is."""
        return self.has_lists or _SAMPLE_INDEX in self._schema.names

    @property
    def prompt_type(self) -> pa.DataType:
        """Type of the prompt ids as they are written back."""
        return self._schema.field(self.prompt_id).type

    def identity(self) -> dict[str, str]:
        """sha256 of each file by its name."""
        return {self._name(shard): file_sha256(shard.path) for shard in self._shards}

    def split_counts(self) -> Mapping[str, int]:
        """Rows of each split, in the order of their names.

        Raises:
            InputError: a row without a split; names the first ones.
        """
        counts: dict[str, int] = {}
        done = 0
        for shard in self._shards:
            for batch in shard.batches([_SPLIT], rows_at_once=_CHUNK_ROWS):
                self._require_whole(batch.column(0), _SPLIT, done + np.arange(batch.num_rows), shard)
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
        if self._found.left_out:
            shown = ", ".join(map(repr, self._found.left_out[:_EXAMPLES]))
            notes.append(f"{self.path}: {len(self._found.left_out)} names are not read as data ({shown})")
        if self.has_split:
            counts = self.split_counts()
            if splits[0] not in counts:
                raise InputError(
                    f"{self.path} has a column `split`, but no row of the split {splits[0]!r}; its splits are "
                    f"{', '.join(map(repr, counts))}"
                )
            notes += [
                f"{self.path}: {count} rows of the split {split!r} are left out; {' and '.join(splits)} are read"
                for split, count in counts.items()
                if split not in splits
            ]
        return notes

    def require_distinct(self, found: Mapping[str, GroupedSamples]) -> list[str]:
        """Check the keys of the rows that were read: a response counts once, and a prompt is in one split.

        Returns:
            What cannot be told of a table whose rows have no key.

        Raises:
            InputError: a key occurs twice, or a prompt is in two splits; says how many and names the first ones.
        """
        if len(found) == 2:
            one, other = found.values()
            both = np.intersect1d(one.prompt_p, other.prompt_p)
            if len(both):
                first, second = found
                raise InputError(
                    f"{self.path}: {len(both)} prompts are in both splits, {first} and {second} "
                    f"(column {self.prompt_id!r}: {self._prompts_shown(both)}); a prompt is in one of them, or the "
                    "other says nothing of new prompts"
                )
        parts = [group.repeated for group in found.values()]
        n_repeated = sum(part.n_rows for part in parts)
        if not n_repeated:
            return []
        if not self.has_sample_index:
            return [
                f"{self.path}: {n_repeated} of {sum(g.scores.facts.n_samples for g in found.values())} rows have the "
                "scores of an earlier row of their prompt; without a column `sample_index` a response that was drawn "
                "twice cannot be told from a row that was written twice, and each row counts"
            ]
        keys = [
            (prompt, index)
            for part in parts
            if part.sample_index_e is not None
            for prompt, index in zip(part.prompt_e, part.sample_index_e.tolist(), strict=True)
        ][:_EXAMPLES]
        names = self._prompt_names(np.array([prompt for prompt, _ in keys], dtype=np.uint64))
        shown = ", ".join(f"{names[int(prompt)]!r} {index}" for prompt, index in keys)
        key = f"{self.prompt_id!r} and its place in the lists" if self.has_lists else f"{self.prompt_id!r}, 'sample_index'"
        raise InputError(
            f"{self.path}: {n_repeated} rows are of responses that are there before ({key}: {shown}); "
            "a response counts once"
        )

    def chunks(self) -> Iterator[ScoreChunk]:
        """The rows in the table's order, checked.

        Raises:
            InputError: an empty id, or a score that is empty, NaN or infinite; names column and row.
        """
        names = self._schema.names
        n_rows = sum(shard.n_rows for shard in self._shards)
        rows_at_once = max(1, _CHUNK_ROWS * n_rows // max(self.n_responses, 1))
        done = 0
        for shard in self._shards:
            for batch in shard.batches(names, rows_at_once=rows_at_once):
                if not batch.num_rows:
                    continue
                try:
                    yield self._read(batch, done, shard)
                except UnicodeDecodeError as error:
                    raise InputError(f"{self._place(shard)}: a text is not UTF-8 ({error})") from error
                done += batch.num_rows

    @cached_property
    def _found(self) -> FoundTable:
        return find_table(self.path, what="--table")

    @cached_property
    def _shards(self) -> tuple[Shard, ...]:
        """Open files: their columns are known, the rows of Parquet are not."""
        wanted = tuple(dict.fromkeys((self.prompt_id, *self.scores, _SPLIT, _SAMPLE_INDEX)))
        texts = tuple(name for name in (self.prompt_id, _SPLIT) if name not in self.scores)
        return tuple(
            open_shard(file, self._found, columns=wanted, texts=texts, integers=(_SAMPLE_INDEX,))
            for file in self._found.files
        )

    @cached_property
    def _schema(self) -> pa.Schema:
        return self._shards[0].schema

    def _require_names(self) -> None:
        for option, name in (("--prompt-id", self.prompt_id), ("--reward", self.scores[0])):
            check_name(name, what=option)
        if self.prompt_id in _OF_THE_WEIGHTS:
            raise InputError(
                f"--prompt-id is {self.prompt_id!r}: weights.parquet has columns {', '.join(_OF_THE_WEIGHTS)} of its "
                "own; rename the column"
            )
        if self.prompt_id in self.scores:
            raise InputError(f"--prompt-id is {self.prompt_id!r}, which is a score too; an id is no score")
        if self.scores[0] in self.scores[1:]:
            raise InputError(f"--reward is {self.scores[0]!r}, which a constraint bounds; a constraint bounds another")

    def _require_equal_types(self) -> None:
        first = self._shards[0]
        for shard in self._shards[1:]:
            for name in (*self._schema.names, *shard.schema.names):
                lacking = next((one for one in (first, shard) if name not in one.schema.names), None)
                if lacking is not None:
                    having = shard if lacking is first else first
                    raise InputError(
                        f"--table {self.path}: {lacking.path} has no column {name!r}, and {having.path} has; the files "
                        "of a table have the same columns"
                    )
                kinds = [one.schema.field(name).type for one in (first, shard)]
                if kinds[0] != kinds[1]:
                    raise InputError(
                        f"--table {self.path}: column {name!r} is of type {kinds[0]} in {first.path} and {kinds[1]} "
                        f"in {shard.path}; a column has one type in all files of a table"
                    )

    def _require_one_split_of_files(self) -> None:
        """Without a column that says it, names may be all there is of a split: they are not read, nor passed over."""
        if self.has_split:
            return
        named: dict[str, Path] = {}
        for shard in self._shards:
            match = _SPLIT_NAME.search(self._name(shard))
            if match is not None and self.path.is_dir():
                named.setdefault(match[1].lower(), shard.path)
        if len(named) > 1:
            shown = ", ".join(path.name for path in named.values())
            raise InputError(
                f"--table {self.path} has files named after several splits ({shown}) and no column `split`: give it "
                "one, or the files of one split alone"
            )

    def _require_different_files(self) -> None:
        """Two files with the same bytes are one file that was copied."""
        known: dict[tuple[int, str], Path] = {}
        sizes = [shard.path.stat().st_size for shard in self._shards]
        frequent = Counter(sizes)
        for shard, size in zip(self._shards, sizes, strict=True):
            if frequent[size] > 1 and not shard.partition:
                path = known.setdefault((size, file_sha256(shard.path)), shard.path)
                if path != shard.path:
                    raise InputError(f"--table {self.path}: {shard.path} is a copy of {path}; its rows would count twice")

    def _name(self, shard: Shard) -> str:
        return shard.path.name if shard.path == self.path else str(shard.path.relative_to(self.path))

    def _place(self, shard: Shard | None = None) -> str:
        """What a message names: the table, and the file where it has several."""
        if len(self._shards) == 1 and self.path.is_dir():
            shard = self._shards[0]
        return str(self.path) if shard is None or shard.path == self.path else f"{self.path}: {self._name(shard)}"

    def _prompt_names(self, wanted_e: np.ndarray) -> dict[int, Any]:
        """The ids, as the table has them, of some prompts."""
        names: dict[int, Any] = {}
        for shard in self._shards:
            for batch in shard.batches([self.prompt_id], rows_at_once=_CHUNK_ROWS):
                ids = batch.column(0)
                hashed = _hash_ids(ids)
                for place in np.flatnonzero(np.isin(hashed, wanted_e)):
                    names.setdefault(int(hashed[place]), ids[int(place)].as_py())
                if len(names) == len(set(wanted_e.tolist())):
                    return names
        return names

    def _prompts_shown(self, prompt_p: np.ndarray) -> str:
        return ", ".join(map(repr, self._prompt_names(prompt_p[:_EXAMPLES]).values()))

    def _read(self, batch: pa.RecordBatch, done: int, shard: Shard) -> ScoreChunk:
        ids = batch.column(self.prompt_id)
        row_n = index_n = done + np.arange(batch.num_rows)
        self._require_whole(ids, self.prompt_id, row_n, shard)
        split = batch.column(_SPLIT) if self.has_split else None
        if _SAMPLE_INDEX in batch.schema.names:
            self._require_whole(batch.column(_SAMPLE_INDEX), _SAMPLE_INDEX, row_n, shard)
            index_n = self._indices(batch.column(_SAMPLE_INDEX), shard)
        columns = [batch.column(name) for name in self.scores]
        if self.has_lists:
            parents = self._list_parents(columns, row_n, shard)
            row_n = row_n[parents]
            starts = np.flatnonzero(np.diff(parents, prepend=-1))
            index_n = np.arange(len(parents)) - np.repeat(starts, np.diff(np.append(starts, len(parents))))
            ids = ids.take(pa.array(parents))
            split = split.take(pa.array(parents)) if split is not None else None
            columns = [column.flatten() for column in columns]
        values = [
            self._numbers(column, name, row_n, shard) for column, name in zip(columns, self.scores, strict=True)
        ]
        return ScoreChunk(
            prompt_n=_hash_ids(ids),
            prompt_id_n=ids,
            sample_index_n=np.asarray(index_n, dtype=np.int64),
            scores_ns=np.stack(values, axis=1),
            split_n=None if split is None else np.asarray(split.to_pylist(), dtype=object),
        )

    def _list_parents(self, columns: Sequence[pa.Array], row_n: np.ndarray, shard: Shard) -> np.ndarray:
        for column, name in zip(columns, self.scores, strict=True):
            self._require_whole(column, name, row_n, shard)
        lengths = [pc.list_value_length(column).to_numpy() for column in columns]
        for length, name in zip(lengths, self.scores, strict=True):
            wrong = np.flatnonzero((length != lengths[0]) | (length == 0))
            if len(wrong):
                raise InputError(
                    f"{self._place(shard)}: row {row_n[wrong[0]]} has {length[wrong[0]]} scores in {name!r} and "
                    f"{lengths[0][wrong[0]]} in {self.scores[0]!r}; a prompt needs one of each for every response"
                )
        return np.asarray(pc.list_parent_indices(columns[0]).to_numpy())

    def _numbers(self, column: pa.Array, name: str, row_n: np.ndarray, shard: Shard) -> np.ndarray:
        """Values of a column whose rows have these numbers in the table."""
        self._require_whole(column, name, row_n, shard)
        if pa.types.is_integer(column.type) and column.type.bit_width == 64:
            whole_n = column.to_numpy()
            wrong = np.flatnonzero((whole_n > _LARGEST_WHOLE) | (whole_n < -_LARGEST_WHOLE))
            if len(wrong):
                raise InputError(
                    f"{self._place(shard)}: column {name!r} has {len(wrong)} whole numbers beyond 2^53 (row "
                    f"{row_n[wrong[0]]}: {whole_n[wrong[0]]}), which float64 does not tell apart"
                )
        values = np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            shown = ", ".join(f"row {row_n[place]}: {values[place]}" for place in wrong[:3])
            raise InputError(
                f"{self._place(shard)}: column {name!r} has {len(wrong)} values that are not finite ({shown})"
            )
        return values

    def _indices(self, column: pa.Array, shard: Shard) -> np.ndarray:
        try:
            return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
        except pa.ArrowInvalid as error:
            raise InputError(f"{self._place(shard)}: column {_SAMPLE_INDEX!r}: {error}") from error

    def _require_whole(self, column: pa.Array, name: str, row_n: np.ndarray, shard: Shard) -> None:
        if column.null_count:
            rows = row_n[np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False))[:3]].tolist()
            raise InputError(
                f"{self._place(shard)}: column {name!r} has {column.null_count} empty values (first rows: {rows})"
            )


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
