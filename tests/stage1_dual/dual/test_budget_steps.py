from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

from stage1_dual.dual import (
    DualProblem,
    DualSolution,
    PromptSample,
    bootstrap_intervals,
    sandwich_standard_errors,
    solve_dual,
    tilt,
)
from stage1_dual.dual.budget_steps import BudgetMoments


def _problem() -> tuple[np.ndarray, np.ndarray, DualProblem]:
    r_pk, g_pkm = draw_scores(n_prompts=150, n_responses=24, n_constraints=2, seed=5)
    thresholds_m = g_pkm.mean(axis=(0, 1)) + np.array([0.3, -0.2])
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=thresholds_m, beta=1.0)
    return r_pk, g_pkm, problem.with_equalities([False, True]).with_kl_budget(0.3)


def _gather(problem: DualProblem, solution: DualSolution) -> BudgetMoments:
    sample = PromptSample.gather(problem, solution)
    return BudgetMoments.gather(sample.problem, solution.multipliers, sample.units.means(), 0.3)


def test_derivatives_are_those_of_the_policy() -> None:
    _, _, problem = _problem()
    solution = solve_dual(problem)
    moments = _gather(problem, solution)
    errors = []
    for share in (1.0, 0.5):
        step_z = share * np.array([0.02, -0.01, 0.03])
        z_z = moments.start_z + step_z
        there = tilt(problem.with_beta(solution.beta * z_z[0]), z_z[1:] * solution.beta / problem.score_scale_m)
        move_bi = moments.moves(step_z[np.newaxis])
        gained_i = moments.expand(move_bi)[0]
        gradient_z = moments.gradient_bz[0] + moments._expand_gradient(move_bi)[0]
        expanded = [solution.predicted_reward + gained_i[0], *(solution.predicted_constraints + gained_i[1:])]
        actual = [np.mean(there.reward_p), *np.mean(there.scores_mp, axis=1)]
        errors.append(np.abs(np.subtract([*expanded, 0.3 - gradient_z[0]], [*actual, np.mean(there.kl_p)])))
    # What is left is of third order: an eighth of it at half the step.
    assert np.all(errors[0] < 1e-5)
    np.testing.assert_allclose(errors[1] / errors[0], 1 / 8, rtol=0.1)
    np.testing.assert_allclose(moments.hessian_bzz[0], moments.hessian_bzz[0].T, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("relative", [False, True])
def test_replicates_match_full_solves(relative: bool) -> None:
    r_pk, g_pkm, problem = _problem()
    solution = solve_dual(problem)
    mask = [relative, relative]
    intervals = bootstrap_intervals(
        problem, solution, rng=np.random.default_rng(5), n_replicates=100, thresholds_are_relative_m=mask
    )
    full = []
    for counts_p in np.random.default_rng(5).multinomial(150, np.full(150, 1 / 150), size=100):
        rows = np.repeat(np.arange(150), counts_p)
        shift_m = g_pkm[rows].mean(axis=(0, 1)) - g_pkm.mean(axis=(0, 1)) if relative else np.zeros(2)
        again = DualProblem.from_arrays(r_pk[rows], g_pkm[rows], thresholds=problem.thresholds_m + shift_m, beta=1.0)
        full.append(solve_dual(again.with_equalities([False, True]).with_kl_budget(0.3)))
    full_bm = np.array([one.multipliers for one in full])
    error_bm = np.abs(intervals.multiplier_replicates_bm - full_bm) / full_bm.std(axis=0)
    # Measured: 95% quantile 0.05 under absolute thresholds, which move by a third of a standard deviation here.
    assert np.quantile(error_bm, 0.95) < (0.01 if relative else 0.1)
    for found, values_b in [
        (intervals.beta, np.array([one.beta for one in full])),
        (intervals.optimum.reward, np.array([one.predicted_reward for one in full])),
    ]:
        assert found is not None
        ends = np.quantile(values_b, [0.025, 0.975], method="inverted_cdf")
        np.testing.assert_allclose((found - ends) / values_b.std(), 0.0, atol=0.1)
    # Every one of them spends the budget and meets the equality.
    np.testing.assert_array_equal(intervals.optimum.kl, 0.3)
    np.testing.assert_array_equal(intervals.optimum.slack[1], 0.0)
    # What the policy as it is spends on other prompts is another matter.
    assert intervals.policy.kl[0] < 0.3 < intervals.policy.kl[1]


def test_sandwich_agrees_with_the_bootstrap() -> None:
    _, _, problem = _problem()
    solution = solve_dual(problem)
    mask = [True, True]
    errors = sandwich_standard_errors(problem, solution, thresholds_are_relative_m=mask)
    intervals = bootstrap_intervals(
        problem, solution, rng=np.random.default_rng(1), n_replicates=2_000, thresholds_are_relative_m=mask
    )
    np.testing.assert_allclose(intervals.multiplier_replicates_bm.std(axis=0), errors.multipliers, rtol=0.12)
    assert errors.beta is not None
    assert intervals.beta is not None
    for interval, error in [
        (intervals.beta, errors.beta),
        (intervals.optimum.reward, errors.optimum.reward),
        (intervals.policy.kl, errors.policy.kl),
    ]:
        assert np.diff(interval)[0] == pytest.approx(2 * 1.96 * error, rel=0.12)
    assert errors.optimum.kl == 0.0
    plain = problem.with_kl_budget(None)
    assert sandwich_standard_errors(plain, solve_dual(plain)).beta is None
