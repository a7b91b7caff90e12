from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_oracles import naive_policy
from helpers.dual_problems import draw_scores

from stage1_dual.dual import DualProblem, build_normaliser, tilt


def test_tilted_policy_by_hand() -> None:
    problem = DualProblem.from_arrays([[0.0, np.log(3.0)]], [[1.0, -1.0]], thresholds=0.25, beta=1.0)
    tilted = tilt(problem, np.zeros(1))
    np.testing.assert_allclose(problem.tilted_weights([0.0]), [[0.25, 0.75]], rtol=1e-15)
    assert tilted.log_z_p[0] == pytest.approx(np.log(2.0))
    assert tilted.reward_p[0] == pytest.approx(0.75 * np.log(3.0))
    assert tilted.scores_mp[0, 0] == pytest.approx(-0.5)
    assert tilted.slack_mp[0, 0] == pytest.approx(-0.75)
    assert tilted.kl_p[0] == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert tilted.ess_p[0] == pytest.approx(1 / (0.25**2 + 0.75**2))


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
def test_weights_and_normaliser_agree_with_the_definition(beta: float, is_ragged: bool) -> None:
    """From one response a prompt taking all to none being moved; rows read in any order have the same weights."""
    r_pk, g_pkm = draw_scores(n_prompts=9, n_responses=5, n_constraints=2, seed=0)
    rng, lam_m = np.random.default_rng(0), np.array([0.7, 0.2])
    order_n = rng.permutation(45)[: 37 if is_ragged else 45]
    prompt_n = np.repeat(np.arange(9), 5)[order_n]
    reward_n, scores_nm = 1e3 + r_pk.reshape(-1)[order_n], g_pkm.reshape(-1, 2)[order_n] - 50
    problem = DualProblem.from_rows(prompt_n, reward_n, scores_nm, thresholds=[0.0, 0.0], beta=beta)
    weights_n = problem.tilted_weights(lam_m)
    exponent_n = (r_pk.reshape(-1) + g_pkm.reshape(-1, 2) @ lam_m)[order_n] / beta
    for prompt in range(9):
        rows = prompt_n == prompt
        expected = np.exp(exponent_n[rows] - exponent_n[rows].max())
        # An offset of 1e3 leaves 1e-13 of a score, over beta.
        np.testing.assert_allclose(weights_n[rows], expected / expected.sum(), rtol=1e-12 + 1e-12 / beta)
    normaliser = build_normaliser(problem, lam_m)
    few = rng.permutation(len(order_n))[:11]
    read_n = normaliser.weights(prompt_n[few], reward_n[few], scores_nm[few])
    np.testing.assert_allclose(read_n, weights_n[few], rtol=1e-11)


def test_tilt_is_the_definition_prompt_by_prompt() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=12, n_responses=7, n_constraints=2, seed=1)
    b_m, lam_m = np.array([0.3, -0.2]), np.array([0.5, 1.5])
    tilted = tilt(DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=0.4), lam_m)
    policy = naive_policy(r_pk, g_pkm, b_m=b_m, beta=0.4, lam_m=lam_m)
    assert tilted.reward_p.mean() == pytest.approx(policy.reward, rel=1e-12)
    assert tilted.kl_p.mean() == pytest.approx(policy.kl, rel=1e-12)
    np.testing.assert_allclose(tilted.slack_mp.mean(axis=1), policy.slack_m, rtol=1e-12)
    np.testing.assert_allclose(tilted.ess_p, policy.ess_p, rtol=1e-12)
    np.testing.assert_allclose(tilted.scores_mp - tilted.slack_mp, np.tile(b_m[:, np.newaxis], 12), atol=1e-14)
