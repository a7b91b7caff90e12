"""How many prompts and how many responses a demand needs, from a pilot: where the population's slack will lie.

lam_hat solves mean_p psi_hat_p(lam) = 0 for the constraints that bind, with psi_hat_p the slack of a prompt as K
responses show it: its self-normalised tilted mean of g, minus what is demanded, minus its own reference mean where the
demand is a margin. Let S(lam) be the slack in the population: of all prompts, with responses without end. Then

    S(lam_hat) = S(lam_hat) - mean psi_hat(lam_hat)  =  C / K - Z + O(1/N + 1/K^2),   Var Z = (A + B / K) / N

to first order around lam*: an error of lam_hat does not matter by itself, only that of the equation it solves does.
That is why a KL budget, whose beta moves too, changes nothing here. C / K is minus the bias of a self-normalised
mean, -E_x E_ref[w^2 (g - E_lam g)] / K with w = pi_lam / pi_ref (Hesterberg 1988), A the variance between prompts of
the true psi, and B / K what the K responses of a prompt add, E_x E_ref[(w (g - E_lam g) - (g - E_ref g))^2] / K for a
margin. A constraint j that does not bind moves with those that do, by H_jA H_AA^-1 of their errors. With few responses
the Hessian by which lam_hat moves is low, by the bias of a variance, and the slacks are off by as much more: by
H(infinity) H(K)^-1.

The pilot's responses give C and B by the jackknife that leaves out one response of a prompt at a time, which has a
closed form: without response k a tilted mean moves by w_k (E_lam g - g_k) / (1 - w_k). The same on the halves of each
prompt's responses shows how what it finds moves with their number, J(K) = J_0 + J_1 / K, which gives the next terms:
the bias is J_0 / K + J_1 / (2 K^2), since a jackknife sees the second term of a bias twice, and the variance
J_0 / K + J_1 / K^2. The prompts give A, as the variance of psi_hat less what their own responses added. All of it
comes with an error, since the pilot is small; lam_hat is among what it got wrong. A jackknife over groups of prompts,
each of which solves again by a Newton step, says how large it is. The slack to come is then predicted as Stein (1945)
did for a mean: by Student's t, of as many degrees of freedom as the estimated variance has (Satterthwaite), about a
bias that has an error of its own.

References: Stein, Ann. Math. Statist. 16 (1945) 243; Efron and Stein, Ann. Statist. 9 (1981) 586; Hesterberg, thesis,
Stanford (1988); Hu et al., arXiv 1905.11957, for the rates of such problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.errors import InputError
from stage1_dual.dual.problem import LARGEST_KL_SHARE
from stage1_dual.dual.segments import FloatArray, IntArray, Segments

# Groups of prompts that the jackknife leaves out one at a time: enough for an error of an error.
_MOST_GROUPS = 30
# Draws of the predicted slack: 0.2 points of a probability of 5.
_DRAWS = 10_000
LARGEST_CONFIDENCE = 0.999
"""Of a plan: ten of the draws are beyond it, and one asked for more would be told from none."""
# What an estimated variance is taken to have at least.
_FEWEST_DEGREES = 8.0
# A few prompts with a strong tilt make most of the bias; a pilot that has few of them finds little, and little error.
_RARE_PROMPTS = 1.5
# Where numbers of responses are looked for.
_RESPONSES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_FEWEST_PROMPTS = 30
_MOST_PROMPTS = 10_000_000
_Z_INTERVAL = 1.959963984540054
# A weight this near to 1 is the only response that counts: leaving it out would leave nothing.
_LARGEST_WEIGHT = 1 - 1e-9

# What a plan is not trusted beyond; benchmarks/plan_validation.py has the cases that they are drawn from.
FEWEST_PILOT_PROMPTS = 30
FEWEST_PILOT_RESPONSES = 8
LARGEST_PILOT_KL_SHARE = 0.5
LARGEST_COLLAPSED_SHARE = 0.1
FEWEST_DEGREES = 12.0
LARGEST_BIAS_SHARE = 0.35
"""Of what is allowed, the share that the bias with its standard error may take: a few prompts with a strong tilt make
most of it, and a pilot may have none of them."""
WANTED_BIAS_SHARE = 0.2
"""The same of the bias alone, where the number of responses is chosen."""


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
            raise InputError(
                f"{np.count_nonzero(self.counts_p < 2)} of {len(self.counts_p)} prompts of the pilot have 1 response; "
                "what another one would change can be told from 2 on"
            )
        if len(self.counts_p) < 4:
            raise InputError(f"the pilot has {len(self.counts_p)} prompts; a plan needs at least 4, and 64 are enough")

    @property
    def is_active_m(self) -> NDArray[np.bool_]:
        """Constraints that bind on the pilot, shape (m,)."""
        return np.asarray((self.multipliers_m > 0) | self.is_equality_m, dtype=np.bool_)

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


@dataclass(frozen=True, eq=False)
class _Series:
    """What responses add, times their number: ``first`` + ``second`` / K, prompt by prompt on the last axis or not."""

    first: FloatArray
    second: FloatArray

    def at(self, n_responses: float | FloatArray | IntArray) -> FloatArray:
        """Times the number of responses."""
        return np.asarray(self.first + self.second / n_responses)

    def moved_to(self, value: FloatArray, n_responses: FloatArray | IntArray) -> _Series:
        """The series with the same second term that has this value at a number of responses."""
        return _Series(value - self.second / n_responses, self.second)

    def mean(self, kept_p: NDArray[np.bool_]) -> _Series:
        """Over the prompts kept."""
        return _Series(np.mean(self.first[..., kept_p], axis=-1), np.mean(self.second[..., kept_p], axis=-1))

    @classmethod
    def through(cls, whole: FloatArray, half: FloatArray, counts_p: IntArray, half_p: FloatArray) -> _Series:
        """Through values on all and on half of the responses, (..., p) each; constant where there are no halves."""
        step_p = 1.0 / half_p - 1.0 / counts_p
        second = np.where(step_p > 0, (half - whole) / np.where(step_p > 0, step_p, 1.0), 0.0)
        return cls(whole - second / counts_p, second)


@dataclass(frozen=True, eq=False)
class _PromptTerms:
    """What each prompt contributes at some multipliers; B and C are scaled to one response."""

    psi_mp: FloatArray
    within_mmp: _Series
    bias_mp: _Series
    hessian_mmp: _Series
    reward_slope_mp: FloatArray
    reference_mmp: FloatArray
    kl_p: FloatArray
    second_moment_p: FloatArray
    ess_p: FloatArray


@dataclass(frozen=True, eq=False)
class _Jackknife:
    """Leaving out one response of a prompt at a time; both scaled to one response."""

    within_mmp: FloatArray
    bias_mp: FloatArray


def _prompt_terms(rows: PilotRows, multipliers_m: FloatArray, *, near: _PromptTerms | None = None) -> _PromptTerms:
    """Everything at some multipliers; with terms ``near``, how it moves with the number of responses is theirs."""
    weight_n, logit_n, total_p = _weights(rows, multipliers_m)
    segments = Segments.from_counts(rows.counts_p)
    counts_p, beta = rows.counts_p, rows.beta
    whole, hessian_mmp = _jackknife(rows, weight_n), _hessian(rows, weight_n)
    if near is None:
        within, bias, hessian = _through_halves(rows, multipliers_m, whole, hessian_mmp)
    else:
        within = near.within_mmp.moved_to(whole.within_mmp, counts_p)
        # Of the series of a bias, at all responses twice the second term is what a jackknife finds.
        second_mp = near.bias_mp.second
        bias = _Series(whole.bias_mp - 2 * second_mp / counts_p, second_mp)
        hessian = near.hessian_mmp.moved_to(hessian_mmp, counts_p)
    mean_mp, reference_mp = segments.sum(rows.column_mn * weight_n), segments.mean(rows.reference_mn)
    off_mn = segments.subtract(rows.column_mn, mean_mp)
    reference_off_mn = segments.subtract(rows.reference_mn, reference_mp)
    rest_n = np.maximum(1.0 - weight_n, 1.0 - _LARGEST_WEIGHT)
    reward_off_n = segments.subtract(rows.reward_n, segments.dot(weight_n, rows.reward_n))
    # The KL is E_w[logit] - log mean exp logit; leaving out k moves both in closed form.
    logit_p = segments.dot(weight_n, logit_n)
    log_z_p = np.log(total_p / counts_p)
    kl_moved_n = weight_n / rest_n * -segments.subtract(logit_n, logit_p) - np.log(rest_n)
    kl_bias_p = (counts_p - 1) / counts_p * (segments.sum(kl_moved_n) + counts_p * np.log((counts_p - 1) / counts_p))
    squared_p = segments.dot(weight_n, weight_n)
    return _PromptTerms(
        psi_mp=mean_mp - reference_mp - rows.target_m[:, np.newaxis],
        within_mmp=within,
        bias_mp=bias,
        hessian_mmp=hessian,
        reward_slope_mp=segments.sum(off_mn * (weight_n * reward_off_n)) / beta,
        reference_mmp=_products(segments, reference_off_mn, reference_off_mn) / (counts_p - 1),
        kl_p=logit_p - log_z_p - kl_bias_p,
        second_moment_p=counts_p * squared_p,
        ess_p=1.0 / squared_p,
    )


def _through_halves(
    rows: PilotRows, multipliers_m: FloatArray, whole: _Jackknife, hessian_mmp: FloatArray
) -> tuple[_Series, _Series, _Series]:
    """B, C and the Hessian as they move with the number of responses."""
    halves = [rows.half(part) for part in range(2)]
    weights = [_weights(half, multipliers_m)[0] for half in halves]
    found = [_jackknife(half, weight_n) for half, weight_n in zip(halves, weights, strict=True)]
    hessians = [_hessian(half, weight_n) for half, weight_n in zip(halves, weights, strict=True)]
    half_p = np.mean([half.counts_p for half in halves], axis=0)
    within_mmp, bias_mp = (
        np.mean([one.within_mmp for one in found], axis=0),
        np.mean([one.bias_mp for one in found], axis=0),
    )
    bias = _Series.through(whole.bias_mp, bias_mp, rows.counts_p, half_p)
    return (
        _Series.through(whole.within_mmp, within_mmp, rows.counts_p, half_p),
        _Series(bias.first, bias.second / 2),
        _Series.through(hessian_mmp, np.mean(hessians, axis=0), rows.counts_p, half_p),
    )


def _weights(rows: PilotRows, multipliers_m: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Tilted weights, shape (n,); their logits, the largest of a prompt 0; and sums of the exp of these, (p,)."""
    segments = Segments.from_counts(rows.counts_p)
    logit_n = (rows.reward_n + multipliers_m @ rows.column_mn) / rows.beta
    logit_n = segments.subtract(logit_n, segments.max(logit_n))
    with np.errstate(under="ignore"):
        weight_n = np.exp(logit_n)
    total_p = segments.sum(weight_n)
    return segments.divide(weight_n, total_p), logit_n, total_p


