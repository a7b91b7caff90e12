from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.dual_problems import GaussianPopulation, draw_scores

from stage1_dual.dual import (
    DualProblem,
    InputError,
    PromptSample,
    bootstrap_intervals,
    sandwich_standard_errors,
    solve_dual,
    tilt,
)


def _problem(n_constraints: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, DualProblem]:
    r_pk, g_pkm = draw_scores(n_prompts=150, n_responses=32, n_constraints=n_constraints, seed=seed)
    thresholds_m = g_pkm.mean(axis=(0, 1)) + 0.3
    return r_pk, g_pkm, DualProblem.from_arrays(r_pk, g_pkm, thresholds=thresholds_m, beta=1.0)


def _resolve(
    r_pk: np.ndarray, g_pkm: np.ndarray, problem: DualProblem, rows: np.ndarray, relative: bool
) -> DualProblem:
    margin_m = problem.thresholds_m - problem.reference_means_m
    g = g_pkm[rows]
    b_m = g.mean(axis=(0, 1)) + margin_m if relative else problem.thresholds_m
    again = DualProblem.from_arrays(r_pk[rows], g, thresholds=b_m, beta=problem.beta)
    return again.with_equalities(problem.is_equality_m)


@pytest.mark.parametrize("is_equality_m", [[False, False], [True, False]])
@pytest.mark.parametrize("relative", [False, True])
def test_replicates_match_full_solves(relative: bool, is_equality_m: list[bool]) -> None:
    r_pk, g_pkm, problem = _problem()
    if is_equality_m[0]:
        # Where its multiplier is about 0 and of either sign in the replicates.
        unmoved_m = np.mean(tilt(problem, np.array([0.0, 0.3])).scores_mp, axis=1)
        problem = problem.with_thresholds([unmoved_m[0], problem.thresholds_m[1]]).with_equalities(is_equality_m)
    solution = solve_dual(problem)
    n_replicates = 120
    intervals = bootstrap_intervals(
        problem,
        solution,
        rng=np.random.default_rng(5),
        n_replicates=n_replicates,
        thresholds_are_relative_m=[relative, relative],
    )
    # The same generator draws the same multiplicities again.
    counts_bp = np.random.default_rng(5).multinomial(150, np.full(150, 1 / 150), size=n_replicates)
    full = [
        solve_dual(_resolve(r_pk, g_pkm, problem, np.repeat(np.arange(150), counts_p), relative))
        for counts_p in counts_bp
    ]
    full_bm = np.array([replicate.multipliers for replicate in full])
    spread_m = full_bm.std(axis=0)
    error_bm = np.abs(intervals.multiplier_replicates_bm - full_bm) / spread_m
    if is_equality_m[0] and not relative:
        assert full_bm[:, 0].min() < 0 < full_bm[:, 0].max()
    # Measured: median 0.001, 95% quantile 0.008 of a standard error.
    assert np.median(error_bm) < 0.005
    assert np.quantile(error_bm, 0.95) < 0.03
    for found, name in [
        (intervals.multipliers, "multipliers"),
        (intervals.optimum.reward, "predicted_reward"),
        (intervals.optimum.constraints, "predicted_constraints"),
        (intervals.optimum.kl, "predicted_kl"),
    ]:
        values_b = np.array([getattr(replicate, name) for replicate in full])
        ends = np.moveaxis(np.quantile(values_b, [0.025, 0.975], axis=0), 0, -1)
        spread = np.maximum(values_b.std(axis=0), 1e-8)[..., np.newaxis]
        np.testing.assert_allclose((found - ends) / spread, 0.0, atol=0.05, err_msg=name)


def test_policy_intervals_are_the_bootstrap_of_the_policy_as_it_is() -> None:
    _, _, problem = _problem()
    solution = solve_dual(problem)
    intervals = bootstrap_intervals(problem, solution, rng=np.random.default_rng(5), n_replicates=200)
    counts_bp = np.random.default_rng(5).multinomial(150, np.full(150, 1 / 150), size=200)
    tilted = tilt(problem, solution.multipliers)
    tail = (1 - 0.95) / 2
    for found, values_p in [
        (intervals.policy.reward, tilted.reward_p),
        (intervals.policy.constraints[1], tilted.scores_mp[1]),
        (intervals.policy.kl, tilted.kl_p),
        (intervals.policy.slack[0], tilted.slack_mp[0]),
    ]:
        expected = np.quantile(counts_bp @ values_p / 150, [tail, 1 - tail], method="inverted_cdf")
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_active_absolute_threshold_has_no_width_at_the_optimum_and_a_relative_one_has_the_references() -> None:
    _, g_pkm, problem = _problem(n_constraints=1)
    solution = solve_dual(problem)
    absolute = bootstrap_intervals(problem, solution, rng=np.random.default_rng(0))
    np.testing.assert_allclose(absolute.optimum.constraints[0], problem.thresholds_m[0], atol=1e-12)
    relative = bootstrap_intervals(problem, solution, rng=np.random.default_rng(0), thresholds_are_relative_m=[True])
    reference_error = g_pkm.mean(axis=1).std(ddof=1) / np.sqrt(150)
    width = float(np.diff(relative.optimum.constraints[0])[0])
    assert width == pytest.approx(2 * 1.96 * reference_error, rel=0.15)
    np.testing.assert_allclose(relative.optimum.slack[0], 0.0, atol=1e-12)


