"""Intervals of a statistic over prompts: 95%, clustered by prompt.

The responses to one prompt are not independent of each other, the prompts are: every interval is built on one number a
prompt. Which method was chosen for what, and where its coverage is off, is measured by
``benchmarks/evaluation_coverage.py`` (docs/constraints.md has its table).

*Degrees of freedom.* Where few prompts carry most of the variation (a share near 1, a tail) the estimated variance is
itself uncertain, and Student's t with n - 1 degrees of freedom is too narrow. The variance of s^2 is
sigma^4 (kappa - (n - 3)/(n - 1)) / n with kurtosis kappa; a multiple of chi^2 with d degrees of freedom has 2 sigma^4 / d,
so d = 2n / (kappa - (n - 3)/(n - 1)), Satterthwaite's match of moments. For normal values it is n - 1.

*Shares.* A share is skewed near 0 and 1, where t leaves the truth above its interval. Wilson's score interval stands on
an effective number of responses p(1 - p)/SE^2, SE clustered (Korn and Graubard, 1998, do so with Clopper and Pearson's;
Wilson's is narrower and covers as well here), and on the t quantile. Where all responses are alike there is no SE to be
had, and each prompt counts once.
"""

from __future__ import annotations

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError

_LEVEL = 0.975
"""Quantile at the upper end of a 95% interval."""


def mean_interval(value_p: FloatArray) -> list[float]:
    """95% interval of the mean over prompts, one observation a prompt.

    Args:
        value_p: shape (p,).

    Raises:
        InputError: fewer than two prompts.
    """
    mean = float(value_p.mean())
    half = _t_quantile(value_p) * float(value_p.std(ddof=1)) / np.sqrt(len(value_p))
    return [mean - half, mean + half]


def share_interval(share_p: FloatArray, *, n_responses: int) -> list[float]:
    """95% interval of a share of responses, within [0, 1].

    Args:
        share_p: share of each prompt's responses, shape (p,).
        n_responses: of all prompts; no clustering makes more of them.

    Raises:
        InputError: fewer than two prompts.
    """
    z = _t_quantile(share_p)
    mean, variance = float(share_p.mean()), float(share_p.var(ddof=1)) / len(share_p)
    alone = mean * (1 - mean)
    if alone == 0:
        effective = float(len(share_p))
    else:
        effective = min(alone / variance, n_responses) if variance > 0 else float(n_responses)
    centre = (mean + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * np.sqrt(alone / effective + z**2 / (4 * effective**2))
    return [max(0.0, float(centre - half)), min(1.0, float(centre + half))]


def ratio_observations(numerator_p: FloatArray, denominator_p: FloatArray) -> FloatArray:
    """One observation a prompt whose mean is E[u]/E[h] and whose spread is that of the ratio, by the delta method.

    Args:
        numerator_p: mean of u of each prompt, shape (p,).
        denominator_p: mean of h of each prompt, shape (p,); prompts where it is 0 are outside the statistic.

    Returns:
        R + (u - R h) / E[h], R = E[u]/E[h], of the prompts inside, shape (q,).

    Raises:
        InputError: no prompt is inside.
    """
    inside_p = denominator_p > 0
    u_q, h_q = numerator_p[inside_p], denominator_p[inside_p]
    if len(h_q) == 0:
        raise InputError("a ratio of means has no prompt with a positive denominator")
    scale = float(h_q.mean())
    ratio = float(u_q.mean()) / scale
    return np.asarray(ratio + (u_q - ratio * h_q) / scale)


def tail_observations(score_n: FloatArray, prompt_n: np.ndarray, *, level: float) -> FloatArray:
    """One observation a prompt whose mean is the CVaR of the worst ``level`` of all responses.

    CVaR = max_t {t - E (t - g)+ / level}; at its maximiser, the quantile, the statistic is a mean of t - (t - g)+ / level
    but for terms of second order (Rockafellar and Uryasev, 2000).

    Args:
        score_n: scores, higher is better, shape (n,).
        prompt_n: place of each row's prompt, ascending from 0, shape (n,).
        level: in (0, 1).

    Returns:
        Shape (p,).
    """
    share_n = 1.0 / np.bincount(prompt_n)[prompt_n]
    order = np.argsort(score_n, kind="stable")
    mass_n = np.cumsum(share_n[order]) / share_n.sum()
    quantile = float(score_n[order][min(int(np.searchsorted(mass_n, level)), len(order) - 1)])
    shortfall_n = np.maximum(quantile - score_n, 0.0)
    return np.asarray(quantile - np.bincount(prompt_n, shortfall_n * share_n) / level)


def _t_quantile(value_p: FloatArray) -> float:
    # Imported where it is used: SciPy takes longer to import than everything else here, and reading is more common.
    from scipy.special import stdtrit

    n = len(value_p)
    if n < 2:
        # One cluster carries no information on the spread between clusters.
        raise InputError(f"an interval needs at least 2 test prompts, {n} given")
    centred_p = value_p - value_p.mean()
    square = float(np.sum(centred_p**2))
    degrees = float(n - 1)
    if square > 0:
        # Of values divided by their size, whose fourth power may otherwise leave float64.
        scaled_p = centred_p / np.sqrt(square / n)
        excess = float(np.mean(scaled_p**4)) - (n - 3) / (n - 1)
        degrees = min(degrees, max(1.0, 2 * n / excess)) if excess > 0 else degrees
    return float(stdtrit(degrees, _LEVEL))
