"""Scores that are there already, in a column of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.contracts.artifacts import content_sha256, file_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import SAMPLES
from pipeline.scorers.kind import Check, ScorerBase, affine_of
from pipeline.scorers.models import Models
from stage1_dual.scoring.column import ColumnScorer, require_numbers


class ColumnSettings(ScorerBase):
    """Scores that are there already."""

    kind: Literal["column"]
    column: str
    table: str | None = None
    """Parquet, CSV or JSON Lines; a column of the samples table where not given."""


def check_column(settings: ColumnSettings, models: Models) -> Iterator[Check]:
    del models
    if settings.table is not None:
        yield partial(ColumnScorer, settings.column, table=settings.table)
    else:
        yield partial(_check_sample_column, settings.column)


def _check_sample_column(column: str) -> None:
    if column not in SAMPLES.names:
        raise InputError(f"`column` is {column!r}; the samples have the columns {SAMPLES.names}; or give a `table`")
    require_numbers(SAMPLES.field(column), where="the samples")


def column_identity(settings: ColumnSettings, models: Models) -> str:
    del models
    return content_sha256("samples") if settings.table is None else file_sha256(Path(settings.table))


def start_column(settings: Sequence[ColumnSettings], models: Models) -> Callable[..., ColumnScorer]:
    del models
    one = settings[0]
    table = None if one.table is None else str(Path(one.table).resolve())
    return partial(ColumnScorer, one.column, table=table, affine=affine_of(one))
