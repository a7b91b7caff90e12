"""Weighted means within prompts, corrected for finitely many responses."""

from __future__ import annotations

import numpy as np
import pytest

from stage2_policy.data import segment_softmax
from stage2_policy.expectations import corrected_means


def test_it_is_the_jackknife_over_the_responses_of_a_prompt() -> None:
    rng = np.random.default_rng(0)
    prompt_n = np.repeat([0, 1, 2], [5, 1, 7])
    weight_n, column_nc = segment_softmax(rng.normal(size=13), prompt_n), rng.normal(size=(13, 2))
    found = corrected_means(weight_n, prompt_n, column_nc)
    for prompt, count in enumerate([5, 1, 7]):
        rows = np.flatnonzero(prompt_n == prompt)
        mean = np.average(column_nc[rows], axis=0, weights=weight_n[rows])
        if count == 1:
            np.testing.assert_allclose(found[prompt], mean)
            continue
        others = [rows[rows != one] for one in rows]
        left = np.mean([np.average(column_nc[some], axis=0, weights=weight_n[some]) for some in others], axis=0)
        np.testing.assert_allclose(found[prompt], count * mean - (count - 1) * left)


@pytest.mark.parametrize("slope", [0.5, 1.0])
def test_most_of_the_bias_of_finitely_many_responses_is_gone(slope: float) -> None:
    """A standard normal score tilted by its slope has the slope for its mean."""
    rng = np.random.default_rng(1)
    n_prompts, k = 20_000, 16
    prompt_n, score_n = np.repeat(np.arange(n_prompts), k), rng.normal(size=n_prompts * k)
    weight_n = segment_softmax(slope * score_n, prompt_n)
    plain = np.bincount(prompt_n, weights=weight_n * score_n).mean() - slope
    corrected = corrected_means(weight_n, prompt_n, score_n[:, None]).mean() - slope
    assert plain < -0.02
    assert abs(corrected) < 0.4 * abs(plain)


def test_a_response_with_all_the_weight_has_its_own_mean() -> None:
    weight_n = np.array([1.0, 0.0, 0.0, 1.0 - 1e-17, 1e-17])
    found = corrected_means(weight_n, np.array([0, 0, 0, 1, 1]), np.arange(5.0)[:, None])
    np.testing.assert_allclose(found[:, 0], [0.0, 3.0])
