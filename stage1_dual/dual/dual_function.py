"""The dual function, its gradient and its Hessian.

    D(lam) = beta E_x log E_{y~pi_ref} exp{ (r + <lam, g - b>) / beta }

    grad D = slack under pi_lam,   hess D = E_x Cov_{pi_lam}[g] / beta,   pi_lam ~ pi_ref exp{(r + <lam, g>)/beta}

(One-Shot Safety Alignment, Huang et al., arXiv:2405.19544; the derivatives are those of any log-partition function.)
On samples E_{y~pi_ref} is a mean over the prompt's responses and E_x a mean over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.segments import FloatArray, IntArray, combine, scratch, weighted_products
from stage1_dual.dual.tilting import TAME_NATS, Tilt, cap_exponents, tilt_block, unnormalised_weights, weigh_block

if TYPE_CHECKING:
    from stage1_dual.dual.problem import DualProblem


@dataclass(frozen=True, eq=False)
class DualEvaluation:
    """Everything about the dual at one lam.

    Attributes:
        value: D(lam), reward units.
        centred_value: D(lam) without the mean of the prompts' reward shifts, reward units; differences of it do not
            suffer from a large offset of the rewards.
        slack_m: gradient of D, score units, shape (m,).
        hess_mm: Hessian of D, score units squared per reward unit, shape (m, m).
    """

    value: float
    centred_value: float
    slack_m: FloatArray
    hess_mm: FloatArray


@dataclass(frozen=True, eq=False)
class Normaliser:
    """What turns a row's scores into its tilted weight, prompt by prompt: for rows that are read one chunk at a time.

    Attributes:
        lam_m: multipliers, reward per score unit, shape (m,).
        beta: KL strength, reward per nat.
        log_mass_p: log of the sum over a prompt's responses of exp{(r + <lam, g>)/beta}, centred, nats, shape (p,).
        reward_shift_p: what the rewards are centred on, reward units, shape (p,).
        score_shift_mp: what the scores are centred on, score units, shape (m, p).
    """

    lam_m: FloatArray
    beta: float
    log_mass_p: FloatArray
    reward_shift_p: FloatArray
    score_shift_mp: FloatArray

    def weights(self, prompt_n: IntArray, reward_n: FloatArray, scores_nm: FloatArray) -> FloatArray:
        """Weights of rows, shape (n,); ``prompt_n`` holds the place of each row's prompt."""
        centred_n = reward_n - self.reward_shift_p[prompt_n]
        for lam, score_n, shift_p in zip(self.lam_m, scores_nm.T, self.score_shift_mp, strict=True):
            centred_n += lam * (score_n - shift_p[prompt_n])
        with np.errstate(under="ignore"):
            return np.exp(centred_n / self.beta - self.log_mass_p[prompt_n])


def build_normaliser(problem: DualProblem, lam_m: FloatArray) -> Normaliser:
    """The normaliser of the tilted policy at ``lam_m``, shape (m,), in one pass over the samples."""
    parts = list(problem.samples.map(partial(_normalise_block, lam_m=lam_m, beta=problem.beta)))
    log_mass_p, reward_shift_p, score_shift_mp = (
        np.concatenate([part[place] for part in parts], axis=-1) for place in range(3)
    )
    return Normaliser(lam_m, problem.beta, log_mass_p, reward_shift_p, score_shift_mp)


