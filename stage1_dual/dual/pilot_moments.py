"""What the error of the slack in the population is made of: its variance between prompts and by responses, its bias.

lam_hat solves mean_p psi_hat_p(lam) = 0 for the constraints that bind, with psi_hat_p the slack of a prompt as K
responses show it: its self-normalised tilted mean of g, minus what is demanded, minus its own reference mean where the
demand is a margin. Let S(lam) be the slack in the population: of all prompts, with responses without end. Then

    S(lam_hat) = S(lam_hat) - mean psi_hat(lam_hat)  =  C / K - Z + O(1/N + 1/K^2),   Var Z = (A + B / K) / N

to first order around lam*: an error of lam_hat does not matter by itself, only that of the equation it solves does.
That is why a KL budget, whose beta moves too, changes nothing here. C / K is minus the bias of a self-normalised
mean, -E_x E_ref[w^2 (g - E_lam g)] / K with w = pi_lam / pi_ref (Hesterberg 1988), A the variance between prompts of
the true psi, and B / K what the K responses of a prompt add, E_x E_ref[(w (g - E_lam g) - (g - E_ref g))^2] / K for a
margin. The prompts give A, as the variance of psi_hat less what their own responses added (``pilot_terms``). Prompts
with a strong tilt are also those that few responses hold back most: psi_hat_p is psi_p - C_p / K in the mean, and A is
less by 2 Cov(psi, C) / K, which halves of the responses show, one psi and the other C.

A constraint j that does not bind moves with those that do, by H_jA H_AA^-1 of their errors. With few responses the
Hessian by which lam_hat moves is low, by the bias of a variance, and the slacks are off by as much more: by
H(infinity) H(K)^-1.

References: Hesterberg, thesis, Stanford (1988); Hu et al., arXiv 1905.11957, for the rates of such problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.pilot_rows import PilotRows
from stage1_dual.dual.pilot_terms import PromptTerms, Series
from stage1_dual.dual.segments import FloatArray


@dataclass(frozen=True, eq=False)
class Moments:
    """A, B, C of the equations, how slacks follow them, and where the slacks of constraints that do not bind lie."""

    between_mm: Series
    within_mm: Series
    bias_m: Series
    hessian_mm: Series
    active_m: NDArray[np.bool_]
    room_m: FloatArray

    def moves_mm(self, n_responses: float) -> FloatArray:
        """How slacks in the population follow errors of the equations that are solved, shape (m, m).

        lam moves by the Hessian as K responses show it, which is low, and the slacks by the population's.
        """
        moves_mm, free = np.zeros_like(self.hessian_mm.first), np.flatnonzero(self.active_m)
        shown_ff = self.hessian_mm.at(n_responses)[np.ix_(free, free)]
        moves_mm[:, free] = self.hessian_mm.first[:, free] @ np.linalg.pinv(shown_ff, rcond=1e-10, hermitian=True)
        return moves_mm

    def equations_mm(self, n_responses: float) -> FloatArray:
        """A + B / K, the variance of the equations, times the number of prompts, shape (m, m)."""
        return np.asarray(self.between_mm.at(n_responses) + self.within_mm.at(n_responses) / n_responses)

    def variance_mm(self, n_responses: float) -> FloatArray:
        """Of the slacks, times the number of prompts, shape (m, m)."""
        moves_mm = self.moves_mm(n_responses)
        return moves_mm @ self.equations_mm(n_responses) @ moves_mm.T

    def covariance_mm(self, n_responses: float) -> FloatArray:
        """The same, made one that can be: a difference of two estimates may have negative variances."""
        moves_mm = self.moves_mm(n_responses)
        between_mm, within_mm = self.between_mm.at(n_responses), self.within_mm.at(n_responses)
        equations_mm = nearest_covariance(between_mm) + nearest_covariance(within_mm) / n_responses
        return moves_mm @ equations_mm @ moves_mm.T

    def biases_m(self, n_responses: float) -> FloatArray:
        """What so many responses leave the slacks off by, shape (m,)."""
        return np.asarray(self.moves_mm(n_responses) @ self.bias_m.at(n_responses) / n_responses)

    def offset_m(self, n_responses: float) -> FloatArray:
        """What is expected of the slacks, shape (m,)."""
        return np.asarray(self.room_m + self.biases_m(n_responses))


def moments_of(rows: PilotRows, terms: PromptTerms, kept_p: NDArray[np.bool_]) -> Moments:
    """Of the prompts kept; ``room_m`` is 0 where a constraint binds, else its slack at the population's lam*."""
    psi_mp = terms.psi_mp[:, kept_p]
    found = Moments(
        between_mm=_between(rows, terms, kept_p),
        within_mm=terms.within_mmp.mean(kept_p),
        bias_m=terms.bias_mp.mean(kept_p),
        hessian_mm=terms.hessian_mmp.mean(kept_p),
        active_m=rows.is_active_m,
        room_m=np.zeros(len(psi_mp)),
    )
    if found.active_m.all():
        return found
    # What binds has no room; the rest is seen at lam_hat, whose own bias is taken off.
    own_m = np.mean((terms.bias_mp.at(rows.counts_p) / rows.counts_p)[:, kept_p], axis=-1)
    seen_m = np.mean(psi_mp, axis=-1) + own_m - found.moves_mm(math.inf) @ own_m
    return replace(found, room_m=np.where(found.active_m, 0.0, seen_m))


def _between(rows: PilotRows, terms: PromptTerms, kept_p: NDArray[np.bool_]) -> Series:
    """A, by the variance of psi_hat less what its own responses added, and how few of them hold it back."""
    m, counts_p = len(terms.psi_mp), rows.counts_p[kept_p]
    own_mmp = (terms.within_mmp.at(rows.counts_p) / rows.counts_p)[:, :, kept_p]
    seen_mm = np.atleast_2d(np.cov(terms.psi_mp[:, kept_p])) - np.mean(own_mmp, axis=-1)
    shared_mm = np.mean(
        [
            np.cov(psi_mp[:, kept_p], bias_mp[:, kept_p])[:m, m:]
            for psi_mp, bias_mp in zip(terms.psi_hmp, terms.bias_hmp[::-1], strict=True)
        ],
        axis=0,
    )
    second_mm = -(shared_mm + shared_mm.T)
    return Series(seen_mm - second_mm * float(np.mean(1.0 / counts_p)), second_mm)


def nearest_covariance(matrix_mm: FloatArray) -> FloatArray:
    """The nearest matrix that is a covariance: a difference of two estimates may be none."""
    values, vectors = np.linalg.eigh((matrix_mm + matrix_mm.T) / 2)
    return np.asarray((vectors * np.maximum(values, 0.0)) @ vectors.T)
