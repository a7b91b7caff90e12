"""Scores that are there already: columns of a table of the user's, or of the samples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.contracts.errors import InputError
from pipeline.contracts.messages import plain_messages
from pipeline.contracts.table_rows import TableRows, integer_in, number_in
from pipeline.contracts.tables import prompt_id as id_of_prompt
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.python_function import row_sha256
from stage1_dual.scoring.user_tables import open_table

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
        self._prompt_key = "prompt_id"
        self._sample_keys: tuple[str, ...] = ("sample_index",)
        self._values: dict[Hashable, float | None] = {}
        if table is not None:
            found = open_table(Path(table), setting="table")
            self._prompt_key, *sample_keys = _keys(found, column, table)
            self._sample_keys = tuple(sample_keys)
            self._values = _index(found, self.keys, column, table)

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


def _keys(table: TableRows, column: str, name: str) -> list[str]:
    """The columns that say whose score a row is, the prompt's first, of a table that has the score column too."""
    keys = []
    for choice in (PROMPT_KEYS, SAMPLE_KEYS):
        known = [key for key in choice if key in table.names]
        if not known:
            raise InputError(f"`table` {name} has neither {' nor '.join(choice)}; its columns are {table.names}")
        keys += known[:1] if choice is PROMPT_KEYS else known
    if column not in table.names:
        raise InputError(f"`column` is {column!r}; {name} has the columns {table.names}")
    if table.schema is not None:
        require_numbers(table.schema.field(column), where=f"`table` {name}")
    return keys


def require_numbers(field: pa.Field, *, where: str) -> None:
    """Raise InputError where a column does not hold numbers."""
    kind = field.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{where}: the column {field.name!r} holds {kind}; a score is a number")


def _index(table: TableRows, keys: Sequence[str], column: str, name: str) -> dict[Hashable, float | None]:
    values: dict[Hashable, float | None] = {}
    repeated: list[int] = []
    prompt_key, *sample_keys = keys
    for number, row in enumerate(table.rows((*keys, column))):
        where = f"`table` {name}, row {number}"
        place = f"{where}: the column"
        sample, value = [row[part] for part in sample_keys], row[column]
        if table.is_text:
            value = _number(value, place=f"{place} {column!r}")
            sample = [
                integer_in(text, place=f"{place} {key!r}") if key == "sample_index" else text
                for key, text in zip(sample_keys, sample, strict=True)
            ]
        elif value is not None and not isinstance(value, int | float):
            raise InputError(f"{place} {column!r} holds {str(value)[:60]!r}; a score is a number")
        key = (_prompt_key(row[prompt_key], is_id=prompt_key == "prompt_id", place=where), *sample)
        if key in values:
            repeated.append(number)
        values[key] = value
    if repeated:
        raise InputError(
            f"`table` {name} has {len(repeated)} rows for samples it had before (first: row {repeated[0]}); "
            "one row a sample is the rule"
        )
    return values


def _number(text: str, *, place: str) -> float | None:
    """A score of a CSV file; annotations are often yes or no."""
    answer = {"true": 1.0, "false": 0.0}.get(text.strip().lower())
    return number_in(text, place=place) if answer is None else answer


def _prompt_key(prompt: Any, *, is_id: bool, place: str) -> Hashable:
    if isinstance(prompt, list):
        return id_of_prompt(plain_messages(prompt, place=place))
    return str(prompt) if is_id else _Text(str(prompt))
