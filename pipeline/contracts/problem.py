"""The constrained problem as the user states it, and the sign convention of everything.

    maximise over policies  E[r] - beta * KL(policy || reference)   subject to  E[g_j] >= b_j  for every constraint

What g is of a score, and how a statistic that is no mean becomes one, is said in
:mod:`pipeline.contracts.statistics`. A user may write a constraint as ``<=``. Files, tables and figures keep the
user's own direction and units. Inside the dual and the evaluation scores and thresholds are *turned*: those of a
``<=`` are multiplied by -1, so that higher is better and slack >= 0 means satisfied; what leaves is multiplied again.
Multipliers are the same either way, and never negative but for equalities, which are not turned. :func:`sign_of` alone
makes a factor of a direction; only ``dualign validate`` does so again by means of its own, as a check.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from pipeline.contracts.errors import InputError
from pipeline.contracts.section import nearest
from pipeline.contracts.statistics import Statistic

Direction = Literal[">=", "<=", "="]

MAX_CONSTRAINTS = 100
"""A problem has at most so many constraints: the work of a solve grows with their square, that of a sweep too."""

MAX_FRONTIER_POINTS = 10_000
"""Points of a frontier, over all combinations of its ranges: each is a problem that is solved."""

_MAX_NAME = 200
_OF_ITS_NAME = Statistic("")


class Directed(Protocol):
    """Whatever has a direction: a constraint as stated, or one with its multiplier."""

    @property
    def direction(self) -> Direction:
        """``">="``, ``"<="`` or ``"="``."""


def sign_of(direction: Direction) -> float:
    """+1 for ``>=`` and ``=``, -1 for ``<=``: the factor that turns a score, and turns it back."""
    return -1.0 if direction == "<=" else 1.0


def constraint_signs(constraints: Iterable[Directed]) -> np.ndarray:
    """:func:`sign_of` each of m constraints, float64, shape (m,)."""
    return np.array([sign_of(constraint.direction) for constraint in constraints], dtype=np.float64)


@dataclass(frozen=True)
class Constraint:
    """One constraint in the user's own direction and units.

    Attributes:
        name: of the constraint, distinct among those of a problem.
        direction: ``">="`` keeps the statistic at or above the threshold, ``"<="`` at or below, ``"="`` at it.
        threshold: absolute threshold, in units of the statistic, or None.
        margin: signed offset from the statistic under the reference policy, in its units, or None.
            Exactly one of ``threshold`` and ``margin`` is given.
        statistic: what is bounded; without it the mean of the score that has the constraint's name.
        each: a column of which every value makes a constraint of its own (:func:`expand_constraints`), or None.
        tolerance: of an equality: how far from the threshold the evaluation takes it for met, in units of the
            statistic; None for a tenth of a standard deviation of the statistic's column under the reference.

    Raises:
        InputError: both or neither of threshold and margin, a value that is not finite, or one that the statistic
            cannot have.
    """

    name: str
    direction: Direction
    threshold: float | None = None
    margin: float | None = None
    statistic: Statistic = _OF_ITS_NAME
    each: str | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.statistic is _OF_ITS_NAME:
            object.__setattr__(self, "statistic", Statistic(self.name))
        if (self.threshold is None) == (self.margin is None):
            given = "both" if self.threshold is not None else "neither"
            raise InputError(f"constraint `{self.name}` gives {given} of `threshold` and `margin`; give exactly one")
        fault = self._fault()
        if fault is not None:
            raise InputError(f"constraint `{self.name}`: {fault}")

    def _fault(self) -> str | None:
        for label, value in (("threshold", self.threshold), ("margin", self.margin), ("tolerance", self.tolerance)):
            if value is not None and not math.isfinite(value):
                return f"`{label}` is {value}; it must be a finite number"
        lowest, highest = self.statistic.bounds
        if self.threshold is not None and not lowest <= self.threshold <= highest:
            rule = "a share lies between 0 and 1" if highest == 1 else "a shortfall is never negative"
            return f"`threshold` is {self.threshold:g}; {rule}"
        if self.margin is not None and highest == 1 and abs(self.margin) > 1:
            return f"`margin` is {self.margin:g}; two shares differ by no more than 1"
        if self.is_equality and self.statistic.kind == "cvar":
            return "the statistic `cvar` is not bounded by an equality: the policies that meet one are no convex set"
        if self.statistic.kind == "cvar" and (self.statistic.tail == "lower") != (self.direction == ">="):
            return "a cvar is the mean of the worst responses: `>=` bounds the lower tail, `<=` the upper"
        if self.statistic.kind == "shortfall" and self.direction == ">=":
            return "a shortfall is what responses lack; bound it from above, `<=`"
        if self.tolerance is not None and not self.is_equality:
            return "`tolerance` is of an equality; a bound is met or it is not"
        if self.tolerance is not None and self.tolerance <= 0:
            return f"`tolerance` is {self.tolerance:g}; it must be positive"
        if self.each is not None and self.each in self.statistic.columns:
            return f"`each` and `where` both name {self.each!r}; a constraint is of one of the two"
        return None

    @property
    def sign(self) -> float:
        """:func:`sign_of` its direction."""
        return sign_of(self.direction)

    @property
    def is_equality(self) -> bool:
        """Whether the statistic is held at the threshold; its multiplier then has either sign."""
        return self.direction == "="

    def tightened(self, offset: float) -> Constraint:
        """The same constraint, harder to meet by ``offset`` units of the statistic."""
        moved = self.sign * offset
        if self.threshold is not None:
            return replace(self, threshold=self.threshold + moved)
        assert self.margin is not None  # __post_init__
        return replace(self, margin=self.margin + moved)

    def absolute_threshold(self, reference: float) -> float:
        """The threshold b in the user's direction, given the statistic under the reference policy."""
        if self.threshold is not None:
            return self.threshold
        assert self.margin is not None  # __post_init__
        return reference + self.margin

    def text(self) -> str:
        """The demand as a text has it, such as ``share(harmless >= 0) >= 0.97``."""
        if self.threshold is not None:
            right = f"{self.threshold:.12g}"
        else:
            assert self.margin is not None  # __post_init__
            right = f"ref {'-' if self.margin < 0 else '+'} {abs(self.margin):.12g}"
        each = f"each({self.each}): " if self.each is not None else ""
        return f"{each}{self.statistic.text()} {self.direction} {right}"