def test_intervals_never_go_below_zero_and_inactive_multipliers_stay_there() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=100, n_responses=16, n_constraints=2, seed=1)
    loose = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, -3.0], beta=1.0)
    at_zero = np.mean(tilt(loose, np.zeros(2)).scores_mp[0])
    # The first constraint is active by a hair: half of the replicates do not need it.
    problem = loose.with_thresholds([at_zero + 1e-3, -3.0])
    intervals = bootstrap_intervals(problem, solve_dual(problem), rng=np.random.default_rng(0))
    assert np.all(intervals.multiplier_replicates_bm >= 0)
    assert intervals.multipliers[0, 0] == 0.0
    assert intervals.multipliers[0, 1] > 0.05
    assert np.mean(intervals.multiplier_replicates_bm[:, 0] == 0) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(intervals.multipliers[1], 0.0)


@pytest.mark.parametrize("relative", [False, True])
def test_sandwich_agrees_with_the_bootstrap(relative: bool) -> None:
    _, _, problem = _problem(seed=3)
    solution = solve_dual(problem)
    mask = [relative, relative]
    errors = sandwich_standard_errors(problem, solution, thresholds_are_relative_m=mask)
    intervals = bootstrap_intervals(
        problem, solution, rng=np.random.default_rng(1), n_replicates=2_000, thresholds_are_relative_m=mask
    )
    # 2,000 replicates leave 1.6% on a standard deviation and a few on percentiles; the delta method is first order.
    np.testing.assert_allclose(intervals.multiplier_replicates_bm.std(axis=0), errors.multipliers, rtol=0.12)
    for interval, error in [
        (intervals.optimum.reward, errors.optimum.reward),
        (intervals.optimum.kl, errors.optimum.kl),
        (intervals.policy.reward, errors.policy.reward),
        (intervals.policy.constraints[0], errors.policy.constraints[0]),
        (intervals.policy.slack[1], errors.policy.slack[1]),
        (intervals.policy.kl, errors.policy.kl),
    ]:
        assert float(np.diff(interval)[0]) == pytest.approx(2 * 1.96 * float(error), rel=0.15)


def test_offsets_do_not_touch_the_intervals() -> None:
    r_pk, g_pkm, problem = _problem()
    moved = DualProblem.from_arrays(r_pk + 1e6, g_pkm + 1e6, thresholds=problem.thresholds_m + 1e6, beta=1.0)
    plain = bootstrap_intervals(problem, solve_dual(problem), rng=np.random.default_rng(0), n_replicates=50)
    other = bootstrap_intervals(moved, solve_dual(moved), rng=np.random.default_rng(0), n_replicates=50)
    np.testing.assert_allclose(other.multipliers, plain.multipliers, atol=1e-7)
    np.testing.assert_allclose(other.optimum.reward - 1e6, plain.optimum.reward, atol=1e-7)


def test_the_generator_decides_everything() -> None:
    _, _, problem = _problem()
    solution = solve_dual(problem)
    first, again, other = (
        bootstrap_intervals(problem, solution, rng=np.random.default_rng(seed), n_replicates=30) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.multiplier_replicates_bm, again.multiplier_replicates_bm)
    assert np.any(first.multipliers != other.multipliers)


