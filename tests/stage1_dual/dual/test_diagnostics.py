from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

from stage1_dual.dual import DualProblem, diagnose, solve_dual


def _diagnose(problem: DualProblem):  # type: ignore[no-untyped-def]
    return diagnose(problem, solve_dual(problem))


def test_healthy_problem_has_no_warnings_and_right_figures() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=64, n_constraints=1, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=g_pkm.mean() + 0.2, beta=1.0)
    solution = solve_dual(problem)
    diagnostics = diagnose(problem, solution)
    assert diagnostics.warnings == ()
    ess_p = 1 / np.sum(problem.tilted_weights(solution.multipliers) ** 2, axis=1)
    assert diagnostics.ess_median == pytest.approx(np.median(ess_p), rel=1e-12)
    assert diagnostics.ess_fraction_below_2 == 0.0
    assert diagnostics.ess_quantiles[2] == pytest.approx(diagnostics.ess_median)
    assert diagnostics.log_samples == pytest.approx(np.log(64))
    assert diagnostics.kl == solution.predicted_kl


def test_a_constant_reward_is_said() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=16, n_constraints=1, seed=0)
    said = "The reward is the same for all responses of every prompt"
    varies_between_prompts = np.repeat(r_pk[:, :1], 16, axis=1)
    problem = DualProblem.from_arrays(varies_between_prompts, g_pkm, thresholds=g_pkm.mean() + 0.2, beta=1.0)
    assert [warning[: len(said)] for warning in _diagnose(problem).warnings] == [said]
    varies_between_prompts[3, 2] += 1e-6
    problem = DualProblem.from_arrays(varies_between_prompts, g_pkm, thresholds=g_pkm.mean() + 0.2, beta=1.0)
    assert _diagnose(problem).warnings == ()


def test_structure_is_reported() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=16, n_constraints=1, seed=0)
    g_pkm = np.concatenate([g_pkm, g_pkm, np.ones_like(g_pkm)], axis=2)
    b_m = np.array([g_pkm[..., 0].mean() + 0.3] * 2 + [0.5])
    warnings = _diagnose(
        DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=1.0, constraint_names=["a", "b", "c"])
    ).warnings
    assert any("Constraints a, b are linearly dependent" in warning for warning in warnings)
    assert any("Constraint c has the same score" in warning for warning in warnings)
    few = _diagnose(DualProblem.from_rows([0, 0, 1], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], thresholds=0.1, beta=1.0))
    assert any("1 of 2 prompts have a single response" in warning for warning in few.warnings)


def test_effective_sample_size_below_two_is_counted() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=32, n_constraints=1, seed=0)
    diagnostics = _diagnose(DualProblem.from_arrays(6 * r_pk, g_pkm, thresholds=0.0, beta=0.1))
    assert diagnostics.ess_fraction_below_2 > 0.8
    assert diagnostics.pareto_k_median > 0.7
    assert diagnostics.pareto_k_fraction > 0.9
