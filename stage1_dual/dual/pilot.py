"""What a pilot says of slacks to come, and how far it may be wrong.

Its moments (``pilot_moments``) come with an error, since the pilot is small; lam_hat is among what it got wrong. A
jackknife over groups of prompts, each of which solves again by a Newton step, says how large it is: an estimated
variance has as many degrees of freedom as its own variance tells (Satterthwaite).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.pilot_moments import Moments, moments_of
from stage1_dual.dual.pilot_rows import PilotRows
from stage1_dual.dual.pilot_slopes import Slopes
from stage1_dual.dual.pilot_terms import PromptTerms, prompt_terms
from stage1_dual.dual.problem import LARGEST_KL_SHARE
from stage1_dual.dual.segments import FloatArray, IntArray
from stage1_dual.dual.slack_prediction import Prediction

FEWEST_RESPONSES = 8
"""Responses to a prompt that a plan chooses at least."""
# Groups of prompts that the jackknife leaves out one at a time: enough for an error of an error.
_MOST_GROUPS = 30
# What an estimated variance is taken to have at least.
_FEWEST_DEGREES = 8.0
# A few prompts with a strong tilt make most of the bias; a pilot that has few of them finds little, and little error.
_RARE_PROMPTS = 1.5


@dataclass(frozen=True, eq=False)
class Pilot:
    """What a pilot says of slacks to come. Errors are of the slack in the population, in units of the columns.

    Attributes:
        names: of the constraints.
        n_prompts: of the pilot.
        n_responses: of its median prompt.
        multipliers_m: lam of the pilot, shape (m,).
        multiplier_errors_m: their standard errors, shape (m,).
        is_active_m: constraints that bind on it, shape (m,).
        is_equality_m: constraints that ask for their threshold exactly, shape (m,).
        moments: A, B and C of the errors; what does not bind has its slack at lam* beside them.
        sampled_m: E_x Var_lam of the columns: what the responses of an evaluation add, shape (m,).
        reference_m: E_x Var_ref of the reference columns: what its reference's responses add, shape (m,).
        reward_slope_m: reward per unit of threshold along the optimum, shape (m,); not positive where it costs.
        kl: nats a prompt, corrected for the number of responses.
        second_moment: E_x E_ref w^2, w = pi_lam / pi_ref.
        collapsed_share: share of the prompts with an effective sample size below 2.
        counting_m: prompts of which the column is not constant, shape (m,).
        replicates: the same moments with a group of prompts left out, one a group.
        slopes: how the slope of the equations of a run errs with them.
        warnings: sentences on the shape of the problem, of its solution's diagnostics.
    """

    names: tuple[str, ...]
    n_prompts: int
    n_responses: float
    multipliers_m: FloatArray
    multiplier_errors_m: FloatArray
    is_active_m: NDArray[np.bool_]
    is_equality_m: NDArray[np.bool_]
    moments: Moments
    sampled_m: FloatArray
    reference_m: FloatArray
    reward_slope_m: FloatArray
    kl: float
    second_moment: float
    collapsed_share: float
    counting_m: IntArray
    replicates: tuple[Moments, ...]
    slopes: Slopes
    warnings: tuple[str, ...] = ()

    @classmethod
    def measure(cls, rows: PilotRows) -> Pilot:
        """A pass over the rows, one for each group of prompts of the jackknife, two for each constraint that binds."""
        terms, everything_p = prompt_terms(rows, rows.multipliers_m), np.ones(len(rows.counts_p), dtype=np.bool_)
        moments, active = moments_of(rows, terms, everything_p), rows.is_active_m
        hessian_mm = moments.hessian_mm.at(float(np.median(rows.counts_p)))
        free = np.flatnonzero(active)
        inverse_ff = np.linalg.pinv(hessian_mm[np.ix_(free, free)], rcond=1e-10, hermitian=True)
        n_groups = min(len(rows.counts_p), _MOST_GROUPS)
        group_p = np.arange(len(rows.counts_p)) % n_groups
        replicates = []
        for group in range(n_groups):
            kept_p = group_p != group
            moved_m = _solve_again(rows, terms, kept_p)
            replicates.append(moments_of(rows, prompt_terms(rows, moved_m, near=terms), kept_p))
        slope_m, errors_m = np.zeros(len(rows.names)), np.zeros(len(rows.names))
        slope_m[free] = inverse_ff @ np.mean(terms.reward_slope_mp, axis=-1)[free]
        influence_fp = inverse_ff @ terms.psi_mp[free]
        errors_m[free] = np.std(influence_fp, axis=-1, ddof=1) / math.sqrt(len(rows.counts_p))
        return cls(
            names=rows.names,
            n_prompts=len(rows.counts_p),
            n_responses=float(np.median(rows.counts_p)),
            multipliers_m=rows.multipliers_m,
            multiplier_errors_m=errors_m,
            is_active_m=active,
            is_equality_m=rows.is_equality_m,
            moments=moments,
            sampled_m=np.diag(moments.hessian_mm.first) * rows.beta,
            reference_m=np.mean(np.einsum("iip->ip", terms.reference_mmp), axis=-1),
            reward_slope_m=slope_m,
            kl=float(np.mean(terms.kl_p)),
            second_moment=float(np.mean(terms.second_moment_p)),
            collapsed_share=float(np.mean(terms.ess_p < 2)),
            counting_m=rows.counting_m,
            replicates=tuple(replicates),
            slopes=Slopes.measure(rows, terms, moments, errors_m),
        )

    def fewest_responses(self) -> int:
        """The fewest that a plan has."""
        return max(FEWEST_RESPONSES, self.carrying_responses())

    def carrying_responses(self) -> int:
        """Below, the log of the number of responses hides the KL: weights on K of them have at most ln K nats."""
        return math.ceil(math.exp(self.kl / LARGEST_KL_SHARE))

    @cached_property
    def degrees_m(self) -> FloatArray:
        """Degrees of freedom in effect of what the pilot's own slacks vary by between prompts, shape (m,)."""
        variance_m = np.diag(self.moments.variance_mm(self.n_responses))
        return _degrees(variance_m, self._squared_variance_errors(self.n_responses))

    @cached_property
    def room_errors_m(self) -> FloatArray:
        """Standard errors of ``moments.room_m``, the slacks of what does not bind, shape (m,)."""
        return np.sqrt(_jackknife_variance(np.array([one.room_m for one in self.replicates])))

    def bias_at(self, n_responses: float) -> FloatArray:
        """What so many responses a prompt leave the slacks off by, shape (m,); positive on the safe side."""
        return self.moments.biases_m(n_responses)

    def _squared_variance_errors(self, n_responses: float) -> FloatArray:
        variance_gm = np.array([np.diag(one.variance_mm(n_responses)) for one in self.replicates])
        return _jackknife_variance(variance_gm)

    def predict(self, n_responses: int) -> Prediction:
        """Where the slacks will lie with so many responses a prompt."""
        variance_mm = self.moments.covariance_mm(n_responses)
        error_m = np.sqrt(self._squared_variance_errors(n_responses))
        # Prompts that hardly differ leave a difference of two estimates that is all error: then a bound from above.
        variance_m = np.maximum(np.diag(variance_mm), math.sqrt(_FEWEST_DEGREES / 2) * error_m)
        variance_mm = variance_mm + np.diag(variance_m - np.diag(variance_mm))
        degrees_m = _degrees(variance_m, error_m**2)
        free = np.flatnonzero(self.is_active_m)
        offset_gm = np.array([one.offset_m(n_responses) for one in self.replicates])
        return Prediction(
            n_responses=n_responses,
            variance_mm=variance_mm,
            degrees_m=degrees_m,
            offset_m=self.moments.offset_m(n_responses),
            offset_errors_m=_RARE_PROMPTS * np.sqrt(_jackknife_variance(offset_gm)),
            two_sided_m=self.is_active_m,
            hessian_ff=self.moments.hessian_mm.at(n_responses)[np.ix_(free, free)],
            slopes_ffi=self.slopes.at(n_responses),
        )


