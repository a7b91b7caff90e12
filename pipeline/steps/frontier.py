"""``dualign frontier``: the dual of any table of scores, solved for ranges of thresholds."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.contracts.constraint_text import hold_ranges, read_constraint_families
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import MAX_FRONTIER_POINTS, Constraint
from pipeline.dual.from_table import TableRequest, read_splits
from pipeline.dual.output_folder import PROBLEM
from pipeline.dual.sweep import solve_points, write_frontier
from pipeline.report.swept import SweptConstraint, SweptGrid, sweep_figure

_log = logging.getLogger("dualign")


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


def solve_grid(request: TableRequest, grid: ThresholdGrid, *, scratch: Path) -> SweptGrid:
    """Solve for every combination of thresholds; infeasible ones are marked, not dropped.

    Args:
        request: what to solve on which table, the constraints at their first thresholds.
        grid: all thresholds.
        scratch: an empty folder for scores that do not fit in memory.

    Returns:
        The rows of ``frontier.parquet``, and what they are of.

    Raises:
        InputError: as :func:`pipeline.dual.from_table.solve_table`.
    """
    splits, _ = read_splits(request.open_table(), request, scratch=scratch)
    posed = splits["train"].posed.within(request.kl)
    if posed.problem.reward_scale == 0:
        _log.warning(
            "the reward %r is the same for all responses of every prompt: each threshold's policy is the one closest "
            "to the reference that meets it, and every reward of the frontier is the reference's",
            request.reward,
        )
    places = _places(grid, posed.constraints)
    points = [
        # The constraints of `each` move together.
        [
            replace(one, threshold=point[k].threshold, margin=point[k].margin)
            for one, k in zip(posed.constraints, places, strict=True)
        ]
        for point in itertools.product(*grid.families)
    ]
    swept = [j for j, k in enumerate(places) if k in grid.swept]
    return SweptGrid(
        rows=solve_points(posed, points, swept=swept),
        reward=request.reward,
        reference_reward=posed.problem.reference_reward,
        swept=tuple(
            SweptConstraint(one.name, one.direction, is_margin=one.margin is not None, family=family)
            for one, family in ((posed.constraints[j], places[j]) for j in swept)
        ),
    )


def write_grid(output: Path, grid: SweptGrid, *, problem: Mapping[str, Any]) -> list[Path]:
    """Write ``frontier.parquet`` and its figure into a folder, the table last.

    Args:
        output: the folder.
        grid: what was solved.
        problem: what was asked, JSON-serialisable; kept in the table's metadata.

    Returns:
        What was written, the table first.

    Raises:
        InputError: the folder cannot be written.
    """
    from pipeline.report.style import save_figure

    path = output / "frontier.parquet"
    path.unlink(missing_ok=True)  # a figure of one problem never lies beside the table of another
    figures = save_figure(sweep_figure(grid), output / "figures" / "frontier")
    write_frontier(path, grid.rows, metadata={PROBLEM: json.dumps(problem)})
    return [path, *figures]


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
