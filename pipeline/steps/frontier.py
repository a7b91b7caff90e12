"""``dualign frontier``: the dual of any table of scores, solved for ranges of thresholds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    MAX_FRONTIER_POINTS,
    Constraint,
    holds_range,
    read_constraint_range,
)
from pipeline.dual.from_table import TableRequest, read_splits
from pipeline.dual.solving import build_problem_on_samples
from pipeline.dual.sweep import solve_points


@dataclass(frozen=True)
class ThresholdGrid:
    """Constraints of which some come with several thresholds.

    Attributes:
        families: for each of the m constraints, the one or more to take it at.
        swept: places of those that were given as a range.
    """

    families: tuple[tuple[Constraint, ...], ...]
    swept: tuple[int, ...]

    @property
    def first(self) -> tuple[Constraint, ...]:
        """Each constraint at its first threshold."""
        return tuple(family[0] for family in self.families)


def read_grid(texts: Sequence[str]) -> ThresholdGrid:
    """Read constraints of which some hold a range ``start:stop:step`` in place of the number.

    Raises:
        InputError: none holds a range, a text or a range has another form, or there are too many points.
    """
    swept = tuple(place for place, text in enumerate(texts) if holds_range(text))
    if not swept:
        raise InputError(
            f"none of the constraints {list(texts)} holds a range; a frontier needs one of the form "
            "'NAME >= ref + START:STOP:STEP'"
        )
    families = tuple(map(read_constraint_range, texts))
    n_points = math.prod(map(len, families))
    if n_points > MAX_FRONTIER_POINTS:
        raise InputError(
            f"the ranges of the constraints have {n_points} combinations; a frontier has at most "
            f"{MAX_FRONTIER_POINTS} points: take longer steps"
        )
    return ThresholdGrid(families, swept)


def solve_grid(request: TableRequest, grid: ThresholdGrid, *, scratch: Path) -> pa.Table:
    """Solve for every combination of thresholds; infeasible ones are marked, not dropped.

    Args:
        request: what to solve on which table, the constraints at their first thresholds.
        grid: all thresholds.
        scratch: an empty folder for scores that do not fit in memory.

    Returns:
        The rows of ``frontier.parquet``.

    Raises:
        InputError: as :func:`pipeline.dual.from_table.solve_table`.
    """
    splits, _ = read_splits(request.open_table(), request, scratch=scratch)
    problem = build_problem_on_samples(splits["train"].scores, constraints=grid.first, beta=request.beta)
    return solve_points(problem, list(itertools.product(*grid.families)), swept=grid.swept)
