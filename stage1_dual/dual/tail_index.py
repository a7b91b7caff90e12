"""Pareto k: how heavy the upper tail of a prompt's tilted weights is.

The largest weights of a prompt are fitted with a generalised Pareto distribution; its shape k says how many moments
the weights have. Below about 0.7 a weighted mean converges as fast as its effective sample size says; above, no
diagnostic computed from the weights alone can be trusted, the effective sample size included.

References: Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, JMLR 25 (2024); Zhang and
Stephens, A new and efficient estimation method for the generalized Pareto distribution, Technometrics 51 (2009).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.tilting import weigh_block

# Beyond this shape, means of weighted samples converge too slowly to be of use.
LARGEST_USEFUL_K = 0.7

# Fewer points than this do not determine a tail.
_SHORTEST_TAIL = 5
# What lies further below the largest than this does not count as part of a tail.
_SMALLEST_SHARE = 1e-100
# A weak prior at k = 1/2 worth this many points steadies short tails (Vehtari et al., appendix C).
_PRIOR_POINTS = 10
_GRID_STRETCH = 3.0


def pareto_k(problem: DualProblem, lam_m: FloatArray) -> FloatArray:
    """Pareto k of every prompt's tilted weights at ``lam_m``; NaN where a tail has fewer than 5 points, shape (p,)."""
    return np.concatenate(list(problem.samples.map(partial(_block_pareto_k, lam_m=lam_m, beta=problem.beta))))


def _block_pareto_k(block: SampleBlock, *, lam_m: FloatArray, beta: float) -> FloatArray:
    weights_n = weigh_block(block, lam_m=lam_m, beta=beta)
    counts_p = block.segments.counts_p
    k_p = np.full(block.segments.n_prompts, np.nan)
    # Prompts with equally many responses are fitted at once.
    for count in np.unique(counts_p):
        tail = int(min(np.ceil(0.2 * count), np.ceil(3 * np.sqrt(count)), count - 1))
        if tail < _SHORTEST_TAIL:
            continue
        places = np.flatnonzero(counts_p == count)
        rows_pk = block.segments.starts_p[places, np.newaxis] + np.arange(count)
        largest_pk = np.partition(weights_n[rows_pk], count - tail - 1, axis=1)[:, -tail - 1 :]
        largest_pk.sort(axis=1)
        k_p[places] = fit_tail(largest_pk[:, 1:] - largest_pk[:, :1])
        # Weights that have collapsed onto fewer responses than make a tail: as heavy as can be.
        counted_p = np.sum(largest_pk > _SMALLEST_SHARE * largest_pk[:, -1:], axis=1)
        k_p[places[counted_p < _SHORTEST_TAIL]] = np.inf
    return k_p


def fit_tail(excess_pt: FloatArray) -> FloatArray:
    """Shape k of a generalised Pareto distribution for each row of sorted excesses over a threshold, (p, t) to (p,).

    Minus infinity where all of a row's excesses are zero: equal weights have no tail.
    """
    n_tail = excess_pt.shape[1]
    k_p = np.full(len(excess_pt), -np.inf)
    quartile = excess_pt[:, int(np.floor(n_tail / 4 + 0.5)) - 1]
    top = excess_pt[:, -1]
    # Ties at the threshold leave zeros at the bottom; the smallest positive excess then stands for the quartile.
    positive_pt = np.where(excess_pt > 0, excess_pt, np.inf)
    quartile = np.maximum(quartile, np.minimum(np.min(positive_pt, axis=1), top))
    quartile = np.maximum(quartile, _SMALLEST_SHARE * top)
    fitted = np.flatnonzero(top > 0)
    if len(fitted) == 0:
        return k_p
    x_pt = excess_pt[fitted] / top[fitted, np.newaxis]
    quartile_p1 = (quartile[fitted] / top[fitted])[:, np.newaxis]
    n_grid = 30 + int(np.sqrt(n_tail))
    grid_j = 1.0 - np.sqrt(n_grid / (np.arange(1, n_grid + 1) - 0.5))
    theta_pj = grid_j / (_GRID_STRETCH * quartile_p1) + 1.0
    # Zero is the exponential distribution, a removable singularity of what follows.
    theta_pj = np.where(theta_pj == 0.0, np.finfo(np.float64).eps, theta_pj)
    with np.errstate(under="ignore"):
        k_pj = np.mean(np.log1p(-theta_pj[:, :, np.newaxis] * x_pt[:, np.newaxis, :]), axis=2)
        log_likelihood_pj = n_tail * (np.log(-theta_pj / k_pj) - k_pj - 1.0)
        posterior_pj = np.exp(log_likelihood_pj - np.max(log_likelihood_pj, axis=1, keepdims=True))
        posterior_pj /= np.sum(posterior_pj, axis=1, keepdims=True)
        theta_p1 = np.sum(theta_pj * posterior_pj, axis=1, keepdims=True)
        shape_p = np.mean(np.log1p(-theta_p1 * x_pt), axis=1)
    k_p[fitted] = (n_tail * shape_p + _PRIOR_POINTS * 0.5) / (n_tail + _PRIOR_POINTS)
    return k_p
