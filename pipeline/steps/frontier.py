"""``dualign frontier``: the dual of any table of scores, solved for ranges of thresholds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from pipeline.contracts.constraint_text import hold_ranges, read_constraint_families
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import MAX_FRONTIER_POINTS, Constraint
from pipeline.dual.from_table import TableRequest, read_splits
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
    families = read_constraint_families(texts)
    ranged = [is_range for text in texts for is_range in hold_ranges(text)]
    swept = tuple(place for place, is_range in enumerate(ranged) if is_range)
    if not swept:
        raise InputError(
            f"none of the constraints {list(texts)} holds a range; a frontier needs one of the form "
            "'NAME >= ref + START:STOP:STEP'"
        )
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
    posed = splits["train"].posed.within(request.kl)
    places = _places(grid, posed.constraints)
    points = [
        # The constraints of `each` move together.
        [
            replace(one, threshold=point[k].threshold, margin=point[k].margin)
            for one, k in zip(posed.constraints, places, strict=True)
        ]
        for point in itertools.product(*grid.families)
    ]
    return solve_points(posed, points, swept=[j for j, k in enumerate(places) if k in grid.swept])


def _places(grid: ThresholdGrid, constraints: Sequence[Constraint]) -> list[int]:
    """The family that each constraint is of; those of an ``each`` stand together, in the order of the families."""
    places: list[int] = []
    left = list(constraints)
    for number, family in enumerate(grid.families):
        first = family[0]
        while left and (
            left[0].name == first.name or (first.each is not None and left[0].name.startswith(f"{first.name}["))
        ):
            left.pop(0)
            places.append(number)
    return places
