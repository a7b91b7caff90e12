"""The dual function, its gradient and its Hessian.

    D(lam) = beta E_x log E_{y~pi_ref} exp{ (r + <lam, g - b>) / beta }

    grad D = slack under pi_lam,   hess D = E_x Cov_{pi_lam}[g] / beta,   pi_lam ~ pi_ref exp{(r + <lam, g>)/beta}

(One-Shot Safety Alignment, Huang et al., arXiv:2405.19544; the derivatives are those of any log-partition function.)
On samples E_{y~pi_ref} is a mean over the prompt's responses and E_x a mean over prompts.

Beside it the two other passes over a whole problem at given multipliers: the tilted policy by prompt, and what turns
single rows into weights. What they do on one block is in :mod:`stage1_dual.dual.tilting`. Nothing here looks for
multipliers (:mod:`stage1_dual.dual.solver`) or judges them (:mod:`stage1_dual.dual.certificate`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray, combine, scratch, weighted_products
from stage1_dual.dual.tilting import Normaliser, Tilt, cap_exponents, normalise_block, tilt_block

# Exponents up to this many nats leave weights so even that a variance can be a difference of moments, and need no
# shift to stay within float64.
TAME_NATS = 15.0


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


def build_normaliser(problem: DualProblem, lam_m: FloatArray) -> Normaliser:
    """The normaliser of the tilted policy at ``lam_m``, shape (m,), in one pass over the samples."""
    parts = list(problem.samples.map(partial(normalise_block, lam_m=lam_m, beta=problem.beta)))
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
