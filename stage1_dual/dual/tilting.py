"""The tilted policy on one block of samples: weights, means, KL and effective sample sizes by prompt.

The functions here know a block, multipliers and beta, and no problem: passes over all blocks of one are in
:mod:`stage1_dual.dual.dual_function`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.segments import FloatArray, IntArray, Segments, combine


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


def weigh_block(block: SampleBlock, *, lam_m: FloatArray, beta: float) -> FloatArray:
    """Tilted weights of one block, summing to 1 within a prompt, shape (n,)."""
    with np.errstate(under="ignore"):
        weights_n, total_p, _ = unnormalised_weights(block, lam_m, beta)
        return block.segments.divide(weights_n, total_p, out=weights_n)


def tilt_block(block: SampleBlock, *, lam_m: FloatArray, beta: float, thresholds_m: FloatArray) -> Tilt:
    """The tilted policy on the prompts of one block; thresholds in score units, shape (m,)."""
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


def normalise_block(
    block: SampleBlock, *, lam_m: FloatArray, beta: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The last three fields of the :class:`Normaliser` for the prompts of one block, in their order."""
    with np.errstate(under="ignore"):
        _, _, log_z_p = unnormalised_weights(block, lam_m, beta)
    # Copies: views would keep the whole partition they were read with.
    return log_z_p + np.log(block.segments.counts_p), block.reward_shift_p.copy(), block.score_shift_mp.copy()


def unnormalised_weights(
    block: SampleBlock, lam_m: FloatArray, beta: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weights up to a factor of each prompt, and what that factor is.

    Returns:
        The weights, a fresh array of shape (n,), of which each prompt's largest is 1; their sums, shape (p,); and
        log E_{pi_ref} exp of the centred (r + <lam, g>)/beta, nats, shape (p,).
    """
    segments = block.segments
    weights_n = combine(np.array([1.0, *lam_m]) / beta, block.values_in)
    largest_p = cap_exponents(segments, weights_n)
    np.exp(weights_n, out=weights_n)
    total_p = segments.sum(weights_n)
    return weights_n, total_p, largest_p + np.log(total_p / segments.counts_p)


def cap_exponents(segments: Segments, exponent_n: FloatArray) -> FloatArray:
    """Subtract from the exponents, shape (n,), the largest of their prompt, in place; returns those, shape (p,)."""
    largest_p = segments.max(exponent_n)
    segments.subtract(exponent_n, largest_p, out=exponent_n)
    return largest_p
