"""What each prompt of a pilot contributes, and how it moves with the number of its responses.

The jackknife that leaves out one response of a prompt at a time says what the responses add to the slack of a prompt,
in variance and in bias. It has a closed form: without response k a tilted mean moves by
w_k (E_lam g - g_k) / (1 - w_k). The same on the halves of each prompt's responses shows how what it finds moves with
their number, J(K) = J_0 + J_1 / K, which gives the next terms: the bias is J_0 / K + J_1 / (2 K^2), since a jackknife
sees the second term of a bias twice, and the variance J_0 / K + J_1 / K^2.

References: Efron and Stein, Ann. Statist. 9 (1981) 586; Hesterberg, thesis, Stanford (1988).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.pilot_rows import PilotRows
from stage1_dual.dual.segments import FloatArray, IntArray, Segments

# A weight this near to 1 is the only response that counts: leaving it out would leave nothing.
_LARGEST_WEIGHT = 1 - 1e-9


@dataclass(frozen=True, eq=False)
class Series:
    """What responses add, times their number: ``first`` + ``second`` / K, prompt by prompt on the last axis or not."""

    first: FloatArray
    second: FloatArray

    def at(self, n_responses: float | FloatArray | IntArray) -> FloatArray:
        """Times the number of responses."""
        return np.asarray(self.first + self.second / n_responses)

    def moved_to(self, value: FloatArray, n_responses: FloatArray | IntArray) -> Series:
        """The series with the same second term that has this value at a number of responses."""
        return Series(value - self.second / n_responses, self.second)

    def mean(self, kept_p: NDArray[np.bool_]) -> Series:
        """Over the prompts kept."""
        return Series(np.mean(self.first[..., kept_p], axis=-1), np.mean(self.second[..., kept_p], axis=-1))

    @classmethod
    def through(cls, whole: FloatArray, half: FloatArray, counts_p: IntArray, half_p: FloatArray) -> Series:
        """Through values on all and on half of the responses, (..., p) each; constant where there are no halves."""
        step_p = 1.0 / half_p - 1.0 / counts_p
        second = np.where(step_p > 0, (half - whole) / np.where(step_p > 0, step_p, 1.0), 0.0)
        return cls(whole - second / counts_p, second)


@dataclass(frozen=True, eq=False)
class PromptTerms:
    """What each prompt contributes at some multipliers; B and C are scaled to one response.

    ``psi_hmp`` and ``bias_hmp`` are the equations and C as each half of the responses shows them, which err apart.
    """

    psi_mp: FloatArray
    psi_hmp: FloatArray
    bias_hmp: FloatArray
    within_mmp: Series
    bias_mp: Series
    hessian_mmp: Series
    reward_slope_mp: FloatArray
    reference_mmp: FloatArray
    kl_p: FloatArray
    second_moment_p: FloatArray
    ess_p: FloatArray


@dataclass(frozen=True, eq=False)
class Jackknife:
    """Leaving out one response of a prompt at a time; both scaled to one response."""

    within_mmp: FloatArray
    bias_mp: FloatArray


def prompt_terms(rows: PilotRows, multipliers_m: FloatArray, *, near: PromptTerms | None = None) -> PromptTerms:
    """Everything at some multipliers; with terms ``near``, how it moves with the number of responses is theirs."""
    weight_n, logit_n, total_p = tilted_weights(rows, multipliers_m)
    segments = Segments.from_counts(rows.counts_p)
    counts_p, beta = rows.counts_p, rows.beta
    whole, hessian_mmp = leave_one_out(rows, weight_n), _hessian(rows, weight_n)
    mean_mp, reference_mp = _means(rows, weight_n)
    psi_mp = mean_mp - reference_mp - rows.target_m[:, np.newaxis]
    if near is None:
        within, bias, hessian, psi_hmp, bias_hmp = _through_halves(rows, multipliers_m, whole, hessian_mmp)
    else:
        psi_hmp, bias_hmp = near.psi_hmp + (psi_mp - near.psi_mp), near.bias_hmp
        within = near.within_mmp.moved_to(whole.within_mmp, counts_p)
        # Of the series of a bias, at all responses twice the second term is what a jackknife finds.
        second_mp = near.bias_mp.second
        bias = Series(whole.bias_mp - 2 * second_mp / counts_p, second_mp)
        hessian = near.hessian_mmp.moved_to(hessian_mmp, counts_p)
    off_mn = segments.subtract(rows.column_mn, mean_mp)
    reference_off_mn = segments.subtract(rows.reference_mn, reference_mp)
    rest_n = np.maximum(1.0 - weight_n, 1.0 - _LARGEST_WEIGHT)
    reward_off_n = segments.subtract(rows.reward_n, segments.dot(weight_n, rows.reward_n))
    # Of a reward that is constant only rounding would be left.
    has_reward_p = segments.max(rows.reward_n) > -segments.max(-rows.reward_n)
    # The KL is E_w[logit] - log mean exp logit; leaving out k moves both in closed form.
    logit_p = segments.dot(weight_n, logit_n)
    log_z_p = np.log(total_p / counts_p)
    kl_moved_n = weight_n / rest_n * -segments.subtract(logit_n, logit_p) - np.log(rest_n)
    kl_bias_p = (counts_p - 1) / counts_p * (segments.sum(kl_moved_n) + counts_p * np.log((counts_p - 1) / counts_p))
    # Where one response has all the weight, what would be left without it is lost to the limit on weights.
    kl_bias_p = np.where(segments.max(weight_n) > _LARGEST_WEIGHT, 0.0, kl_bias_p)
    squared_p = segments.dot(weight_n, weight_n)
    return PromptTerms(
        psi_mp=psi_mp,
        psi_hmp=psi_hmp,
        bias_hmp=bias_hmp,
        within_mmp=within,
        bias_mp=bias,
        hessian_mmp=hessian,
        reward_slope_mp=np.where(has_reward_p, segments.sum(off_mn * (weight_n * reward_off_n)) / beta, 0.0),
        reference_mmp=_products(segments, reference_off_mn, reference_off_mn) / (counts_p - 1),
        kl_p=logit_p - log_z_p - kl_bias_p,
        second_moment_p=counts_p * squared_p,
        ess_p=1.0 / squared_p,
    )


def _through_halves(
    rows: PilotRows, multipliers_m: FloatArray, whole: Jackknife, hessian_mmp: FloatArray
) -> tuple[Series, Series, Series, FloatArray, FloatArray]:
    """B, C and the Hessian as they move with the number of responses; the equations of each half, and C."""
    halves = [rows.half(part) for part in range(2)]
    weights = [tilted_weights(half, multipliers_m)[0] for half in halves]
    found = [leave_one_out(half, weight_n) for half, weight_n in zip(halves, weights, strict=True)]
    hessians = [_hessian(half, weight_n) for half, weight_n in zip(halves, weights, strict=True)]
    half_p = np.mean([half.counts_p for half in halves], axis=0)
    within_mmp, bias_mp = (
        np.mean([one.within_mmp for one in found], axis=0),
        np.mean([one.bias_mp for one in found], axis=0),
    )
    bias = Series.through(whole.bias_mp, bias_mp, rows.counts_p, half_p)
    return (
        Series.through(whole.within_mmp, within_mmp, rows.counts_p, half_p),
        Series(bias.first, bias.second / 2),
        Series.through(hessian_mmp, np.mean(hessians, axis=0), rows.counts_p, half_p),
        np.stack([np.subtract(*_means(half, weight_n)) for half, weight_n in zip(halves, weights, strict=True)])
        - rows.target_m[:, np.newaxis],
        np.stack([one.bias_mp for one in found]),
    )


def tilted_weights(rows: PilotRows, multipliers_m: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Tilted weights, shape (n,); their logits, the largest of a prompt 0; and sums of the exp of these, (p,)."""
    segments = Segments.from_counts(rows.counts_p)
    logit_n = (rows.reward_n + multipliers_m @ rows.column_mn) / rows.beta
    logit_n = segments.subtract(logit_n, segments.max(logit_n))
    with np.errstate(under="ignore"):
        weight_n = np.exp(logit_n)
    total_p = segments.sum(weight_n)
    return segments.divide(weight_n, total_p), logit_n, total_p


