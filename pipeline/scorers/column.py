"""Scores that are there already, in a column of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

from pipeline.contracts.artifacts import content_sha256, file_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import SAMPLES
from pipeline.scorers.kind import Check, ScorerSettings
from pipeline.scorers.models import Models
from stage1_dual.scoring.column import ColumnScorer, require_numbers


class ColumnSettings(ScorerSettings):
    """Scores that are there already."""

    not_identity: ClassVar = frozenset({"table"})
    uses_device: ClassVar = False
    scores_any_response: ClassVar = False

    kind: Literal["column"]
    column: str
    table: str | None = None
    """Parquet, CSV or JSON Lines; a column of the samples table where not given."""

    def reads(self) -> tuple[str, ...]:
        """The column, where it is one of the samples table."""
        return (self.column,) if self.table is None else ()

    def check(self, models: Models) -> Iterator[Check]:
        """The table and its column."""
        del models
        if self.table is not None:
            yield partial(ColumnScorer, self.column, table=self.table)
        else:
            yield partial(_check_sample_column, self.column)

    def identity(self, models: Models) -> str:
        """Of the table."""
        del models
        return content_sha256("samples") if self.table is None else file_sha256(Path(self.table))

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., ColumnScorer]:
        """One scorer a pass."""
        del models
        (one,) = scorers
        table = None if one.table is None else str(Path(one.table).resolve())
        return partial(ColumnScorer, one.column, table=table, affine=one.affine)


def _check_sample_column(column: str) -> None:
    if column not in SAMPLES.names:
        raise InputError(f"`column` is {column!r}; the samples have the columns {SAMPLES.names}; or give a `table`")
    require_numbers(SAMPLES.field(column), where="the samples")
