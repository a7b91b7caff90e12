"""A statistic that a constraint bounds, estimated from scored rows under a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.statistics import Statistic, tail_mean

if TYPE_CHECKING:  # they are handed in, and bring Arrow along
    from pipeline.scoring.joined import JoinedScores


@dataclass(frozen=True, eq=False)
class Estimate:
    """E[u]/E[h] of rows, each prompt with the same weight, whatever the number of its responses.

    A cvar is a mean too: at its own t, the quantile, it is E[t - (t - g)+ / level] (Rockafellar and Uryasev, 2000),
    and that t is estimated moves it by terms of second order alone.

    Attributes:
        statistic: what is estimated.
        numerator_q: mean of u of each prompt that counts, shape (q,).
        denominator_q: mean of h of each of them, positive; shape (q,).
        n_rows: responses that count.
    """

    statistic: Statistic
    numerator_q: FloatArray
    denominator_q: FloatArray
    n_rows: int

    @cached_property
    def value(self) -> float:
        """The statistic, in its own units."""
        return float(self.numerator_q.mean() / self.denominator_q.mean())

    @property
    def observations_q(self) -> FloatArray:
        """One observation a prompt that counts, whose mean is the value and whose spread is that of the estimate.

        R + (u - R h) / E[h] with R = E[u]/E[h], by the delta method; shape (q,).
        """
        scale = float(self.denominator_q.mean())
        return np.asarray(self.value + (self.numerator_q - self.value * self.denominator_q) / scale)


def estimate(
    statistic: Statistic, rows: JoinedScores, weight_n: FloatArray | None = None, *, mask_n: np.ndarray | None = None
) -> Estimate:
    """The statistic of rows.

    Args:
        statistic: what to estimate.
        rows: scored responses.
        weight_n: of the rows, shape (n,), which sum to 1 within a prompt; None for equal ones.
        mask_n: the rows of the prompts that count besides the statistic's own ``where``, shape (n,); None for all.

    Raises:
        InputError: no row counts.
    """
    if weight_n is None:
        weight_n = 1.0 / np.bincount(rows.prompt_n)[rows.prompt_n]
    at = None
    if statistic.kind == "cvar":
        at = _quantile(statistic, rows, weight_n, mask_n)
    columns = rows.statistic_columns(statistic, at=at)
    h_n = np.ones(rows.n_samples) if columns.h_n is None else columns.h_n
    if mask_n is not None:
        h_n = np.where(mask_n, h_n, 0.0)
    u_n = columns.u_n if columns.h_n is None and mask_n is None else np.where(h_n > 0, columns.u_n, 0.0)
    counts = np.bincount(rows.prompt_n, h_n > 0)
    inside_p = counts > 0
    if not inside_p.any():
        raise InputError(f"no response counts for {statistic.text()}: none is of a prompt that it is about")
    return Estimate(
        statistic,
        np.asarray(np.bincount(rows.prompt_n, u_n * weight_n)[inside_p], dtype=np.float64),
        np.asarray(np.bincount(rows.prompt_n, h_n * weight_n)[inside_p], dtype=np.float64),
        int(counts.sum()),
    )


def column_values(statistics: Sequence[Statistic], rows: JoinedScores) -> list[FloatArray]:
    """U of the rows that count for each statistic, for the units that errors are compared in; a list of (n_j,)."""
    found = []
    for statistic in statistics:
        at = None
        if statistic.kind == "cvar":
            at = _quantile(statistic, rows, 1.0 / np.bincount(rows.prompt_n)[rows.prompt_n], None)
        columns = rows.statistic_columns(statistic, at=at)
        found.append(columns.u_n if columns.h_n is None else columns.u_n[columns.h_n > 0])
    return found


def _quantile(statistic: Statistic, rows: JoinedScores, weight_n: FloatArray, mask_n: np.ndarray | None) -> float:
    assert statistic.level is not None  # a cvar has one
    counts_n = np.ones(rows.n_samples, dtype=bool) if mask_n is None else mask_n
    inside = rows.statistic_columns(statistic, at=0.0).h_n
    if inside is not None:
        counts_n = counts_n & (inside > 0)
    if not counts_n.any():
        raise InputError(f"no response counts for {statistic.text()}: none is of a prompt that it is about")
    score_n = rows.score_n(statistic.score)
    _, at = tail_mean(score_n[counts_n], weight_n[counts_n], level=statistic.level, tail=statistic.tail)
    return at
