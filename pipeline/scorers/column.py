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
    """Name of the column with the scores."""
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

    def check_new_responses(self) -> None:
        """By their texts alone: a number of a sample says nothing of the response that another policy gives there."""
        if self.table is None:
            fault = (
                f"the column {self.column!r} of the samples says who drew a response and how, which is not a score of "
                "the response that two policies could be compared by"
            )
        elif "completion" in ColumnScorer(self.column, table=self.table).keys:
            return
        else:
            fault = f"{self.table} knows responses by `sample_index` alone, and has those of the reference's samples"
        raise InputError(
            f"{fault}: it has no scores of the responses of a trained policy. Use a scorer that computes them; or a "
            "`table` that knows responses by `completion`, to which you add the policy's: `dualign evaluate` draws "
            "them into evaluation/samples, stops while they have no rows in it, and goes on once they have. Without "
            "either, `dualign stage1` and `dualign train` give the policy, unevaluated"
        )

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
