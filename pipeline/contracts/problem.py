"""The constrained problem as the user states it, and the sign convention of everything.

    maximise over policies  E[r] - beta * KL(policy || reference)   subject to  E[g_j] >= b_j  for every constraint

A user may write a constraint as ``<=``. Files, tables and figures keep the user's own direction and units. Inside the
dual and the evaluation scores and thresholds are *turned*: those of a ``<=`` are multiplied by -1, so that higher is
better and slack >= 0 means satisfied; what leaves is multiplied again. Multipliers are the same either way, and never
negative. :func:`sign_of` alone makes a factor of a direction; only ``dualign validate`` does so again by means of its
own, as a check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from pipeline.contracts.errors import InputError

Direction = Literal[">=", "<="]

MAX_CONSTRAINTS = 100
"""A problem has at most so many constraints: the work of a solve grows with their square, that of a sweep too."""

MAX_FRONTIER_POINTS = 10_000
"""Points of a frontier, over all combinations of its ranges: each is a problem that is solved."""

_MAX_NAME = 200


class Directed(Protocol):
    """Whatever has a direction: a constraint as stated, or one with its multiplier."""

    @property
    def direction(self) -> Direction:
        """``">="`` or ``"<="``."""


def sign_of(direction: Direction) -> float:
    """+1 for ``>=``, -1 for ``<=``: the factor that turns a score, and turns it back."""
    return 1.0 if direction == ">=" else -1.0


def constraint_signs(constraints: Iterable[Directed]) -> np.ndarray:
    """:func:`sign_of` each of m constraints, float64, shape (m,)."""
    return np.array([sign_of(constraint.direction) for constraint in constraints], dtype=np.float64)


_TEXT = re.compile(
    r"""^\s*(?:"(?P<double>(?:[^"]|"")*)"|'(?P<single>(?:[^']|'')*)'|(?P<bare>[^\W\d][\w.-]*))
        \s*(?P<direction>>=|<=)\s*
        (?:(?P<reference>ref)\s*(?P<sign>[+-])\s*)?(?P<number>[^\s]+)\s*$""",
    re.VERBOSE,
)
_FORMS = "'NAME >= NUMBER', 'NAME <= NUMBER' or 'NAME >= ref + NUMBER'"
_NAME_RULE = (
    "a NAME of other characters than letters, digits, `_`, `.` and `-`, or that begins with none of letters and `_`, "
    "stands in quotes: '\"safety score\" >= 0.5'"
)


@dataclass(frozen=True)
class Constraint:
    """One constraint in the user's own direction and units.

    Attributes:
        name: the score it bounds.
        direction: ``">="`` keeps the mean score at or above the threshold, ``"<="`` at or below.
        threshold: absolute threshold, score units, or None.
        margin: signed offset from the mean score under the reference policy, score units, or None.
            Exactly one of ``threshold`` and ``margin`` is given.

    Raises:
        InputError: both or neither of threshold and margin, or a value that is not finite.
    """

    name: str
    direction: Direction
    threshold: float | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.margin is None):
            given = "both" if self.threshold is not None else "neither"
            raise InputError(f"constraint `{self.name}` gives {given} of `threshold` and `margin`; give exactly one")
        for label, value in (("threshold", self.threshold), ("margin", self.margin)):
            if value is not None and not math.isfinite(value):
                raise InputError(f"constraint `{self.name}`: `{label}` is {value}; it must be a finite number")

    @property
    def sign(self) -> float:
        """:func:`sign_of` its direction."""
        return sign_of(self.direction)

    def tightened(self, offset: float) -> Constraint:
        """The same constraint, harder to meet by ``offset`` score units."""
        moved = self.sign * offset
        if self.threshold is not None:
            return replace(self, threshold=self.threshold + moved)
        assert self.margin is not None  # __post_init__
        return replace(self, margin=self.margin + moved)

    def absolute_threshold(self, reference_mean: float) -> float:
        """The threshold b in the user's direction, given the grand mean of the score under the reference policy."""
        if self.threshold is not None:
            return self.threshold
        assert self.margin is not None  # __post_init__
        return reference_mean + self.margin