def _jackknife(rows: PilotRows, weight_n: FloatArray) -> _Jackknife:
    segments, counts_p = Segments.from_counts(rows.counts_p), rows.counts_p
    off_mn = segments.subtract(rows.column_mn, segments.sum(rows.column_mn * weight_n))
    reference_off_mn = segments.subtract(rows.reference_mn, segments.mean(rows.reference_mn))
    # Without response k: (1 - w_k) in place of 1 in the denominators.
    rest_n = np.maximum(1.0 - weight_n, 1.0 - _LARGEST_WEIGHT)
    moved_mn = segments.divide(reference_off_mn, (counts_p - 1).astype(np.float64)) - weight_n / rest_n * off_mn
    moved_mp = segments.sum(moved_mn)
    centred_mn = segments.subtract(moved_mn, moved_mp / counts_p)
    scale_p = (counts_p - 1).astype(np.float64)  # (K - 1) / K, times K: of one response
    return _Jackknife(_products(segments, centred_mn, centred_mn) * scale_p, -moved_mp * scale_p)


def _hessian(rows: PilotRows, weight_n: FloatArray) -> FloatArray:
    """Cov_lam of the columns over beta, shape (m, m, p)."""
    segments = Segments.from_counts(rows.counts_p)
    off_mn = segments.subtract(rows.column_mn, segments.sum(rows.column_mn * weight_n))
    return _products(segments, off_mn * weight_n, off_mn) / rows.beta


