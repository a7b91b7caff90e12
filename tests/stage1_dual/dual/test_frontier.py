from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

from stage1_dual.dual import (
    AttainableMeans,
    DualProblem,
    InputError,
    solve_dual,
    solve_frontier,
    threshold_at_multipliers,
)


def test_one_constraint_frontier_equals_single_solves_and_is_monotone() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=20, n_constraints=1, seed=2)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=0.0, beta=1.0)
    reference = problem.reference_means_m[0]
    best = float(g_pkm.max(axis=1).mean())
    thresholds_g = np.concatenate([np.linspace(reference - 0.8, best - 0.05, 25), [best, best + 0.1]])
    frontier = solve_frontier(problem, thresholds_g)
    assert frontier.status_g.tolist() == ["certified"] * 25 + ["boundary", "infeasible"]
    assert np.all(np.isnan(frontier.multipliers_gm[25:]))
    assert np.all(np.isnan(frontier.reward_g[25:]))
    solved = slice(0, 25)
    assert np.all(np.diff(frontier.multipliers_gm[solved, 0]) >= 0)
    assert np.all(np.diff(frontier.dual_value_g[solved]) <= 1e-12)
    assert np.all(frontier.kkt_residual_g[solved] <= 1e-10)
    for row in (0, 12, 24):
        alone = solve_dual(problem.with_thresholds(thresholds_g[row]))
        np.testing.assert_allclose(frontier.multipliers_gm[row], alone.multipliers, rtol=1e-9, atol=1e-11)
        assert frontier.reward_g[row] == pytest.approx(alone.predicted_reward, abs=1e-10)
        assert frontier.kl_g[row] == pytest.approx(alone.predicted_kl, abs=1e-10)
        assert frontier.dual_value_g[row] == pytest.approx(alone.dual_value, abs=1e-10)
        assert frontier.ess_median_g[row] == pytest.approx(np.median(alone.ess_p), abs=1e-8)
        np.testing.assert_allclose(frontier.constraints_gm[row], alone.predicted_constraints, atol=1e-10)


def test_multipliers_are_shadow_prices() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=20, n_constraints=2, seed=2)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=1.0)
    centre_m, step = problem.reference_means_m + 0.4, 1e-4
    grid_gm = centre_m + step * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    frontier = solve_frontier(problem, grid_gm)
    value_g = frontier.dual_value_g
    price_m = -np.array([value_g[1] - value_g[2], value_g[3] - value_g[4]]) / (2 * step)
    np.testing.assert_allclose(price_m, frontier.multipliers_gm[0], atol=1e-6)


def test_grid_of_two_constraints_marks_the_infeasible_corner() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=12, n_constraints=2, seed=4)
    g_pkm[..., 1] = 0.3 * g_pkm[..., 1] - g_pkm[..., 0]
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=1.0)
    steps = np.linspace(-0.5, 1.2, 6)
    grid_gm = problem.reference_means_m + np.array([(a, b) for a in steps for b in steps])
    frontier = solve_frontier(problem, grid_gm)
    certified = frontier.status_g == "certified"
    assert set(frontier.status_g) == {"certified", "infeasible"}
    assert frontier.status_g[-1] == "infeasible"
    assert np.all(frontier.kkt_residual_g[certified] <= 1e-10)
    assert np.all(frontier.constraints_gm[certified] >= grid_gm[certified] - 1e-9)
    # Tightening one threshold never raises the optimal value.
    value = frontier.dual_value_g.reshape(6, 6)
    for axis in (0, 1):
        change = np.diff(value, axis=axis)
        assert np.all(change[np.isfinite(change)] <= 1e-12)
    # Warm starts pay: at most a few evaluations a point.
    assert np.median(frontier.n_evaluations_g[certified]) <= 4


def test_inverse_query_is_the_inverse() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=12, n_constraints=3, seed=4)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.zeros(3), beta=0.6)
    lam_m = np.array([0.5, 0.1, 0.9])
    thresholds_m = threshold_at_multipliers(problem, lam_m)
    np.testing.assert_allclose(solve_dual(problem.with_thresholds(thresholds_m)).multipliers, lam_m, atol=1e-9)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[0.0], [1.0]], r"`thresholds_gm` has shape \(2, 1\); it must be \(points, 2\)"),
        ([0.0, 1.0], r"it must be \(points, 2\)"),
        (np.empty((0, 2)), r"at least one point"),
        ([[0.0, 1.0], [np.nan, 1.0]], r"NaN or infinite values in rows \[1\]"),
        ([[0.0, 1.0], [1.0]], r"`thresholds_gm` is not a rectangular array"),
    ],
)
def test_bad_grids_are_named(grid: object, message: str) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=3, n_responses=3, n_constraints=2, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=1.0)
    with pytest.raises(InputError, match=message):
        solve_frontier(problem, grid)  # type: ignore[arg-type]


def test_low_beta_frontier_is_certified() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=10, n_constraints=2, seed=1)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=2e-3)
    frontier = solve_frontier(problem, problem.reference_means_m + np.linspace(-0.2, 0.5, 8)[:, np.newaxis])
    assert set(frontier.status_g) == {"certified"}


def test_what_is_attainable_may_be_shared_between_sweeps() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=10, n_constraints=2, seed=1)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=0.5)
    attainable = AttainableMeans(problem)
    for place in (0, 1):
        grid_gm = problem.reference_means_m + np.linspace(0.0, 3.0, 7)[:, np.newaxis] * np.eye(2)[place]
        shared = solve_frontier(problem, grid_gm, attainable=attainable)
        alone = solve_frontier(problem, grid_gm)
        assert shared.status_g.tolist() == alone.status_g.tolist()
        assert {"certified", "infeasible"} == set(shared.status_g)
        np.testing.assert_allclose(shared.multipliers_gm, alone.multipliers_gm, atol=1e-10)


