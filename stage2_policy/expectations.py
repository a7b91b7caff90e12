"""Expectations under a policy, of the reference's responses weighted within each prompt."""

from __future__ import annotations

import numpy as np


def corrected_means(weight_n: np.ndarray, prompt_n: np.ndarray, column_nc: np.ndarray) -> np.ndarray:
    """The weighted mean of each prompt, less its bias of order 1/K by the jackknife, shape (prompts, c).

    A ratio estimate is biased towards the even mean, the more so the more its weights vary: with K responses the
    corrected mean is K m - (K - 1) times the mean of the K means that leave a response out (Quenouille; Efron and
    Tibshirani, "An introduction to the bootstrap", 1993, section 10.5). Two policies are compared fairly only so.

    Args:
        weight_n: of each response, with a sum of one within its prompt, shape (n,).
        prompt_n: prompt of each response, from 0, ascending, shape (n,).
        column_nc: of each response, shape (n, c).
    """
    starts = np.flatnonzero(np.diff(prompt_n, prepend=-1))
    counts = np.diff(starts, append=len(prompt_n))[:, None]
    means = np.add.reduceat(weight_n[:, None] * column_nc, starts)
    # A response that has all the weight leaves a mean of rounding errors: it is taken as if it were not left out.
    rest = np.maximum(1 - weight_n, 0.0)[:, None]
    others = np.where(
        rest > _LEAST_REST,
        (means[prompt_n] - weight_n[:, None] * column_nc) / np.maximum(rest, _LEAST_REST),
        means[prompt_n],
    )
    left_out = np.add.reduceat(others, starts) / counts
    return np.asarray(counts * means - (counts - 1) * left_out)


_LEAST_REST = 1e-9