def _products(segments: Segments, left_in: FloatArray, right_jn: FloatArray) -> FloatArray:
    return np.stack([segments.sum(right_jn * row_n) for row_n in left_in])


@dataclass(frozen=True, eq=False)
class _Moments:
    """A, B, C of the equations, how slacks follow them, and where the slacks of constraints that do not bind lie."""

    between_mm: FloatArray
    within_mm: _Series
    bias_m: _Series
    hessian_mm: _Series
    active_m: NDArray[np.bool_]
    room_m: FloatArray

    def moves_mm(self, n_responses: float) -> FloatArray:
        """How slacks in the population follow errors of the equations that are solved, shape (m, m).

        lam moves by the Hessian as K responses show it, which is low, and the slacks by the population's.
        """
        moves_mm, free = np.zeros_like(self.between_mm), np.flatnonzero(self.active_m)
        shown_ff = self.hessian_mm.at(n_responses)[np.ix_(free, free)]
        moves_mm[:, free] = self.hessian_mm.first[:, free] @ np.linalg.pinv(shown_ff, rcond=1e-10, hermitian=True)
        return moves_mm

    def variance_mm(self, n_responses: float) -> FloatArray:
        """Of the slacks, times the number of prompts, shape (m, m)."""
        moves_mm = self.moves_mm(n_responses)
        return moves_mm @ (self.between_mm + self.within_mm.at(n_responses) / n_responses) @ moves_mm.T

    def covariance_mm(self, n_responses: float) -> FloatArray:
        """The same, made one that can be: a difference of two estimates may have negative variances."""
        moves_mm = self.moves_mm(n_responses)
        equations_mm = _positive(self.between_mm) + _positive(self.within_mm.at(n_responses)) / n_responses
        return moves_mm @ equations_mm @ moves_mm.T

    def biases_m(self, n_responses: float) -> FloatArray:
        """What so many responses leave the slacks off by, shape (m,)."""
        return np.asarray(self.moves_mm(n_responses) @ self.bias_m.at(n_responses) / n_responses)

    def offset_m(self, n_responses: float) -> FloatArray:
        """What is expected of the slacks, shape (m,)."""
        return np.asarray(self.room_m + self.biases_m(n_responses))


