from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_oracles import naive_dual_value
from helpers.dual_problems import draw_scores

import stage1_dual.dual.samples
from stage1_dual.dual import DualProblem, evaluate_dual, tilt

LAMBDAS = [np.zeros(3), np.array([0.4, 0.0, 1.1]), np.array([3.0, 2.0, 0.5])]


def _problem(beta: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, DualProblem]:
    r_pk, g_pkm = draw_scores(n_prompts=15, n_responses=8, n_constraints=3, seed=seed)
    b_m = np.array([0.2, -0.1, 0.4])
    return r_pk, g_pkm, b_m, DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=beta)


@pytest.mark.parametrize("lam_m", LAMBDAS)
@pytest.mark.parametrize("beta", [0.3, 1.0, 7.0])
def test_value_is_the_mean_over_prompts_of_the_log_of_the_mean_over_responses(lam_m: np.ndarray, beta: float) -> None:
    r_pk, g_pkm, b_m, problem = _problem(beta)
    naive = naive_dual_value(r_pk, g_pkm, b_m=b_m, beta=beta, lam_m=lam_m)
    assert evaluate_dual(problem, lam_m).value == pytest.approx(naive, abs=1e-12)


@pytest.mark.parametrize("lam_m", LAMBDAS)
def test_slack_is_the_gradient_and_hessian_its_derivative(lam_m: np.ndarray) -> None:
    _, _, _, problem = _problem()
    evaluation = evaluate_dual(problem, lam_m)
    step = 1e-5
    for j, unit in enumerate(np.eye(3)):
        ahead, behind = evaluate_dual(problem, lam_m + step * unit), evaluate_dual(problem, lam_m - step * unit)
        # The floor of a central difference at this step on scores of order 1 is about 1e-10.
        assert evaluation.slack_m[j] == pytest.approx((ahead.value - behind.value) / (2 * step), abs=1e-8)
        np.testing.assert_allclose(evaluation.hess_mm[j], (ahead.slack_m - behind.slack_m) / (2 * step), atol=1e-8)


def test_reference_at_zero() -> None:
    r_pk, g_pkm, b_m, _ = _problem()
    huge_beta = DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=1e9)
    evaluation = evaluate_dual(huge_beta, np.zeros(3))
    assert evaluation.value == pytest.approx(r_pk.mean(), abs=1e-6)
    np.testing.assert_allclose(evaluation.slack_m, g_pkm.mean(axis=(0, 1)) - b_m, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_convex_along_random_segments(seed: int) -> None:
    _, _, _, problem = _problem(seed=seed)
    rng = np.random.default_rng(seed)
    start, end = rng.exponential(size=(2, 3))
    mixed = [evaluate_dual(problem, start + t * (end - start)).value for t in (0.0, 0.3, 1.0)]
    assert mixed[1] <= 0.7 * mixed[0] + 0.3 * mixed[2] + 1e-13
    assert np.linalg.eigvalsh(evaluate_dual(problem, end).hess_mm).min() >= -1e-15


def test_ragged_and_dense_paths_agree_across_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # One block of several tiles; then several partitions, with one prompt longer than that.
    r_pk, g_pkm = draw_scores(n_prompts=1_500, n_responses=50, n_constraints=2, seed=4)
    dense = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.1, 0.2], beta=1.0)
    assert len(dense.samples.partitions) == 1
    (block,) = dense.samples.partitions[0].blocks()
    assert len(block.tiles) == 3
    monkeypatch.setattr(stage1_dual.dual.samples, "PARTITION_ROWS", 16_384)
    long_r, long_g = draw_scores(n_prompts=1, n_responses=35_000, n_constraints=2, seed=5)
    ids = np.concatenate([np.repeat(np.arange(1_500), 50), np.full(35_000, 1_500)])
    ragged = DualProblem.from_rows(
        ids,
        np.concatenate([r_pk.reshape(-1), long_r[0]]),
        np.concatenate([g_pkm.reshape(-1, 2), long_g[0]]),
        thresholds=[0.1, 0.2],
        beta=1.0,
    )
    long = DualProblem.from_arrays(long_r, long_g, thresholds=[0.1, 0.2], beta=1.0)
    assert len(ragged.samples.partitions) > 3
    lam_m = np.array([0.4, 0.7])
    whole, part, rest = (evaluate_dual(problem, lam_m) for problem in (ragged, dense, long))
    assert whole.value == pytest.approx((1_500 * part.value + rest.value) / 1_501, abs=1e-13)
    np.testing.assert_allclose(whole.slack_m, (1_500 * part.slack_m + rest.slack_m) / 1_501, atol=1e-13)
    np.testing.assert_allclose(whole.hess_mm, (1_500 * part.hess_mm + rest.hess_mm) / 1_501, atol=1e-13)
    np.testing.assert_allclose(tilt(ragged, lam_m).kl_p[:1_500], tilt(dense, lam_m).kl_p, atol=1e-13)
