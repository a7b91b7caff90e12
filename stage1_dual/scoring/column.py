"""Scores that are there already: columns of a table of the user's, or of the samples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import prompt_id as id_of_prompt
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.python_function import row_sha256
from stage1_dual.scoring.user_tables import read_columns

PROMPT_KEYS = ("prompt_id", "prompt")
SAMPLE_KEYS = ("sample_index", "completion")


class ColumnScorer:
    """Looks scores up in a column of the samples or of a table.

    Without a table the numbers are a column of the samples (``ScoreRequest.columns``). A table has a row for each
    sample: its prompt by ``prompt_id`` or else by ``prompt`` (a text, that of the prompt's last message, or a list of
    messages), and the sample by ``sample_index``, ``completion`` or both. A sample that is not in it, or has no
    number there, fails; one whose ``completion`` is another one there is not in it. ``scored_sha256`` is that of
    prompt and completion.

    Args:
        column: name of the column of numbers.
        table: a Parquet, CSV or JSON Lines file; held in memory, some 300 bytes a row.
        affine: from its numbers to the user's units.

    Raises:
        InputError: the table or the column is not there, is not of numbers, or has two rows for one sample.
    """

    def __init__(self, column: str, *, table: str | None = None, affine: Affine = Affine()) -> None:  # noqa: B008
        self._column, self._table, self._affine = column, table, affine
        self._prompt_key, self._sample_keys = "prompt_id", ("sample_index",)
        self._values: dict[Hashable, float | None] = {}
        if table is not None:
            found = read_score_table(Path(table), column)
            self._prompt_key, *sample_keys, _ = found.column_names
            self._sample_keys = tuple(sample_keys)
            self._values = _index(found, table)

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns that a sample is known by."""
        return (self._prompt_key, *self._sample_keys)

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows."""
        return [self._score(row) for row in rows]

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer, JSON-serialisable."""
        return {
            "scorer": "column",
            "model": self._table if self._table is not None else "samples",
            "key": list(self.keys),
            "outputs": [{"column": self._column, "affine": asdict(self._affine)}],
        }

    def close(self) -> None:
        """Free the table."""
        self._values = {}

    def _score(self, row: ScoreRequest) -> Score | RowFailure:
        value: Any
        if self._table is None:
            value = row.columns.get(self._column)
        else:
            key = next((key for key in self._keys(row) if key in self._values), None)
            if key is None:
                return RowFailure(f"{self._table} has no row of this {' and '.join(self.keys)}")
            value = self._values[key]
        if value is None or not math.isfinite(value):
            return RowFailure(f"the column {self._column!r} is {value} there")
        return Score((self._affine.apply(float(value)),), row_sha256(row), truncated=False)

    def _keys(self, row: ScoreRequest) -> list[Hashable]:
        sample = tuple(getattr(row, name) for name in self._sample_keys)
        if self._prompt_key == "prompt_id":
            return [(row.prompt_id, *sample)]
        return [(_Text(row.messages[-1]["content"]), *sample), (row.prompt_id, *sample)]


@dataclass(frozen=True)
class _Text:
    """A prompt known by its text, which is no prompt_id."""

    text: str


def read_score_table(path: Path, column: str) -> pa.Table:
    """The key columns and the score column of a table of scores: prompt, sample by one or two columns, score.

    Raises:
        InputError: a column is missing or is not of numbers.
    """
    table = read_columns(path, setting="table")
    keys = []
    for choice in (PROMPT_KEYS, SAMPLE_KEYS):
        known = [name for name in choice if name in table.column_names]
        if not known:
            raise InputError(
                f"`table` {path} has neither {' nor '.join(choice)}; its columns are {table.column_names}"
            )
        keys += known[:1] if choice is PROMPT_KEYS else known
    if column not in table.column_names:
        raise InputError(f"`column` is {column!r}; {path} has the columns {table.column_names}")
    require_numbers(table.schema.field(column), where=f"`table` {path}")
    return table.select([*keys, column])


def require_numbers(field: pa.Field, *, where: str) -> None:
    """Raise InputError where a column does not hold numbers."""
    kind = field.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{where}: the column {field.name!r} holds {kind}; a score is a number")


def _index(table: pa.Table, name: str) -> dict[Hashable, float | None]:
    values: dict[Hashable, float | None] = {}
    repeated: list[int] = []
    is_id = table.column_names[0] == "prompt_id"
    columns = [column.to_pylist() for column in table.columns]
    for number, (prompt, *sample, value) in enumerate(zip(*columns, strict=True)):
        key = (_prompt_key(prompt, is_id=is_id), *sample)
        if key in values:
            repeated.append(number)
        values[key] = value
    if repeated:
        raise InputError(
            f"`table` {name} has {len(repeated)} rows for samples it had before (first: row {repeated[0]}); "
            "one row a sample is the rule"
        )
    return values


def _prompt_key(prompt: Any, *, is_id: bool) -> Hashable:
    if isinstance(prompt, list):
        return id_of_prompt(prompt)
    return str(prompt) if is_id else _Text(str(prompt))