def _solve_again(rows: PilotRows, terms: PromptTerms, kept_p: NDArray[np.bool_]) -> FloatArray:
    """The multipliers of the prompts kept, by a Newton step from those of all; what does not bind stays at 0."""
    free = np.flatnonzero(rows.is_active_m)
    moved_m = rows.multipliers_m.copy()
    if len(free):
        hessian_mm = np.mean(terms.hessian_mmp.at(rows.counts_p)[:, :, kept_p], axis=-1)
        hessian_ff = hessian_mm[np.ix_(free, free)]
        step_f = np.linalg.pinv(hessian_ff, rcond=1e-10, hermitian=True) @ np.mean(terms.psi_mp[free][:, kept_p], -1)
        moved_m[free] -= step_f
    return np.where(rows.is_equality_m, moved_m, np.maximum(moved_m, 0.0))


def _degrees(variance_m: FloatArray, squared_error_m: FloatArray) -> FloatArray:
    """An estimated variance with nu degrees of freedom has the relative variance 2 / nu."""
    known_m = squared_error_m > 0
    return np.where(known_m, 2.0 * variance_m**2 / np.where(known_m, squared_error_m, 1.0), np.inf)


def _jackknife_variance(values_gm: FloatArray) -> FloatArray:
    n_groups = len(values_gm)
    off_gm = values_gm - np.mean(values_gm, axis=0)
    return np.asarray((n_groups - 1) / n_groups * np.sum(off_gm**2, axis=0))