def evaluate_dual(problem: DualProblem, lam_m: FloatArray) -> DualEvaluation:
    """Value, slack and Hessian of the dual at ``lam_m``, shape (m,), in one pass over the samples."""
    n_constraints = problem.n_constraints
    log_z_sum, tilted_sum_m = 0.0, np.zeros(n_constraints)
    covariance_sum_mm = np.zeros((n_constraints, n_constraints))
    is_tame = problem.samples.facts.largest_exponent(lam_m, problem.beta) <= TAME_NATS
    function = partial(_evaluate_block, lam_m=lam_m, beta=problem.beta, is_tame=is_tame)
    for sums in problem.samples.map(function):
        log_z_sum += sums[0]
        tilted_sum_m += sums[1]
        covariance_sum_mm += sums[2]
    centred_value = problem.beta * log_z_sum / problem.n_prompts + float(lam_m @ problem.slack_shift_m)
    with np.errstate(under="ignore"):
        hess_mm = covariance_sum_mm / (problem.n_prompts * problem.beta)
    return DualEvaluation(
        value=problem.samples.facts.reward_shift + centred_value,
        centred_value=centred_value,
        slack_m=tilted_sum_m / problem.n_prompts + problem.slack_shift_m,
        hess_mm=hess_mm,
    )


def tilt(problem: DualProblem, lam_m: FloatArray) -> Tilt:
    """The tilted policy at ``lam_m``, shape (m,), with its means, KL and effective sample size by prompt."""
    function = partial(tilt_block, lam_m=lam_m, beta=problem.beta, thresholds_m=problem.thresholds_m)
    parts = [vars(part) for part in problem.samples.map(function)]
    return Tilt(**{f.name: np.concatenate([part[f.name] for part in parts], axis=-1) for f in fields(Tilt)})


def tilted_weights(problem: DualProblem, lam_m: FloatArray) -> FloatArray:
    """Weights of all rows as they are kept, grouped by prompt, shape (n,)."""
    return np.concatenate(list(problem.samples.map(partial(weigh_block, lam_m=lam_m, beta=problem.beta))))


def _normalise_block(
    block: SampleBlock, *, lam_m: FloatArray, beta: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    with np.errstate(under="ignore"):
        _, _, log_z_p = unnormalised_weights(block, lam_m, beta)
    # Copies: views would keep the whole partition they were read with.
    return log_z_p + np.log(block.segments.counts_p), block.reward_shift_p.copy(), block.score_shift_mp.copy()


def _evaluate_block(
    block: SampleBlock, *, lam_m: FloatArray, beta: float, is_tame: bool
) -> tuple[float, FloatArray, FloatArray]:
    """Sums over the prompts of one block: log-partition, tilted means (m,), tilted covariances (m, m)."""
    n_constraints, n_prompts = len(lam_m), block.segments.n_prompts
    total_p, largest_p, mean_mp = np.empty(n_prompts), np.zeros(n_prompts), np.empty((n_constraints, n_prompts))
    covariance_mm = np.zeros((n_constraints, n_constraints))
    exponent_i = np.array([1.0, *lam_m]) / beta
    with np.errstate(under="ignore"):
        for prompts, tile in block.tiles:
            segments, vectors_mn = tile.segments, tile.scores_mn
            work_in = scratch.rows(2 if is_tame else 2 + n_constraints, segments.n_rows)
            weights_n = combine(exponent_i, tile.values_in, out=work_in[0])
            if not is_tame:
                largest_p[prompts] = cap_exponents(segments, weights_n)
            np.exp(weights_n, out=weights_n)
            total_p[prompts] = mass_p = segments.sum(weights_n)
            share_p = 1.0 / mass_p
            mean_mp[:, prompts] = segments.dot(vectors_mn, weights_n) * share_p
            # Deviations from the tilted mean where weights may collapse: a difference of moments is cheaper, but
            # leaves rounding of the size of the scores where the variance is far smaller.
            if not is_tame:
                vectors_mn = segments.subtract(vectors_mn, mean_mp[:, prompts], out=work_in[2:])
            covariance_mm += weighted_products(segments, vectors_mn, weights_n, share_p, work_n=work_in[1])
        if is_tame:
            covariance_mm -= mean_mp @ mean_mp.T
    log_z_p = largest_p + np.log(total_p / block.segments.counts_p)
    return float(log_z_p.sum()), mean_mp.sum(axis=1), covariance_mm
