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
    r"""^\s*(?P<name>[A-Za-z_][\w.-]*)\s*(?P<direction>>=|<=)\s*
        (?:(?P<reference>ref)\s*(?P<sign>[+-])\s*)?(?P<number>[^\s]+)\s*$""",
    re.VERBOSE,
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
    """

    reserve: float = 0.0
    assurance: float | None = None
    score_error: float = 0.0


def read_constraint(text: str) -> Constraint:
    """Read ``NAME >= NUMBER``, ``NAME <= NUMBER``, ``NAME >= ref + NUMBER`` or ``NAME <= ref - NUMBER``.

    Raises:
        InputError: the text has another form.
    """
    match = _TEXT.match(text)
    try:
        if match is None:
            raise ValueError
        number = float(match["number"])
    except ValueError:
        raise InputError(
            f"constraint {text!r} is not of the form 'NAME >= NUMBER', 'NAME <= NUMBER' or 'NAME >= ref + NUMBER'"
        ) from None
    direction: Direction = ">=" if match["direction"] == ">=" else "<="
    if match["reference"]:
        return Constraint(match["name"], direction, margin=number if match["sign"] == "+" else -number)
    return Constraint(match["name"], direction, threshold=number)
