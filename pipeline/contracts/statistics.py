"""What a constraint bounds: the statistic of a score under a policy, as a ratio of two means.

Every statistic is E[u] / E[h], where u and h are columns computed row by row from the raw scores and from what is
known of the prompt; expectations are means over the responses of a prompt, then over prompts:

    mean            u = g                       h = 1
    share           u = 1[g >= c] or 1[g <= c]  h = 1
    shortfall       u = max(c - g, 0)           h = 1
    cvar            u = t - max(t - g, 0) / a   h = 1     at the best t; of the upper tail u = t + max(g - t, 0) / a
    with ``where``  u 1[row in G]               1[row in G]
    with ``per``    u = g                       h = the other score, which is positive

A mean of a transformed column is what the dual bounds, so the policy stays an exponential tilt (arXiv 2602.05863 for
shares; Rockafellar and Uryasev 2000 for the tail).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError

Kind = Literal["mean", "share", "shortfall", "cvar"]
Tail = Literal["lower", "upper"]

SETTINGS: dict[Kind, tuple[str, ...]] = {
    "mean": ("per",),
    "share": ("at_least", "at_most"),
    "shortfall": ("below",),
    "cvar": ("level",),
}
"""The settings that each kind takes besides ``where``."""

_OWN = ("at_least", "at_most", "below", "level", "per")


@dataclass(frozen=True)
class Statistic:
    """What is bounded.

    Attributes:
        score: the score g.
        kind: ``mean``; ``share``, the probability that a response has ``at_least`` or ``at_most`` a score;
            ``shortfall``, the mean of what a response lacks to ``below``; ``cvar``, the mean of the worst ``level`` of
            all responses.
        at_least: of a share, score units.
        at_most: of a share, score units. It has one of the two.
        below: of a shortfall, score units.
        level: of a cvar, between 0 and 1.
        tail: of a cvar: which responses are the worst, those of low scores or those of high ones.
        per: of a mean, the score that it is divided by: E[g] / E[per].
        where: the rows that count: for each column of the prompts, or of a table, the values it may have.

    Raises:
        InputError: a setting that the kind does not take or needs, or a value that it cannot have.
    """

    score: str
    kind: Kind = "mean"
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    level: float | None = None
    tail: Tail = "lower"
    per: str | None = None
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in _OWN if getattr(self, name) is not None]
        if self.kind not in SETTINGS:
            raise InputError(f"`statistic` is {self.kind!r}; it must be one of {', '.join(SETTINGS)}")
        takes = SETTINGS[self.kind]
        for name in given:
            if name not in takes:
                raise InputError(
                    f"the statistic `{self.kind}` takes {' or '.join(f'`{one}`' for one in takes)}, and `{name}` is "
                    f"given, {getattr(self, name)!r}"
                )
        if self.kind != "mean" and len(given) != 1:
            needed = " or ".join(f"`{one}`" for one in takes)
            raise InputError(
                f"the statistic `{self.kind}` needs {needed}" + (", one of them" if len(given) > 1 else "")
            )
        for name in given:
            value = getattr(self, name)
            if name != "per" and not math.isfinite(value):
                raise InputError(f"`{name}` is {value}; it must be a finite number")
        if self.level is not None and not 0 < self.level < 1:
            raise InputError(f"`level` is {self.level:g}; the share of the worst responses lies between 0 and 1")
        if self.tail == "upper" and self.kind != "cvar":
            raise InputError(f"`tail` is 'upper'; the statistic `{self.kind}` has none")
        if self.per == self.score:
            raise InputError(f"`per` is {self.per!r}, the score itself; their ratio is 1 under every policy")
        for column, values in self.where:
            if not values:
                raise InputError(f"`where` has no value of {column!r}; it needs at least one")
        columns = [column for column, _ in self.where]
        if len(set(columns)) < len(columns):
            raise InputError(f"`where` names {columns[0]!r} twice; give its values together")

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores it is computed from."""
        return (self.score,) if self.per is None else (self.score, self.per)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, besides scores, it is computed from."""
        return tuple(column for column, _ in self.where)

    @property
    def is_plain(self) -> bool:
        """Whether it is the mean of its score over all rows."""
        return self == Statistic(self.score)

    @property
    def is_ratio(self) -> bool:
        """Whether h is a column of its own, not 1 everywhere."""
        return bool(self.where) or self.per is not None

    @property
    def is_linear(self) -> bool:
        """Whether it is the mean of one column under every policy: h is 1, and u the same for all of them."""
        return not self.is_ratio and self.kind != "cvar"

    @property
    def bounds(self) -> tuple[float, float]:
        """What values it can have, whatever the scores are."""
        if self.kind == "share":
            return 0.0, 1.0
        return (0.0, math.inf) if self.kind == "shortfall" else (-math.inf, math.inf)

    def within(self, column: str, value: str) -> Statistic:
        """The same statistic of the rows whose ``column`` is ``value`` alone."""
        if column in self.columns:
            raise InputError(f"`each` and `where` both name {column!r}; a constraint is of one of the two")
        return replace(self, where=(*self.where, (column, (value,))))

    def text(self) -> str:
        """The left side of a constraint, as a text has it; names stand as they are, without quotes."""
        if self.kind == "share":
            bound = f">= {self.at_least:.12g}" if self.at_least is not None else f"<= {self.at_most:.12g}"
            shown = f"share({self.score} {bound})"
        elif self.kind == "shortfall":
            shown = f"shortfall({self.score}, {self.below:.12g})"
        elif self.kind == "cvar":
            shown = f"cvar({self.score}, {self.level:.12g})"
        else:
            shown = self.score if self.per is None else f"{self.score} per {self.per}"
        if self.where:
            parts = (f"{column}={'|'.join(values)}" for column, values in self.where)
            shown += f"[{', '.join(parts)}]"
        return shown

    def to_document(self) -> dict[str, Any]:
        """As ``dual.json`` has it: ``kind``, and what else is set."""
        document: dict[str, Any] = {"kind": self.kind}
        document |= {name: getattr(self, name) for name in _OWN if getattr(self, name) is not None}
        if self.kind == "cvar":
            document["tail"] = self.tail
        if self.where:
            document["where"] = {column: list(values) for column, values in self.where}
        return document


@dataclass(frozen=True, eq=False)
class StatisticColumns:
    """The two columns of a statistic; under a policy of weights w it is mean(w u) / mean(w h).

    Attributes:
        u_n: shape (n,).
        h_n: shape (n,), not negative; None where it is 1 everywhere.
    """

    u_n: FloatArray
    h_n: FloatArray | None

    def less(self, ratio: float | None) -> FloatArray:
        """U - ratio * h, shape (n,): the column whose mean is at or above 0 where the statistic reaches ``ratio``.

        ``ratio`` is None where h is 1 everywhere: the column is then u, and the threshold stays the threshold.
        """
        if self.h_n is None or ratio is None:
            return self.u_n
        return np.asarray(self.u_n - ratio * self.h_n)


def statistic_columns(
    statistic: Statistic,
    scores: Mapping[str, FloatArray],
    columns: Mapping[str, np.ndarray],
    *,
    at: float | None = None,
) -> StatisticColumns:
    """U and h of each row.

    Args:
        statistic: the statistic.
        scores: raw scores by name, each of shape (n,), in their own units.
        columns: by name the other columns it is computed from, each of shape (n,), texts.
        at: t of a cvar, score units; whatever t is, the mean of u is no better than the cvar.

    Raises:
        InputError: ``per`` is a score that is not positive on a row that counts.
    """
    g_n = scores[statistic.score]
    if statistic.kind == "share":
        at_least, at_most = statistic.at_least, statistic.at_most
        u_n = np.asarray((at_least is None or g_n >= at_least) & (at_most is None or g_n <= at_most), dtype=np.float64)
    elif statistic.kind == "shortfall":
        assert statistic.below is not None  # __post_init__
        u_n = np.maximum(statistic.below - g_n, 0.0)
    elif statistic.kind == "cvar":
        assert statistic.level is not None  # __post_init__
        assert at is not None  # what its column is of
        sign = 1.0 if statistic.tail == "lower" else -1.0
        u_n = sign * (sign * at - np.maximum(sign * (at - g_n), 0.0) / statistic.level)
    else:
        u_n = g_n
    if not statistic.is_ratio:
        return StatisticColumns(u_n, None)
    in_n = rows_where(statistic, columns, n_rows=len(g_n))
    h_n = in_n.astype(np.float64)
    if statistic.per is not None:
        other_n = scores[statistic.per]
        wrong = np.flatnonzero(in_n & ~(other_n > 0))
        if len(wrong):
            raise InputError(
                f"`per` is the score {statistic.per!r}, which is not positive for {len(wrong)} of {len(in_n)} "
                f"responses (the first: {other_n[wrong[0]]:g}); a score to divide by must be"
            )
        h_n = h_n * other_n
    return StatisticColumns(np.where(in_n, u_n, 0.0), h_n)


def rows_where(statistic: Statistic, columns: Mapping[str, np.ndarray], *, n_rows: int) -> np.ndarray:
    """Which rows count, booleans, shape (n,)."""
    mask_n = np.ones(n_rows, dtype=bool)
    for column, values in statistic.where:
        mask_n &= np.isin(columns[column], values)
    return mask_n


def tail_mean(value_n: FloatArray, weight_n: FloatArray, *, level: float, tail: Tail) -> tuple[float, float]:
    """The mean of the worst ``level`` of a weighted sample, and the t where it begins (the value at risk).

    Args:
        value_n: shape (n,), score units.
        weight_n: of the rows, shape (n,), not negative; their sum is taken for 1.
        level: the share of the weight that is the tail, between 0 and 1.
        tail: whether low or high values are the worst.
    """
    sign = 1.0 if tail == "lower" else -1.0
    order = np.argsort(sign * value_n, kind="stable")
    value_n, weight_n = value_n[order], weight_n[order] / weight_n.sum()
    before_n = np.concatenate([[0.0], np.cumsum(weight_n)[:-1]])
    taken_n = np.clip(level - before_n, 0.0, weight_n)
    last = int(np.flatnonzero(taken_n > 0)[-1])
    return float(taken_n @ value_n / taken_n.sum()), float(value_n[last])
