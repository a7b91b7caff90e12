"""Intervals over prompts: their formulas, and that 95% means 95%."""

import numpy as np
import pytest
from scipy import stats

from pipeline.contracts.errors import InputError
from pipeline.evaluation.intervals import mean_interval, share_interval


def test_paired_intervals_are_tighter_and_cover():
    """Prompts differ by far more than the policy gains: pairing must remove that, and 95% must mean 95%."""
    rng = np.random.default_rng(2)
    covered, paired_width, plain_width = 0, [], []
    repeats = 300
    for _ in range(repeats):
        level_p = 3 * rng.normal(size=50)
        ref_p, pol_p = level_p + 0.1 * rng.normal(size=50), level_p + 0.5 + 0.1 * rng.normal(size=50)
        low, high = mean_interval(pol_p - ref_p)
        covered += low <= 0.5 <= high
        paired_width.append(high - low)
        plain_width.append(np.diff(mean_interval(pol_p))[0])
    assert abs(covered - 0.95 * repeats) < 4 * np.sqrt(0.95 * 0.05 * repeats)
    assert np.mean(paired_width) < 0.1 * np.mean(plain_width)


def test_an_interval_needs_two_prompts():
    with pytest.raises(InputError, match="at least 2 test prompts"):
        mean_interval(np.zeros(1))


@pytest.mark.parametrize("n_prompts", [2, 10, 150, 100_000])
def test_without_heavy_tails_the_interval_is_students_to_the_last_digit(n_prompts):
    """Half of the values at either end: no distribution has a smaller kurtosis."""
    value_p = np.where(np.arange(n_prompts) % 2, 1.0, -3.0)
    half = float(stats.t.ppf(0.975, n_prompts - 1) * value_p.std(ddof=1) / np.sqrt(n_prompts))
    assert mean_interval(value_p) == [-1.0 - half, -1.0 + half]


@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
def test_one_prompt_that_stands_out_has_few_degrees_of_freedom(scale):
    """One of 50 values differs: kurtosis 48.02 leaves 2.1 degrees of 49, whatever the unit."""
    value_p = scale * (np.arange(50) == 0)
    kurtosis = stats.kurtosis(np.arange(50) == 0, fisher=False)
    degrees = 2 * 50 / (kurtosis - 47 / 49)
    half = stats.t.ppf(0.975, degrees) * value_p.std(ddof=1) / np.sqrt(50)
    assert mean_interval(value_p) == pytest.approx([value_p.mean() - half, value_p.mean() + half], rel=1e-9)


def test_a_share_of_equal_prompts_has_wilsons_interval_of_its_responses():
    """Prompts that do not differ beyond chance: the clusters are none, and each response counts."""
    rng = np.random.default_rng(0)
    share_p = rng.binomial(64, 0.9, size=4000) / 64
    known = stats.binomtest(round(share_p.sum() * 64), 4000 * 64).proportion_ci(method="wilson")
    assert share_interval(share_p, n_responses=4000 * 64) == pytest.approx([known.low, known.high], abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_all_responses_are_alike_each_prompt_counts_once(share):
    low, high = share_interval(np.full(30, share), n_responses=30 * 64)
    t = stats.t.ppf(0.975, 29)
    reach = t**2 / (30 + t**2)
    assert [low, high] == pytest.approx([1 - reach, 1.0] if share else [0.0, reach], abs=1e-12)


def test_shares_near_the_edge_are_covered_where_students_t_is_not():
    """Beta-distributed prompts, 97% good: Student's interval misses the truth on the good side in one of eight."""
    rng = np.random.default_rng(1)
    repeats, truth = 600, 0.97
    ours = students = 0
    for _ in range(repeats):
        share_p = rng.binomial(64, rng.beta(truth, 1 - truth, size=90)) / 64
        ours += share_interval(share_p, n_responses=90 * 64)[0] > truth
        students += stats.t.interval(0.95, 89, share_p.mean(), stats.sem(share_p))[0] > truth
    assert students > 0.08 * repeats
    assert ours < 0.05 * repeats
