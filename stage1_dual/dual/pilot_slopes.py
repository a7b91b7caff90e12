"""How the slope of the equations of a run errs with the equations themselves: the slack's error to the next order.

With psi_hat and H_hat the equations and their Hessian as a run shows them at the population's lam*, lam_hat solves
psi_hat + H_hat d = 0, and the slack in the population is

    S = H d = -H H_hat^{-1} psi_hat,

where both are curved by the same amount, to the second order. A run that happens to have few prompts with a strong
tilt shows too little slack *and* too little slope, and goes much too far; one with many falls short by less. So the
errors of the two matter together: given psi_hat = -z, H_hat is H - T[z] in the mean, T[z]_jk = sum_i t_jki z_i with
t_jk. = Cov(h_jk, psi) V^{-1}, h the Hessian of a prompt and V = A + B / K the covariance of the equations. No new
moments are needed: h is the derivative of psi in lam, so that the derivatives of V have them,

    D_k,ij = dV_ij / dlam_k = M_ik,j + M_jk,i,     M_jk,i = Cov(h_jk, psi_i) = (D_k,ij + D_j,ik - D_i,jk) / 2,

which is how a connection follows from a metric (Christoffel), as h_jk is symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stage1_dual.dual.pilot_moments import Moments, moments_of, nearest_covariance
from stage1_dual.dual.pilot_rows import PilotRows
from stage1_dual.dual.pilot_terms import PromptTerms, prompt_terms
from stage1_dual.dual.segments import FloatArray


@dataclass(frozen=True, eq=False)
class Slopes:
    """The covariance of the equations, and of the equations with their Hessian, of the constraints that bind (f).

    Attributes:
        moments: of the pilot.
        after: moments with the multiplier of each constraint that binds a step further.
        before: with it a step back.
        steps_f: twice the steps, reward per unit of the column, shape (f,).
    """

    moments: Moments
    after: tuple[Moments, ...]
    before: tuple[Moments, ...]
    steps_f: FloatArray

    @classmethod
    def measure(cls, rows: PilotRows, terms: PromptTerms, moments: Moments, steps_m: FloatArray) -> Slopes:
        """Two passes over the rows for each constraint that binds.

        Args:
            rows: the pilot.
            terms: of its prompts, at its multipliers.
            moments: of all prompts.
            steps_m: how far to move each multiplier, such as its standard error, shape (m,).
        """
        everything_p = np.ones(len(rows.counts_p), dtype=np.bool_)

        def moved(place: int, by: float) -> Moments:
            multipliers_m = rows.multipliers_m.copy()
            multipliers_m[place] += by
            return moments_of(rows, prompt_terms(rows, multipliers_m, near=terms), everything_p)

        free = [int(place) for place in np.flatnonzero(rows.is_active_m) if steps_m[place] > 0]
        if len(free) < np.count_nonzero(rows.is_active_m):  # a column that no prompt tells apart has no slope
            free = []
        return cls(
            moments=moments,
            after=tuple(moved(place, float(steps_m[place])) for place in free),
            before=tuple(moved(place, -float(steps_m[place])) for place in free),
            steps_f=2.0 * steps_m[free],
        )

    def at(self, n_responses: float) -> FloatArray:
        """t: the mean of H - H_hat by the error of the equations, with so many responses; shape (f, f, f), i last."""
        if not self.after:
            size = int(np.count_nonzero(self.moments.active_m))
            return np.zeros((size, size, size))
        moved_kff = np.stack(
            [
                (_covariance(one, n_responses) - _covariance(other, n_responses)) / step
                for one, other, step in zip(self.after, self.before, self.steps_f.tolist(), strict=True)
            ]
        )
        shared_ffi = (
            np.einsum("kij->jki", moved_kff) + np.einsum("jik->jki", moved_kff) - np.einsum("ijk->jki", moved_kff)
        ) / 2
        covariance_ff = nearest_covariance(_covariance(self.moments, n_responses))
        return np.asarray(shared_ffi @ np.linalg.pinv(covariance_ff, rcond=1e-10, hermitian=True))


def _covariance(moments: Moments, n_responses: float) -> FloatArray:
    """A + B / K of the equations of constraints that bind."""
    free = np.flatnonzero(moments.active_m)
    return np.asarray(moments.equations_mm(n_responses)[np.ix_(free, free)])