def _moments(rows: PilotRows, terms: _PromptTerms, kept_p: NDArray[np.bool_]) -> _Moments:
    """Of the prompts kept; ``room_m`` is 0 where a constraint binds, else its slack at the population's lam*."""
    psi_mp = terms.psi_mp[:, kept_p]
    own_mmp = terms.within_mmp.at(rows.counts_p) / rows.counts_p
    found = _Moments(
        between_mm=np.atleast_2d(np.cov(psi_mp)) - np.mean(own_mmp[:, :, kept_p], axis=-1),
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
    """

    names: tuple[str, ...]
    n_prompts: int
    n_responses: float
    multipliers_m: FloatArray
    multiplier_errors_m: FloatArray
    is_active_m: NDArray[np.bool_]
    is_equality_m: NDArray[np.bool_]
    moments: _Moments
    sampled_m: FloatArray
    reference_m: FloatArray
    reward_slope_m: FloatArray
    kl: float
    second_moment: float
    collapsed_share: float
    counting_m: IntArray
    replicates: tuple[_Moments, ...]

    @classmethod
    def measure(cls, rows: PilotRows) -> Pilot:
        """One pass over the rows, and one more for each group of prompts of the jackknife."""
        terms, everything_p = _prompt_terms(rows, rows.multipliers_m), np.ones(len(rows.counts_p), dtype=np.bool_)
        moments, active = _moments(rows, terms, everything_p), rows.is_active_m
        hessian_mm = moments.hessian_mm.at(float(np.median(rows.counts_p)))
        free = np.flatnonzero(active)
        inverse_ff = np.linalg.pinv(hessian_mm[np.ix_(free, free)], rcond=1e-10, hermitian=True)
        n_groups = min(len(rows.counts_p), _MOST_GROUPS)
        group_p = np.arange(len(rows.counts_p)) % n_groups
        replicates = []
        for group in range(n_groups):
            kept_p = group_p != group
            moved_m = _solve_again(rows, terms, kept_p)
            replicates.append(_moments(rows, _prompt_terms(rows, moved_m, near=terms), kept_p))
        slope_m, errors_m = np.zeros(len(rows.names)), np.zeros(len(rows.names))
        slope_m[free] = inverse_ff @ np.mean(terms.reward_slope_mp, axis=-1)[free]
        influence_fp = inverse_ff @ terms.psi_mp[free]
        errors_m[free] = np.std(influence_fp, axis=-1, ddof=1) / math.sqrt(len(rows.counts_p))
        segments = Segments.from_counts(rows.counts_p)
        varies_mp = segments.max(rows.column_mn) > -segments.max(-rows.column_mn)
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
            counting_m=np.count_nonzero(varies_mp, axis=-1).astype(np.int64),
            replicates=tuple(replicates),
        )

    def fewest_responses(self) -> int:
        """Below, the log of the number of responses hides the KL: weights on K of them have at most ln K nats."""
        return max(_RESPONSES[0], math.ceil(math.exp(self.kl / LARGEST_KL_SHARE)))

    @cached_property
    def degrees_m(self) -> FloatArray:
        """Degrees of freedom in effect of what the pilot's own slacks vary by between prompts, shape (m,)."""
        variance_m = np.diag(self.moments.variance_mm(self.n_responses))
        return _degrees(variance_m, self._squared_variance_errors(self.n_responses))

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
        offset_gm = np.array([one.offset_m(n_responses) for one in self.replicates])
        return Prediction(
            n_responses=n_responses,
            variance_mm=variance_mm,
            degrees_m=degrees_m,
            offset_m=self.moments.offset_m(n_responses),
            offset_errors_m=_RARE_PROMPTS * np.sqrt(_jackknife_variance(offset_gm)),
            two_sided_m=self.is_active_m,
        )


def _solve_again(rows: PilotRows, terms: _PromptTerms, kept_p: NDArray[np.bool_]) -> FloatArray:
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


def _positive(matrix_mm: FloatArray) -> FloatArray:
    """The nearest matrix that is a covariance: a difference of two estimates may be none."""
    values, vectors = np.linalg.eigh((matrix_mm + matrix_mm.T) / 2)
    return np.asarray((vectors * np.maximum(values, 0.0)) @ vectors.T)


def _jackknife_variance(values_gm: FloatArray) -> FloatArray:
    n_groups = len(values_gm)
    off_gm = values_gm - np.mean(values_gm, axis=0)
    return np.asarray((n_groups - 1) / n_groups * np.sum(off_gm**2, axis=0))


@dataclass(frozen=True, eq=False)
class Prediction:
    """The slacks in the population of a run to come, with a number of responses a prompt.

    Attributes:
        n_responses: responses a prompt.
        variance_mm: of the slack, times the number of prompts, shape (m, m).
        degrees_m: degrees of freedom of the diagonal's estimate, shape (m,).
        offset_m: what is expected of the slack, shape (m,).
        offset_errors_m: standard error of that, shape (m,).
        two_sided_m: constraints that are held at their demand; others are only missed from below, shape (m,).
    """

    n_responses: int
    variance_mm: FloatArray
    degrees_m: FloatArray
    offset_m: FloatArray
    offset_errors_m: FloatArray
    two_sided_m: NDArray[np.bool_]

    def errors_m(self, n_prompts: float) -> FloatArray:
        """Standard errors of the slacks with so many prompts, shape (m,)."""
        return np.asarray(np.sqrt(np.diag(self.variance_mm) / n_prompts))

    def miss(self, n_prompts: float, within_m: FloatArray) -> float:
        """Probability that some slack in the population is off the demand by more than ``within_m``."""
        slack_dm = self.offset_m + self._offset_dm + self._spread_dm / math.sqrt(n_prompts)
        missed_dm = (slack_dm < -within_m) | (self.two_sided_m & (slack_dm > within_m))
        return float(np.mean(missed_dm.any(axis=1)))

    def reach(self, n_prompts: float, within_m: FloatArray, *, confidence: float) -> float:
        """How far slacks are off at that confidence with so many prompts, in units of ``within_m``."""
        slack_dm = self.offset_m + self._offset_dm + self._spread_dm / math.sqrt(n_prompts)
        off_dm = np.where(self.two_sided_m, np.abs(slack_dm), np.maximum(-slack_dm, 0.0)) / within_m
        return float(np.quantile(off_dm.max(axis=1), confidence))

    def prompts(self, within_m: FloatArray, *, confidence: float) -> int | None:
        """The fewest prompts with which all slacks are within at that confidence; None where no number does."""
        low, high = _FEWEST_PROMPTS, _FEWEST_PROMPTS
        while self.miss(high, within_m) > 1 - confidence:
            low, high = high, high * 2
            if high > _MOST_PROMPTS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.miss(middle, within_m) > 1 - confidence:
                low = middle
            else:
                high = middle
        return high

    @cached_property
    def _offset_dm(self) -> FloatArray:
        _, offset_dm, _ = _draws(len(self.offset_m))
        return offset_dm * self.offset_errors_m

    @cached_property
    def _spread_dm(self) -> FloatArray:
        """Draws of the slack's error times the root of the number of prompts, shape (draws, m)."""
        normal_dm, _, chi_d1 = _draws(len(self.offset_m))
        values, vectors = np.linalg.eigh(self.variance_mm)
        root_mm = vectors * np.sqrt(np.maximum(values, 0.0))
        # Chi-squared over its degrees of freedom, by Wilson and Hilferty's cube: to 1% from 8 degrees on.
        narrow_m = 2.0 / (9.0 * self.degrees_m)
        chi_dm = (1.0 - narrow_m + np.sqrt(narrow_m) * chi_d1) ** 3
        return np.asarray(normal_dm @ root_mm.T / np.sqrt(np.maximum(chi_dm, 1e-3)))


@cache
def _draws(n_constraints: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Normal draws of slacks and of their offsets, shape (draws, m), and of the estimate of all variances, (draws, 1).

    The same for all predictions, so that they compare; pilots that spread too little do so for every constraint.
    """
    rng = np.random.default_rng(0)
    shape = (_DRAWS, n_constraints)
    return rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=(_DRAWS, 1))


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """A number of prompts and of responses, and what is expected of them. Units are those of the columns.

    Attributes:
        n_prompts: prompts that determine lam*; None where no number of them will do with the responses there may be.
        n_responses: responses to each.
        miss: probability that some slack is off the demand by more than is allowed.
        errors_m: standard errors of the slacks, shape (m,).
        offset_m: expected slacks, shape (m,): what few responses leave on the safe side, or the room of what does not
            bind.
        reward_cost: reward that is given away by the number of responses being finite, reward units.
        evaluation_prompts: prompts of the final evaluation; None where no number of them will do.
        room_m: what is then to be asked beyond the demand, shape (m,).
        reasons: why the plan is not to be trusted; empty where it is.
    """

    n_prompts: int | None
    n_responses: int
    miss: float
    errors_m: FloatArray
    offset_m: FloatArray
    reward_cost: float
    evaluation_prompts: int | None
    room_m: FloatArray
    reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SizeRequest:
    """What a plan is asked for.

    Attributes:
        within_m: how far a slack may be from the demand, units of the columns, shape (m,), positive.
        confidence: with which probability all are, between 0 and 1.
        evaluation_responses: responses a prompt of the final evaluation; None for as many as the plan has.
        room_m: how much more than the demand may be asked for so that the evaluation says *satisfied*, shape (m,).
        n_responses: fixed number of responses, or None.
        n_prompts: fixed number of prompts, or None.
        most_prompts: prompts there are, or None.
        most_responses: responses at most, or None.
        drawn_prompts: prompts that are there already, which a plan has at least.
        drawn_responses: responses a prompt that are there already.
    """

    within_m: FloatArray
    confidence: float
    evaluation_responses: int | None
    room_m: FloatArray
    n_responses: int | None = None
    n_prompts: int | None = None
    most_prompts: int | None = None
    most_responses: int | None = None
    drawn_prompts: int = 0
    drawn_responses: int = 0


def plan_sizes(pilot: Pilot, request: SizeRequest) -> SamplePlan:
    """The cheapest N x K with which every slack is within; where none is, the best there is, and why it is not.

    Args:
        pilot: what was measured.
        request: what is asked for.
    """
    reasons = _pilot_reasons(pilot)
    found = _cheapest(pilot, request)
    n_prompts: int | None
    if found is not None:
        n_prompts, chosen = found
    else:
        n_prompts, chosen, reason = _best_there_is(pilot, request)
        reasons.append(reason)
    reasons += _size_reasons(pilot, request, chosen)
    n_reckoned = _MOST_PROMPTS if n_prompts is None else n_prompts
    evaluation_prompts = None if n_prompts is None else _evaluation_prompts(pilot, request, chosen, n_prompts)
    return SamplePlan(
        n_prompts=n_prompts,
        n_responses=chosen.n_responses,
        miss=chosen.miss(n_reckoned, request.within_m),
        errors_m=chosen.errors_m(n_reckoned),
        offset_m=chosen.offset_m,
        reward_cost=reward_cost(pilot, chosen.n_responses),
        evaluation_prompts=evaluation_prompts,
        room_m=request.room_m,
        reasons=tuple(reasons),
    )


def top_up(pilot: Pilot, request: SizeRequest) -> tuple[int, int] | None:
    """The numbers of prompts and responses to go on to from those that are drawn, which are the pilot.

    The cheapest that will do, but no more than four times as many of either at once: what is drawn says it better than
    what was drawn before. Where nothing within the limits will do, twice as many of both.

    Args:
        pilot: what was measured on all that is drawn.
        request: what is asked for, with ``drawn_prompts``, ``drawn_responses``, ``most_prompts``, ``most_responses``.

    Returns:
        Prompts and responses; None where the limits are reached.
    """
    now = (request.drawn_prompts, request.drawn_responses)
    most = (request.most_prompts or _MOST_PROMPTS, request.most_responses or _RESPONSES[-1])
    found = _cheapest(pilot, request)
    wanted = (2 * now[0], 2 * now[1]) if found is None else (found[0], found[1].n_responses)
    sizes = tuple(max(drawn, min(one, 4 * drawn, limit)) for one, drawn, limit in zip(wanted, now, most, strict=True))
    return None if sizes == now else (sizes[0], sizes[1])


def _cheapest(pilot: Pilot, request: SizeRequest) -> tuple[int, Prediction] | None:
    """The smallest N x K within the limits with which every slack is within, or None."""
    counts = _response_counts(pilot, request)
    # Where no number of responses leaves so little bias, all are candidates, and the plan says so.
    counts = [count for count in counts if _bias_share(pilot, request, count) <= WANTED_BIAS_SHARE] or counts
    candidates = [
        (needed, prediction)
        for prediction in map(pilot.predict, counts)
        if (needed := _enough_prompts(prediction, request)) is not None
    ]
    return min(candidates, key=lambda one: (one[0] * one[1].n_responses, one[0])) if candidates else None


def _bias_share(pilot: Pilot, request: SizeRequest, n_responses: int) -> float:
    """The largest bias of a constraint that binds, as a share of what is allowed."""
    shares_m = np.abs(pilot.bias_at(n_responses)) / request.within_m
    return float(np.max(shares_m[pilot.is_active_m], initial=0.0))


def reward_cost(pilot: Pilot, n_responses: int) -> float:
    """Reward that is given away because the policy, on so few responses, ends C / K beyond its demand."""
    return float(-pilot.reward_slope_m @ pilot.bias_at(n_responses))


def _response_counts(pilot: Pilot, request: SizeRequest) -> Sequence[int]:
    if request.n_responses is not None:
        return [request.n_responses]
    lowest = max(pilot.fewest_responses(), request.drawn_responses)
    highest = request.most_responses or max(_RESPONSES[-1], lowest)
    inside = [count for count in _RESPONSES if lowest <= count <= highest]
    return sorted({*inside, *([lowest] if lowest <= highest else [highest])})


def _enough_prompts(prediction: Prediction, request: SizeRequest) -> int | None:
    if request.n_prompts is not None:
        within = prediction.miss(request.n_prompts, request.within_m) <= 1 - request.confidence
        return request.n_prompts if within else None
    needed = prediction.prompts(request.within_m, confidence=request.confidence)
    if needed is None or needed > (request.most_prompts or needed):
        return None
    return max(needed, request.drawn_prompts)


def _best_there_is(pilot: Pilot, request: SizeRequest) -> tuple[int | None, Prediction, str]:
    """Where nothing within the limits will do: the sizes that come nearest, and what would be needed."""
    n_prompts = request.n_prompts or request.most_prompts
    n_reckoned = _MOST_PROMPTS if n_prompts is None else n_prompts
    tried = [pilot.predict(count) for count in _response_counts(pilot, request)]
    chosen = min(tried, key=lambda one: (one.miss(n_reckoned, request.within_m), one.n_responses))
    miss = chosen.miss(n_reckoned, request.within_m)
    prompts = "prompts without end" if n_prompts is None else f"{n_prompts:,} prompts"
    reason = (
        f"with {prompts} and at most {tried[-1].n_responses:,} responses each the demand is missed by more than is "
        f"allowed with probability {miss:.1%}, where {1 - request.confidence:.1%} is asked for"
    )
    needed = chosen.prompts(request.within_m, confidence=request.confidence)
    if n_prompts is not None and needed is not None:
        reason += f"; {needed:,} prompts of {chosen.n_responses:,} responses would do"
    return n_prompts, chosen, reason


def _pilot_reasons(pilot: Pilot) -> list[str]:
    """Why nothing that follows from this pilot is to be trusted."""
    reasons = []
    if not pilot.is_active_m.any():
        nothing = (
            "no constraint binds: lambda* is 0, the reward alone meets the demand, and the plan, which is about the "
            "error of lambda*, has nothing to say"
        )
        return [nothing]
    for j, name in enumerate(pilot.names):
        if pilot.is_active_m[j] and not pilot.is_equality_m[j]:
            value, error = pilot.multipliers_m[j], pilot.multiplier_errors_m[j]
            if value < _Z_INTERVAL * error:
                reasons.append(
                    f"{name}: lambda* is {value:.3g} with a standard error of {error:.2g} on the pilot: it may be 0, "
                    "and the demand met by the reward alone"
                )
        if pilot.counting_m[j] < FEWEST_PILOT_PROMPTS:
            reasons.append(
                f"{name}: {pilot.counting_m[j]} prompts of the pilot have responses that differ in it; "
                f"{FEWEST_PILOT_PROMPTS} are needed to say how prompts differ"
            )
        if pilot.is_active_m[j] and pilot.degrees_m[j] < FEWEST_DEGREES:
            reasons.append(
                f"{name}: a few prompts of the pilot carry how prompts differ ({pilot.degrees_m[j]:.0f} degrees of "
                f"freedom in effect, {FEWEST_DEGREES:.0f} are needed); more prompts"
            )
    if pilot.n_responses < FEWEST_PILOT_RESPONSES:
        reasons.append(
            f"the median prompt of the pilot has {pilot.n_responses:.0f} responses; "
            f"{FEWEST_PILOT_RESPONSES} are needed"
        )
    share = pilot.kl / math.log(pilot.n_responses)
    if share > LARGEST_PILOT_KL_SHARE:
        reasons.append(
            f"the KL of {pilot.kl:.2f} nats is {share:.0%} of the log of the pilot's {pilot.n_responses:.0f} "
            f"responses: a pilot of {math.ceil(math.exp(pilot.kl / LARGEST_PILOT_KL_SHARE))} a prompt would show it"
        )
    if pilot.collapsed_share > LARGEST_COLLAPSED_SHARE:
        reasons.append(
            f"{pilot.collapsed_share:.0%} of the pilot's prompts lean on fewer than 2 responses in effect: more "
            "responses a prompt, or a larger beta"
        )
    return reasons


def _size_reasons(pilot: Pilot, request: SizeRequest, chosen: Prediction) -> list[str]:
    """Why the plan with so many responses is not to be trusted."""
    reasons = []
    fewest = pilot.fewest_responses()
    if chosen.n_responses < fewest:
        reasons.append(
            f"{chosen.n_responses} responses a prompt cannot carry a KL of {pilot.kl:.2f} nats: at least {fewest}, "
            f"exp(KL / {LARGEST_KL_SHARE:g})"
        )
    for j, name in enumerate(pilot.names):
        if not pilot.is_active_m[j]:
            continue
        bias, error = pilot.bias_at(chosen.n_responses)[j], chosen.offset_errors_m[j]
        if abs(bias) + error > LARGEST_BIAS_SHARE * request.within_m[j]:
            reasons.append(
                f"{name}: {chosen.n_responses} responses a prompt leave the policy {bias:+.3g} off its demand, with a "
                f"standard error of {error:.2g}: with it more than {LARGEST_BIAS_SHARE:g} of what is allowed; "
                "more responses a prompt"
            )
    return reasons


def _evaluation_prompts(pilot: Pilot, request: SizeRequest, chosen: Prediction, n_prompts: int) -> int | None:
    """Prompts with which the evaluation says *satisfied* of each constraint with the confidence asked for.

    The rule of ``assurance`` (:mod:`stage1_dual.dual.tightening`), t = z_{0.975} e + z_a sqrt(e^2 + s^2), solved for
    the prompts in e at t = ``room_m``, of the constraints that bind.
    """
    from scipy.special import ndtri

    z = float(ndtri(request.confidence))
    responses = request.evaluation_responses or chosen.n_responses
    between_m = np.diag(_positive(pilot.moments.between_mm))
    variance_m = between_m + pilot.sampled_m / responses + pilot.reference_m / chosen.n_responses
    needed = 2.0
    for j in np.flatnonzero(pilot.is_active_m):
        spread, own, room = float(variance_m[j]), float(chosen.errors_m(n_prompts)[j]), float(request.room_m[j])

        def asked(count: float, spread: float = spread, own: float = own) -> float:
            error = math.sqrt(spread / count)
            return _Z_INTERVAL * error + z * math.hypot(error, own)

        if z * own >= room:
            return None
        low, high = 1.0, 2.0
        while asked(high) > room:
            low, high = high, high * 2
        while high - low > 0.5:
            middle = (low + high) / 2
            low, high = (middle, high) if asked(middle) > room else (low, middle)
        needed = max(needed, high)
    return math.ceil(needed)