def test_coverage_on_the_gaussian_population() -> None:
    population = GaussianPopulation()
    rng = np.random.default_rng(2026)
    n_trials, hits, z_values = 80, np.zeros(3), []
    for _ in range(n_trials):
        r_pk, g_pk = population.draw(rng, n_prompts=50, n_responses=500)
        problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + population.margin, beta=population.beta)
        solution = solve_dual(problem)
        intervals = bootstrap_intervals(problem, solution, rng=rng, n_replicates=300, thresholds_are_relative_m=[True])
        errors = sandwich_standard_errors(problem, solution, thresholds_are_relative_m=[True])
        z_values.append((solution.multipliers[0] - population.lam_star) / errors.multipliers[0])
        for at, (interval, truth) in enumerate(
            [
                (intervals.multipliers[0], population.lam_star),
                (intervals.optimum.reward, population.reward),
                (intervals.optimum.constraints[0], population.margin),
            ]
        ):
            hits[at] += interval[0] <= truth <= interval[1]
    # |z| < 4 on the count of a binomial at 95%.
    z_hits = (hits - 0.95 * n_trials) / np.sqrt(n_trials * 0.95 * 0.05)
    assert np.all(np.abs(z_hits) < 4), hits / n_trials
    # Studentised errors have mean 0 and variance 1 up to the finite-response bias.
    assert abs(np.mean(z_values)) < 4 / np.sqrt(n_trials)
    assert 0.75 < np.std(z_values) < 1.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_replicates": 1}, r"`n_replicates` is 1; it must be at least 2"),
        ({"level": 1.0}, r"`level` is 1\.0; it must lie between 0 and 1"),
        ({"thresholds_are_relative_m": [True]}, r"`thresholds_are_relative_m` is \[True\]; it must be 2 booleans"),
        ({"thresholds_are_relative_m": [1.0, 0.0]}, r"it must be 2 booleans"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    _, _, problem = _problem()
    with pytest.raises(InputError, match=message):
        bootstrap_intervals(problem, solve_dual(problem), rng=np.random.default_rng(0), **arguments)


def test_a_reward_alone_has_intervals_too() -> None:
    r_pk, _ = draw_scores(n_prompts=40, n_responses=8, n_constraints=0, seed=0)
    problem = DualProblem.from_arrays(r_pk, np.empty((40, 8, 0)), thresholds=[], beta=1.0)
    solution = solve_dual(problem)
    intervals = bootstrap_intervals(problem, solution, rng=np.random.default_rng(0))
    assert intervals.multipliers.shape == intervals.policy.constraints.shape == (0, 2)
    low, high = intervals.optimum.reward
    assert low < solution.predicted_reward < high
    np.testing.assert_array_equal(intervals.optimum.reward, intervals.policy.reward)


def test_one_prompt_has_no_interval() -> None:
    problem = DualProblem.from_arrays([[0.0, 1.0]], [[1.0, 0.0]], thresholds=0.4, beta=1.0)
    solution = solve_dual(problem)
    for act in (
        lambda: bootstrap_intervals(problem, solution, rng=np.random.default_rng(0)),
        lambda: sandwich_standard_errors(problem, solution),
    ):
        with pytest.raises(InputError, match="at least 2 prompts; the problem has 1"):
            act()


def test_replicates_out_of_reach_make_the_interval_open() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=6, n_constraints=1, seed=4)
    best = float(np.mean(np.max(g_pkm[..., 0], axis=1)))
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=best - 0.02, beta=1.0)
    intervals = bootstrap_intervals(problem, solve_dual(problem), rng=np.random.default_rng(0))
    assert intervals.infeasible_fraction > 0.1
    assert np.isinf(intervals.multipliers[0, 1])
    # By hand: in such a replicate even the best response to each prompt leaves the mean below the threshold.
    counts_bp = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=1_000)
    reach_b = counts_bp @ np.max(g_pkm[..., 0], axis=1) / 40
    assert intervals.infeasible_fraction == pytest.approx(np.mean(reach_b <= best - 0.02))


def test_one_pass_over_the_prompts_serves_bootstrap_and_sandwich() -> None:
    _, _, problem = _problem()
    solution = solve_dual(problem)
    sample = PromptSample.gather(problem, solution, thresholds_are_relative_m=[True, False])
    together = sample.bootstrap_intervals(rng=np.random.default_rng(3), n_replicates=50)
    alone = bootstrap_intervals(
        problem,
        solution,
        rng=np.random.default_rng(3),
        n_replicates=50,
        thresholds_are_relative_m=[True, False],
    )
    np.testing.assert_array_equal(together.multiplier_replicates_bm, alone.multiplier_replicates_bm)
    errors = sandwich_standard_errors(problem, solution, thresholds_are_relative_m=[True, False])
    np.testing.assert_array_equal(sample.standard_errors().policy.slack, errors.policy.slack)


def test_an_equality_out_of_reach_has_an_infinite_multiplier_of_its_sign() -> None:
    # One prompt in ten reaches below 0: sets without it cannot come down to a mean of -0.05.
    g_pk = np.tile([0.0, 1.0], (30, 1))
    g_pk[:3, 0] = -1.0
    problem = DualProblem.from_arrays(np.zeros((30, 2)), g_pk, thresholds=-0.02, beta=1.0).with_equalities([True])
    intervals = bootstrap_intervals(problem, solve_dual(problem), rng=np.random.default_rng(0), n_replicates=400)
    counts_bp = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=400)
    out_of_reach_b = -counts_bp[:, :3].sum(axis=1) / 30 >= -0.02
    np.testing.assert_array_equal(intervals.multiplier_replicates_bm[out_of_reach_b, 0], -np.inf)
    assert np.isfinite(intervals.multiplier_replicates_bm[~out_of_reach_b]).all()
    assert intervals.infeasible_fraction == pytest.approx(out_of_reach_b.mean())