def expand_constraints(
    constraints: Iterable[Constraint], values: Mapping[str, Mapping[str, int]]
) -> tuple[Constraint, ...]:
    """The constraints with one for each value where they say ``each``, in order.

    Args:
        constraints: as stated.
        values: for each column that is named, how many train prompts have each of its values.

    Raises:
        InputError: a column that is not there, or a value that no prompt has; names both and what there is.
    """
    found: list[Constraint] = []
    for constraint in constraints:
        for column, wanted in constraint.statistic.where:
            there = _values_of(column, values, constraint, setting="where")
            missing = [value for value in wanted if value not in there]
            if missing:
                raise InputError(
                    f"constraint `{constraint.name}`: no prompt has the {column} {missing[0]!r}"
                    f"{nearest(missing[0], there)}"
                )
        if constraint.each is None:
            found.append(constraint)
            continue
        found.extend(
            replace(
                constraint,
                name=f"{constraint.name}[{constraint.each}={value}]",
                statistic=constraint.statistic.within(constraint.each, value),
                each=None,
            )
            for value in sorted(_values_of(constraint.each, values, constraint, setting="each"))
        )
    require_few_constraints(len(found))
    require_consistent(found)
    return tuple(found)


FEW_PROMPTS = 30
"""Below so many train prompts the statistic of a category is warned of: its interval leans on few of them."""


