from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

from stage1_dual.dual import DualProblem, InputError, predict_heldout, tilt


def test_heldout_prediction_is_the_tilt_of_the_other_prompts() -> None:
    lam_m, b_m = np.array([0.6, 0.3]), np.array([0.4, 0.2])
    other_r, other_g = draw_scores(n_prompts=40, n_responses=20, n_constraints=2, seed=99)
    heldout = DualProblem.from_arrays(other_r, other_g, thresholds=b_m, beta=1.0)
    found = predict_heldout(heldout, lam_m)
    weights_pk = heldout.tilted_weights(lam_m)
    g_pm = np.einsum("pk,pkm->pm", weights_pk, other_g)
    np.testing.assert_allclose(found.constraints, g_pm.mean(axis=0), atol=1e-13)
    np.testing.assert_allclose(found.slack, g_pm.mean(axis=0) - b_m, atol=1e-13)
    assert found.reward == pytest.approx(float(np.einsum("pk,pk->p", weights_pk, other_r).mean()), abs=1e-13)
    half_m = 2.0226909 * g_pm.std(axis=0, ddof=1) / np.sqrt(40)  # Student's t at 39 degrees of freedom
    np.testing.assert_allclose(found.constraints_interval[:, 1] - found.constraints, half_m, rtol=1e-6)
    np.testing.assert_allclose(found.constraints - found.constraints_interval[:, 0], half_m, rtol=1e-6)
    np.testing.assert_allclose(np.diff(found.slack_interval), np.diff(found.constraints_interval), rtol=1e-9)
    assert found.n_prompts == 40
    assert found.kl_interval[0] < found.kl < found.kl_interval[1]


def test_the_held_out_slack_of_a_margin_is_paired_with_the_reference() -> None:
    """Prompts far apart, a gain that is the same on all of them: nothing but the gain is uncertain."""
    rng = np.random.default_rng(0)
    g_pk = rng.normal(size=(100, 64)) + 20 * rng.normal(size=(100, 1))
    heldout = DualProblem.from_arrays(np.zeros_like(g_pk), g_pk, thresholds=g_pk.mean() + 0.5, beta=1.0)
    widths = {}
    for relative in (True, False):
        found = predict_heldout(heldout, [0.45], thresholds_are_relative_m=[relative])
        widths[relative] = float(np.diff(found.slack_interval[0])[0])
        assert found.slack[0] == pytest.approx(found.slack_interval[0].mean(), abs=1e-9)
    gain_p = tilt(heldout, np.array([0.45])).scores_mp[0] - g_pk.mean(axis=1)
    assert widths[True] == pytest.approx(2 * 1.9842 * gain_p.std(ddof=1) / 10, rel=1e-3)
    assert widths[False] > 50 * widths[True]


@pytest.mark.parametrize(
    ("n_prompts", "arguments", "message"),
    [
        (1, {}, r"an interval needs at least 2 prompts; the problem has 1"),
        (2, {"level": 0.0}, r"`level` is 0\.0; it must lie between 0 and 1"),
        (2, {"lam": [-1.0]}, r"`lam` is \[-1\.0\]; multipliers must be finite and not negative"),
        (2, {"thresholds_are_relative_m": [1]}, r"`thresholds_are_relative_m` is \[1\]; it must be 1 booleans"),
    ],
)
def test_bad_arguments_are_named(n_prompts: int, arguments: dict[str, Any], message: str) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=n_prompts, n_responses=4, n_constraints=1, seed=0)
    heldout = DualProblem.from_arrays(r_pk, g_pkm, thresholds=0.0, beta=1.0)
    with pytest.raises(InputError, match=message):
        predict_heldout(heldout, **({"lam": [0.5]} | arguments))
