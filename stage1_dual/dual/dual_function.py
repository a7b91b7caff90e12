"""The dual function, its gradient and its Hessian.

    D(lam) = beta E_x log E_{y~pi_ref} exp{ (r + <lam, g - b>) / beta }

    grad D = slack under pi_lam,   hess D = E_x Cov_{pi_lam}[g] / beta,   pi_lam ~ pi_ref exp{(r + <lam, g>)/beta}

(One-Shot Safety Alignment, Huang et al., arXiv:2405.19544; the derivatives are those of any log-partition function.)
On samples E_{y~pi_ref} is a mean over the prompt's responses and E_x a mean over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stage1_dual.dual.segments import Block, FloatArray, combine, weighted_products

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
class Tilt:
    """The tilted policy on the samples, prompt by prompt.

    Attributes:
        weights_n: weights of the kept rows, summing to 1 within a prompt, shape (n,).
        log_z_p: log E_{pi_ref} exp{(r_c + <lam, g_c>)/beta} for centred r and g, nats, shape (p,).
        reward_p: tilted mean of the reward, reward units, shape (p,).
        scores_mp: tilted mean of the constraint scores, score units, shape (m, p).
        slack_mp: ``scores_mp`` minus the thresholds, free of cancellation, shape (m, p).
        kl_p: KL(pi_lam || pi_ref), nats, shape (p,).
        ess_p: effective sample size 1 / sum_k w^2, samples, shape (p,).
    """

    weights_n: FloatArray
    log_z_p: FloatArray
    reward_p: FloatArray
    scores_mp: FloatArray
    slack_mp: FloatArray
    kl_p: FloatArray
    ess_p: FloatArray


def evaluate_dual(problem: DualProblem, lam_m: FloatArray) -> DualEvaluation:
    """Value, slack and Hessian of the dual at ``lam_m``, shape (m,), in one pass over the samples."""
    n_constraints = problem.n_constraints
    log_z_sum, tilted_sum_m = 0.0, np.zeros(n_constraints)
    covariance_sum_mm = np.zeros((n_constraints, n_constraints))
    with np.errstate(under="ignore"):
        for block in problem.segments.blocks:
            scores_mn = problem.centred_scores_mn[:, block.rows]
            weights_n, log_z_p = _weights(problem, lam_m, block)
            tilted_mp = block.segments.sum(scores_mn * weights_n)
            # Deviations from the tilted mean, not a difference of second moments: exact when the weights collapse.
            deviation_mn = block.segments.subtract(scores_mn, tilted_mp)
            covariance_sum_mm += weighted_products(weights_n, deviation_mn, deviation_mn)
            tilted_sum_m += np.sum(tilted_mp, axis=1)
            log_z_sum += float(np.sum(log_z_p))
    centred_value = problem.beta * log_z_sum / problem.n_prompts + float(lam_m @ problem.slack_shift_m)
    return DualEvaluation(
        value=float(np.mean(problem.reward_shift_p)) + centred_value,
        centred_value=centred_value,
        slack_m=tilted_sum_m / problem.n_prompts + problem.slack_shift_m,
        hess_mm=covariance_sum_mm / (problem.n_prompts * problem.beta),
    )


def tilt(problem: DualProblem, lam_m: FloatArray) -> Tilt:
    """The tilted policy at ``lam_m``, shape (m,), with its means, KL and effective sample size by prompt."""
    weights_n = np.empty(problem.n_samples)
    log_z_p, reward_p, ess_p = np.empty((3, problem.n_prompts))
    tilted_mp = np.empty((problem.n_constraints, problem.n_prompts))
    with np.errstate(under="ignore"):
        for block in problem.segments.blocks:
            block_weights_n, log_z_p[block.prompts] = _weights(problem, lam_m, block)
            weights_n[block.rows] = block_weights_n
            reward_p[block.prompts] = block.segments.sum(problem.centred_reward_n[block.rows] * block_weights_n)
            tilted_mp[:, block.prompts] = block.segments.sum(
                problem.centred_scores_mn[:, block.rows] * block_weights_n
            )
            ess_p[block.prompts] = 1.0 / block.segments.sum(block_weights_n * block_weights_n)
    kl_p = (reward_p + combine(lam_m, tilted_mp)) / problem.beta - log_z_p
    thresholds_m1 = problem.thresholds_m[:, np.newaxis]
    return Tilt(
        weights_n=weights_n,
        log_z_p=log_z_p,
        reward_p=reward_p + problem.reward_shift_p,
        scores_mp=tilted_mp + problem.score_shift_mp,
        slack_mp=tilted_mp + (problem.score_shift_mp - thresholds_m1),
        # Rounding can leave a KL of -1e-17 and an effective sample size just outside [1, k].
        kl_p=np.maximum(kl_p, 0.0),
        ess_p=np.clip(ess_p, 1.0, problem.segments.counts_p),
    )


def _weights(problem: DualProblem, lam_m: FloatArray, block: Block) -> tuple[FloatArray, FloatArray]:
    """Tilted weights of one block's rows, shape (n,), and log-partition of its prompts' centred scores, shape (p,)."""
    segments = block.segments
    work_n = combine(lam_m, problem.centred_scores_mn[:, block.rows])
    work_n += problem.centred_reward_n[block.rows]
    work_n /= problem.beta
    largest_p = segments.max(work_n)
    segments.subtract(work_n, largest_p, out=work_n)
    np.exp(work_n, out=work_n)
    total_p = segments.sum(work_n)
    segments.divide(work_n, total_p, out=work_n)
    return work_n, largest_p + np.log(total_p / segments.counts_p)