@dataclass(frozen=True)
class Safeguard:
    """What the dual is asked for beyond the demand of one constraint; the evaluation judges the demand itself.

    Attributes:
        reserve: score units: what a fine-tuned policy is known to fall short by, negative where it overshoots.
        assurance: probability that the final evaluation calls the constraint satisfied, or None.
        score_error: root mean square error of the scorer's differences between two responses, score units: the margin
            grows by what such an error can hide.
        score_noise: standard deviation of noise in the score that another rating of the same response would not
            repeat, score units.
    """

    reserve: float = 0.0
    assurance: float | None = None
    score_error: float = 0.0
    score_noise: float = 0.0


def require_few_constraints(count: int) -> None:
    """Raise InputError where there are more than :data:`MAX_CONSTRAINTS`."""
    if count > MAX_CONSTRAINTS:
        raise InputError(f"{count} constraints are given; a problem has at most {MAX_CONSTRAINTS}")


def read_constraint(text: str) -> Constraint:
    """Read ``NAME >= NUMBER``, ``NAME <= NUMBER``, ``NAME >= ref + NUMBER`` or ``NAME <= ref - NUMBER``.

    A name that is not letters, digits, ``_``, ``.`` and ``-`` stands in single or double quotes; such a quote inside
    it is written twice.

    Raises:
        InputError: the text has another form, or the name cannot be one.
    """
    parts = _read_parts(text)
    try:
        number = float(parts.number)
    except ValueError:
        raise _malformed(text) from None
    return parts.at(number)


def read_constraint_range(text: str) -> tuple[Constraint, ...]:
    """Read a constraint whose number may be a range ``START:STOP:STEP``: one constraint a number of it, in order.

    Raises:
        InputError: as :func:`read_constraint`, or a range that is malformed or of more than
            :data:`MAX_FRONTIER_POINTS` numbers.
    """
    parts = _read_parts(text)
    if not holds_range(text):
        return (read_constraint(text),)
    try:
        start, stop, step = map(float, parts.number.split(":"))
    except ValueError:
        raise InputError(
            f"constraint {text!r}: the range {parts.number!r} is not three numbers START:STOP:STEP"
        ) from None
    if not (all(map(math.isfinite, (start, stop, step))) and step > 0 and stop >= start):
        raise InputError(f"constraint {text!r}: a range needs STEP > 0 and STOP >= START, {parts.number!r} given")
    n_steps = (stop - start) / step
    if not n_steps < MAX_FRONTIER_POINTS:
        raise InputError(
            f"constraint {text!r}: the range {parts.number!r} has {n_steps:.4g} steps; a frontier has at most "
            f"{MAX_FRONTIER_POINTS} points"
        )
    # The end belongs to the range although its sum of steps is rounded.
    count = math.floor(n_steps * (1 + 1e-12) + 1e-9) + 1
    return tuple(parts.at(start + step * place) for place in range(count))


def holds_range(text: str) -> bool:
    """Whether the number of a constraint is a range ``START:STOP:STEP``.

    Raises:
        InputError: as :func:`read_constraint`, but for the number.
    """
    return _read_parts(text).number.count(":") == 2


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


@dataclass(frozen=True)
class _Parts:
    """A constraint whose number is not read yet."""

    name: str
    direction: Direction
    sign: str | None
    number: str

    def at(self, number: float) -> Constraint:
        if self.sign is not None:
            return Constraint(self.name, self.direction, margin=number if self.sign == "+" else -number)
        return Constraint(self.name, self.direction, threshold=number)


def _read_parts(text: str) -> _Parts:
    match = _TEXT.match(text)
    if match is None:
        raise _malformed(text)
    if match["double"] is not None:
        name = match["double"].replace('""', '"')
    elif match["single"] is not None:
        name = match["single"].replace("''", "'")
    else:
        name = match["bare"]
    direction: Direction = ">=" if match["direction"] == ">=" else "<="
    check_name(name, what=f"constraint {text!r}: the name")
    return _Parts(name, direction, match["sign"] if match["reference"] else None, match["number"])


def _malformed(text: str) -> InputError:
    return InputError(f"constraint {text!r} is not of the form {_FORMS}; {_NAME_RULE}")
