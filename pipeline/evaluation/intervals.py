"""Intervals of a statistic over prompts: 95%, clustered by prompt.

The responses to one prompt are not independent of each other, the prompts are: every interval is built on one number a
prompt. Which method was chosen for what, and where its coverage is off, is measured by
``benchmarks/evaluation_coverage.py`` (docs/constraints.md has its table).

*Degrees of freedom.* Where few prompts carry most of the variation (a share near 1, a tail) the estimated variance is
itself uncertain, and Student's t with n - 1 degrees of freedom is too narrow. The variance of s^2 is
sigma^4 (kappa - (n - 3)/(n - 1)) / n with kurtosis kappa, and a multiple of chi^2 with d degrees of freedom has
2 sigma^4 / d: hence d = 2n / (kappa - (n - 3)/(n - 1)), Satterthwaite's match of moments, near n - 1 for a normal.

*Shares.* A share is skewed near 0 and 1, where t leaves the truth above its interval. Wilson's score interval stands
on an effective number of responses p(1 - p)/SE^2, SE clustered (Korn and Graubard, 1998, do so with Clopper and
Pearson's interval; Wilson's is narrower and covers as well here), and on the t quantile. Where all responses are alike
there is no SE to be had, and each prompt counts once.
"""

from __future__ import annotations

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.scoring.estimates import Estimate

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


def statistic_interval(found: Estimate) -> list[float]:
    """95% interval of an estimated statistic.

    Raises:
        InputError: fewer than two prompts count.
    """
    if found.statistic.kind == "share":
        return share_interval(found.numerator_q / found.denominator_q, n_responses=found.n_rows)
    return mean_interval(found.observations_q)


def margin_interval(policy: Estimate, reference: Estimate) -> list[float]:
    """95% interval of a statistic where it is compared with the reference's own on the same prompts.

    It is that of the paired difference, laid at the reference's value: what both policies find hard or easy of a
    prompt does not widen it.

    Raises:
        InputError: fewer than two prompts count.
    """
    lowest, highest = policy.statistic.bounds
    difference_q = policy.observations_q - reference.observations_q
    return [min(max(reference.value + bound, lowest), highest) for bound in mean_interval(difference_q)]


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