def leave_one_out(rows: PilotRows, weight_n: FloatArray) -> Jackknife:
    """What leaving out each response of each prompt at a time shows, in closed form.

    Args:
        rows: the pilot.
        weight_n: tilted weights, shape (n,), summing to 1 for each prompt.
    """
    segments, counts_p = Segments.from_counts(rows.counts_p), rows.counts_p
    off_mn = segments.subtract(rows.column_mn, segments.sum(rows.column_mn * weight_n))
    reference_off_mn = segments.subtract(rows.reference_mn, segments.mean(rows.reference_mn))
    # Without response k: (1 - w_k) in place of 1 in the denominators.
    rest_n = np.maximum(1.0 - weight_n, 1.0 - _LARGEST_WEIGHT)
    moved_mn = segments.divide(reference_off_mn, (counts_p - 1).astype(np.float64)) - weight_n / rest_n * off_mn
    moved_mp = segments.sum(moved_mn)
    centred_mn = segments.subtract(moved_mn, moved_mp / counts_p)
    scale_p = (counts_p - 1).astype(np.float64)  # (K - 1) / K, times K: of one response
    return Jackknife(_products(segments, centred_mn, centred_mn) * scale_p, -moved_mp * scale_p)


def _means(rows: PilotRows, weight_n: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Tilted means of the columns, and the reference's of its own, of each prompt; shape (m, p) each."""
    segments = Segments.from_counts(rows.counts_p)
    return segments.sum(rows.column_mn * weight_n), segments.mean(rows.reference_mn)


def _hessian(rows: PilotRows, weight_n: FloatArray) -> FloatArray:
    """Cov_lam of the columns over beta, shape (m, m, p)."""
    segments = Segments.from_counts(rows.counts_p)
    off_mn = segments.subtract(rows.column_mn, segments.sum(rows.column_mn * weight_n))
    return _products(segments, off_mn * weight_n, off_mn) / rows.beta


def _products(segments: Segments, left_in: FloatArray, right_jn: FloatArray) -> FloatArray:
    return np.stack([segments.sum(right_jn * row_n) for row_n in left_in])
