"""A pilot's scored responses under a demand: what its moments are measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.errors import TooFewRowsError
from stage1_dual.dual.segments import FloatArray, IntArray, Segments


@dataclass(frozen=True, eq=False)
class PilotRows:
    """A pilot's scored responses, grouped by prompt, and the tilt that solves the demand on them. Columns are turned.

    Attributes:
        counts_p: responses of each prompt, shape (p,), at least 2.
        reward_n: reward units, shape (n,).
        column_mn: the columns whose means are bounded, shape (m, n).
        reference_mn: columns whose mean under the reference is subtracted, prompt by prompt: the score itself where
            the demand is a margin, 0 where it is absolute, shape (m, n).
        target_m: what the difference of the two means must reach, shape (m,).
        multipliers_m: lam of the pilot, reward per unit of the column, shape (m,).
        beta: reward per nat.
        is_equality_m: constraints that ask for their threshold exactly, shape (m,).
        names: one a constraint.
    """

    counts_p: IntArray
    reward_n: FloatArray
    column_mn: FloatArray
    reference_mn: FloatArray
    target_m: FloatArray
    multipliers_m: FloatArray
    beta: float
    is_equality_m: NDArray[np.bool_]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if int(self.counts_p.min()) < 2:
            raise TooFewRowsError(
                f"of the pilot's {len(self.counts_p):,} prompts {np.count_nonzero(self.counts_p < 2):,} have a single "
                "response; what another one would change can be told from 2 on: leave those prompts out, or draw more"
            )
        if len(self.counts_p) < 4:
            raise TooFewRowsError(
                f"the pilot has {len(self.counts_p)} prompts; a plan needs at least 4, and 64 are enough"
            )

    @cached_property
    def counting_m(self) -> IntArray:
        """Prompts with responses that differ in the column, shape (m,): others no policy changes."""
        segments = Segments.from_counts(self.counts_p)
        differs_mp = segments.max(self.column_mn) > -segments.max(-self.column_mn)
        return np.asarray(np.count_nonzero(differs_mp, axis=-1), dtype=np.int64)

    @cached_property
    def is_active_m(self) -> NDArray[np.bool_]:
        """Constraints that bind on the pilot, shape (m,); none that no policy changes does."""
        binds_m = (self.multipliers_m > 0) | self.is_equality_m
        return np.asarray(binds_m & (self.counting_m > 0), dtype=np.bool_)

    def half(self, part: int) -> PilotRows:
        """Every second response of each prompt, from the first or second on; those with fewer than 4 as they are."""
        counts_p = self.counts_p
        starts_p = np.cumsum(counts_p) - counts_p
        place_n = np.arange(len(self.reward_n)) - np.repeat(starts_p, counts_p)
        keep_n = (place_n % 2 == part) | np.repeat(counts_p < 4, counts_p)
        return replace(
            self,
            counts_p=np.add.reduceat(keep_n, starts_p).astype(np.int64),
            reward_n=self.reward_n[keep_n],
            column_mn=np.ascontiguousarray(self.column_mn[:, keep_n]),
            reference_mn=np.ascontiguousarray(self.reference_mn[:, keep_n]),
        )