def few_prompts(constraints: Iterable[Constraint], values: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A warning for each of the expanded constraints that is of fewer than :data:`FEW_PROMPTS` train prompts."""
    found = []
    for constraint in constraints:
        for column, wanted in constraint.statistic.where:
            count = sum(values[column].get(value, 0) for value in wanted)
            if count < FEW_PROMPTS:
                found.append(
                    f"constraint `{constraint.name}` is of {count} train prompts ({column} "
                    f"{' or '.join(map(repr, wanted))}): with fewer than {FEW_PROMPTS} its intervals are rough"
                )
    return found


def _values_of(
    column: str, values: Mapping[str, Mapping[str, int]], constraint: Constraint, *, setting: str
) -> Mapping[str, int]:
    if column not in values:
        raise InputError(
            f"constraint `{constraint.name}`: `{setting}` names the column {column!r}, which is not there"
            f"{nearest(column, values)}"
        )
    return values[column]


def require_consistent(constraints: Sequence[Constraint]) -> None:
    """Check constraints against each other, by what they say alone.

    Raises:
        InputError: two of one name, two that are the same, or two absolute ones that no policy meets together.
    """
    counts = Counter((one.name, one.each) for one in constraints)
    repeated = [name for (name, _), count in counts.items() if count > 1]
    if repeated:
        raise InputError(f"two constraints are named {repeated[0]!r}; each has a name of its own")
    for place, one in enumerate(constraints):
        for other in constraints[:place]:
            if not _of_the_same(one, other):
                continue
            if (one.direction, one.threshold, one.margin) == (other.direction, other.threshold, other.margin):
                raise InputError(f"the constraints `{other.name}` and `{one.name}` are the same: {one.text()}")
            if _exclude_each_other(one, other):
                raise InputError(
                    f"the constraints `{other.name}` ({other.text()}) and `{one.name}` ({one.text()}) contradict each "
                    "other: no policy meets both"
                )


def _of_the_same(one: Constraint, other: Constraint) -> bool:
    # The tail follows from the direction, and bounds on both are no contradiction.
    return one.statistic == other.statistic and one.each == other.each


def _exclude_each_other(one: Constraint, other: Constraint) -> bool:
    """Whether no number meets both, where both count from 0 or both from the reference."""
    if (one.threshold is None) != (other.threshold is None):
        return False
    low, high = -math.inf, math.inf
    for bound in (one, other):
        value = bound.absolute_threshold(0.0)
        if bound.direction in (">=", "="):
            low = max(low, value)
        if bound.direction in ("<=", "="):
            high = min(high, value)
    return low > high


@dataclass(frozen=True)
class Safeguard:
    """What the dual is asked for beyond the demand of one constraint; the evaluation judges the demand itself.

    Attributes:
        reserve: units of the statistic: what a fine-tuned policy is known to fall short by, negative where it
            overshoots.
        assurance: probability that the final evaluation calls the constraint satisfied, or None.
        score_error: root mean square error of the scorer's differences between two responses, score units: the margin
            grows by what such an error can hide.
        score_noise: standard deviation of noise in the score that another rating of the same response would not
            repeat, score units.
        measures_noise: ``score_noise`` is still to be taken from the rows that were scored twice.
    """

    reserve: float = 0.0
    assurance: float | None = None
    score_error: float = 0.0
    score_noise: float = 0.0
    measures_noise: bool = False

    def require_fit(self, constraint: Constraint) -> None:
        """Check that the constraint can have such a safeguard.

        Raises:
            InputError: an equality has any, or another statistic than the mean over all prompts an error or noise.
        """
        if constraint.is_equality and self != Safeguard():
            raise InputError(
                f"constraint `{constraint.name}`: an equality takes no `reserve`, `assurance`, `score_error` or "
                "`score_noise`: it has no safe side"
            )
        used = {"score_error": self.score_error, "score_noise": self.score_noise or self.measures_noise}
        for name in (name for name, value in used.items() if value):
            if not (constraint.statistic.is_plain and constraint.each is None):
                raise InputError(
                    f"constraint `{constraint.name}`: `{name}` is of the mean of a score over all prompts; what it "
                    "does to another statistic is not known"
                )


def require_few_constraints(count: int) -> None:
    """Raise InputError where there are more than :data:`MAX_CONSTRAINTS`."""
    if count > MAX_CONSTRAINTS:
        raise InputError(f"{count} constraints are given; a problem has at most {MAX_CONSTRAINTS}")


def check_name(name: str, *, what: str) -> str:
    """The name of a score, as it is, where it can stand in messages, tables and figures.

    Raises:
        InputError: an empty name, one of more than 200 characters, or one with characters that do not show (line
            breaks, tabs, zero-width characters) or blanks at an end.
    """
    shown = repr(name if len(name) <= _MAX_NAME else name[:40] + "...")
    if not name or name != name.strip() or not name.isprintable():
        raise InputError(f"{what} {shown}: a name has no characters that do not show, and no blanks at its ends")
    if len(name) > _MAX_NAME:
        raise InputError(f"{what} {shown} has {len(name)} characters; a name has at most {_MAX_NAME}")
    return name
