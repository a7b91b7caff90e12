"""``dualign frontier``: the dual of any table of scores, solved for ranges of thresholds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint, read_constraint
from pipeline.dual.from_table import TableRequest, read_splits
from pipeline.dual.solving import build_problem_on_samples
from pipeline.dual.sweep import solve_points

_RANGE = re.compile(r"(?P<start>[^\s:=+]+):(?P<stop>[^\s:]+):(?P<step>[^\s:]+)\s*$")


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
        InputError: none holds a range, or a text or a range has another form.
    """
    swept = tuple(place for place, text in enumerate(texts) if _RANGE.search(text))
    if not swept:
        raise InputError(
            f"none of the constraints {list(texts)} holds a range; a frontier needs one of the form "
            "'NAME >= ref + START:STOP:STEP'"
        )
    families = [
        [read_constraint(_RANGE.sub(repr(number), text)) for number in _range_numbers(text)]
        if place in swept
        else [read_constraint(text)]
        for place, text in enumerate(texts)
    ]
    return ThresholdGrid(tuple(map(tuple, families)), swept)


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
    splits = read_splits(request.open_table(), request, scratch=scratch)
    problem = build_problem_on_samples(splits["train"].scores, constraints=grid.first, beta=request.beta)
    return solve_points(problem, list(itertools.product(*grid.families)), swept=grid.swept)


def _range_numbers(text: str) -> list[float]:
    match = _RANGE.search(text)
    assert match is not None  # the caller looked
    try:
        start, stop, step = (float(match[name]) for name in ("start", "stop", "step"))
    except ValueError:
        raise InputError(f"constraint {text!r}: the range {match[0]!r} is not three numbers START:STOP:STEP") from None
    if not (np.isfinite([start, stop, step]).all() and step > 0 and stop >= start):
        raise InputError(f"constraint {text!r}: a range needs STEP > 0 and STOP >= START, {match[0]!r} given")
    # The end belongs to the range although its sum of steps is rounded.
    count = int(np.floor((stop - start) / step * (1 + 1e-12) + 1e-9)) + 1
    return [start + step * place for place in range(count)]
