"""The tilted policy on a block of samples: weights, means, KL and effective sample sizes by prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.segments import FloatArray, Segments, combine

# Exponents up to this many nats leave weights so even that a variance can be a difference of moments, and need no
# shift to stay within float64.
TAME_NATS = 15.0


@dataclass(frozen=True, eq=False)
class Tilt:
    """The tilted policy on the samples, prompt by prompt.

    Attributes:
        log_z_p: log E_{pi_ref} exp{(r + <lam, g>)/beta}, nats, shape (p,).
        reward_p: tilted mean of the reward, reward units, shape (p,).
        scores_mp: tilted mean of the constraint scores, score units, shape (m, p).
        slack_mp: ``scores_mp`` minus the thresholds, free of cancellation, shape (m, p).
        kl_p: KL(pi_lam || pi_ref), nats, shape (p,).
        ess_p: effective sample size 1 / sum_k w^2, samples, shape (p,).
    """

    log_z_p: FloatArray
    reward_p: FloatArray
    scores_mp: FloatArray
    slack_mp: FloatArray
    kl_p: FloatArray
    ess_p: FloatArray


def weigh_block(block: SampleBlock, *, lam_m: FloatArray, beta: float) -> FloatArray:
    """Tilted weights of one block, summing to 1 within a prompt, shape (n,)."""
    with np.errstate(under="ignore"):
        weights_n, total_p, _ = unnormalised_weights(block, lam_m, beta)
        return block.segments.divide(weights_n, total_p, out=weights_n)


def tilt_block(block: SampleBlock, *, lam_m: FloatArray, beta: float, thresholds_m: FloatArray) -> Tilt:
    """The tilted policy on one block."""
    return weigh_and_tilt_block(block, lam_m=lam_m, beta=beta, thresholds_m=thresholds_m)[1]


def weigh_and_tilt_block(
    block: SampleBlock, *, lam_m: FloatArray, beta: float, thresholds_m: FloatArray
) -> tuple[FloatArray, Tilt]:
    """Tilted weights of one block, summing to 1 within a prompt, shape (n,), and the tilted policy on it."""
    segments = block.segments
    with np.errstate(under="ignore"):
        weights_n, total_p, log_z_p = unnormalised_weights(block, lam_m, beta)
        reward_p = segments.dot(weights_n, block.reward_n) / total_p
        tilted_mp = np.empty_like(block.score_shift_mp)
        for scores_n, tilted_p in zip(block.scores_mn, tilted_mp, strict=True):
            tilted_p[:] = segments.dot(weights_n, scores_n) / total_p
        ess_p = total_p**2 / segments.dot(weights_n, weights_n)
    kl_p = (reward_p + lam_m @ tilted_mp) / beta - log_z_p
    tilted = Tilt(
        log_z_p=log_z_p + (block.reward_shift_p + lam_m @ block.score_shift_mp) / beta,
        reward_p=reward_p + block.reward_shift_p,
        scores_mp=tilted_mp + block.score_shift_mp,
        slack_mp=tilted_mp + (block.score_shift_mp - thresholds_m[:, np.newaxis]),
        # Rounding can leave a KL of -1e-17 and an effective sample size just outside [1, k].
        kl_p=np.maximum(kl_p, 0.0),
        ess_p=np.clip(ess_p, 1.0, segments.counts_p),
    )
    return segments.divide(weights_n, total_p, out=weights_n), tilted


def unnormalised_weights(
    block: SampleBlock, lam_m: FloatArray, beta: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Fresh weights up to a factor of each prompt, shape (n,), their sums, and log E exp of centred scores, (p,)."""
    segments = block.segments
    weights_n = combine(np.array([1.0, *lam_m]) / beta, block.values_in)
    largest_p = cap_exponents(segments, weights_n)
    np.exp(weights_n, out=weights_n)
    total_p = segments.sum(weights_n)
    return weights_n, total_p, largest_p + np.log(total_p / segments.counts_p)


def cap_exponents(segments: Segments, exponent_n: FloatArray) -> FloatArray:
    """Make the largest exponent of each prompt 0, in place; what it was, shape (p,)."""
    largest_p = segments.max(exponent_n)
    segments.subtract(exponent_n, largest_p, out=exponent_n)
    return largest_p