def test_near_margins_need_one_evaluation_each() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=100, n_responses=64, n_constraints=2, seed=4)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm, axis=(0, 1)), beta=1.0)
    margins_gm = np.linspace(0.05, 0.6, 60)[:, np.newaxis] * np.array([1.0, 0.5])
    frontier = solve_frontier(problem, problem.reference_means_m + margins_gm)
    assert set(frontier.status_g) == {"certified"}
    # The first two have nothing behind them.
    assert np.median(frontier.n_evaluations_g[2:]) == 1
    assert frontier.n_evaluations_g[2:].max() <= 2


@pytest.mark.parametrize("order", ["sorted", "shuffled", "repeated"])
def test_the_order_of_a_grid_changes_no_answer(order: str) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=32, n_constraints=1, seed=5)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm), beta=1.0)
    # Unevenly spaced, from where the constraint is not active to where it is.
    grid_g = float(np.mean(g_pkm)) + np.concatenate([np.linspace(-0.8, 0.1, 9), np.geomspace(0.11, 1.2, 15)])
    if order == "shuffled":
        grid_g = np.random.default_rng(0).permutation(grid_g)
    elif order == "repeated":
        grid_g = np.repeat(grid_g, 2)
    frontier = solve_frontier(problem, grid_g)
    for threshold, lam_m in zip(grid_g, frontier.multipliers_gm, strict=True):
        expected_m = solve_dual(problem.with_thresholds(threshold)).multipliers
        np.testing.assert_allclose(lam_m, expected_m, atol=1e-9)


def test_points_are_predicted_where_the_split_of_multipliers_is_not_unique() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=32, n_constraints=1, seed=6)
    twice_pkm = np.concatenate([g_pkm, g_pkm], axis=2)
    once = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm), beta=1.0)
    twice = DualProblem.from_arrays(r_pk, twice_pkm, thresholds=[np.mean(g_pkm)] * 2, beta=1.0)
    margins_g = np.linspace(-0.3, 1.3, 60)
    expected = solve_frontier(once, once.reference_means_m + margins_g[:, np.newaxis])
    frontier = solve_frontier(twice, twice.reference_means_m + margins_g[:, np.newaxis])
    np.testing.assert_allclose(frontier.multipliers_gm.sum(axis=1), expected.multipliers_gm[:, 0], atol=1e-8)
    # Even all along: a cubic through arbitrary splits would drive them apart.
    np.testing.assert_allclose(frontier.multipliers_gm[:, 0], frontier.multipliers_gm[:, 1], atol=1e-6)
    assert frontier.n_evaluations_g.max() <= 4


def test_a_small_beta_costs_few_evaluations() -> None:
    # Lam* is nearly a step function of the margin: the cubic through two of its points says nothing of the next.
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=32, n_constraints=1, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm), beta=0.02)
    frontier = solve_frontier(problem, problem.reference_means_m + np.linspace(-0.3, 1.3, 60)[:, np.newaxis])
    assert set(frontier.status_g) == {"certified"}
    assert frontier.n_evaluations_g.mean() <= 3.5


def test_a_common_offset_does_not_slow_a_frontier() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=32, n_constraints=1, seed=7)
    margins_g = np.linspace(0.1, 0.9, 40)[:, np.newaxis]
    counts = []
    for offset in (0.0, 1e10):
        problem = DualProblem.from_arrays(r_pk, g_pkm + offset, thresholds=offset, beta=1.0)
        counts.append(solve_frontier(problem, problem.reference_means_m + margins_g).n_evaluations_g.sum())
    assert counts[1] <= counts[0] + 2


def test_an_equality_goes_from_the_worst_to_the_best_mean() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=20, n_constraints=1, seed=2)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=0.0, beta=1.0).with_equalities([True])
    worst, best = g_pkm.min(axis=1).mean(), g_pkm.max(axis=1).mean()
    thresholds_g = np.concatenate([[worst - 0.1], np.linspace(worst + 0.1, best - 0.1, 21), [best + 0.1]])
    frontier = solve_frontier(problem, thresholds_g)
    assert frontier.status_g.tolist() == ["infeasible", *["certified"] * 21, "infeasible"]
    multipliers_g = frontier.multipliers_gm[1:-1, 0]
    assert np.all(np.diff(multipliers_g) > 0)
    assert multipliers_g[0] < 0 < multipliers_g[-1]
    for row in (1, 8, 15, 21):
        alone = solve_dual(problem.with_thresholds(thresholds_g[row]))
        np.testing.assert_allclose(frontier.multipliers_gm[row], alone.multipliers, rtol=1e-9, atol=1e-10)


def test_a_kl_budget_finds_its_beta_at_every_point() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=20, n_constraints=1, seed=2)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=0.0, beta=1.0).with_kl_budget(0.3)
    thresholds_g = problem.reference_means_m[0] + np.array([-0.5, 0.1, 0.3, 0.5, 1.2, 3.0])
    frontier = solve_frontier(problem, thresholds_g)
    # 1.2 can be attained, at more than 0.3 nats.
    assert frontier.status_g.tolist() == [*["certified"] * 4, "infeasible", "infeasible"]
    np.testing.assert_allclose(frontier.kl_g[:4], 0.3, rtol=1e-9)
    assert np.all(np.diff(frontier.reward_g[:4]) < 0)
    for row in range(4):
        alone = solve_dual(problem.with_thresholds(thresholds_g[row]))
        assert frontier.beta_g[row] == pytest.approx(alone.beta, rel=1e-8)
        np.testing.assert_allclose(frontier.multipliers_gm[row], alone.multipliers, rtol=1e-7)
