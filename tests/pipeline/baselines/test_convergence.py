from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.dual_problems import GaussianPopulation, draw_scores, problem_at_depth, two_responses
from helpers.figures import require_nothing_cut_off
from scipy.optimize import brentq

from pipeline.baselines.convergence import (
    BEST_STEP,
    CONVERGENCE,
    OURS,
    RESTARTS,
    SAFE_STEP,
    STEP_ONE,
    convergence_figure,
    convergence_table,
    covariance_bound,
)
from stage1_dual.dual import DualProblem, InfeasibleError, evaluate_dual, solve_dual

# About the scale of the papers' reward models: scores of several units, beta 0.1.
_SCALE, _BETA = 6.0, 0.1


def _scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return GaussianPopulation().draw(np.random.default_rng(seed), n_prompts=80, n_responses=32)


def _easy() -> DualProblem:
    r_pk, g_pk = _scores()
    return DualProblem.from_arrays(r_pk, g_pk, thresholds=float(np.mean(g_pk)) + 0.3, beta=1.0)


def _hard() -> DualProblem:
    r_pk, g_pk = _scores()
    threshold = _SCALE * (float(np.mean(g_pk)) + 0.5)
    return DualProblem.from_arrays(_SCALE * r_pk, _SCALE * g_pk, thresholds=threshold, beta=_BETA)


@pytest.fixture(scope="module")
def easy() -> pa.Table:
    return convergence_table(_easy())


@pytest.fixture(scope="module")
def hard() -> pa.Table:
    return convergence_table(_hard(), n_steps=300)


def _rows(table: pa.Table, method: str) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if row["method"] == method]


def test_who_converges_finds_the_root_of_the_slack(easy: pa.Table) -> None:
    r_pk, g_pk = _scores()

    def slack(lam: float) -> float:
        w_pk = np.exp(r_pk + lam * g_pk)
        return float(np.mean(np.sum(w_pk * g_pk, axis=1) / np.sum(w_pk, axis=1)) - np.mean(g_pk) - 0.3)

    lam_star = float(brentq(slack, 0.0, 5.0, xtol=1e-13))
    assert easy.schema == CONVERGENCE
    ends = {row["method"]: row for row in easy.to_pylist() if row["ending"]}
    assert list(ends) == [OURS, STEP_ONE, RESTARTS, SAFE_STEP, BEST_STEP]
    for method in (OURS, SAFE_STEP, BEST_STEP):
        assert ends[method]["ending"] == "converged"
        # A KKT residual of 1e-8 is an error of lambda of 1e-8 over its curvature, which is of the order of one here.
        assert ends[method]["multiplier"] == pytest.approx(lam_star, abs=1e-7)
        assert abs(ends[method]["gap"]) < 1e-14
        assert ends[method]["slack_norm"] <= 1e-8


@pytest.mark.parametrize("make", [_easy, lambda: two_responses(rho=1.0, a=0.4, beta=1.0)])
def test_our_path_is_the_solver_s(make: Any) -> None:
    problem = make()
    solution = solve_dual(problem)
    ours = _rows(convergence_table(problem, n_steps=5), OURS)
    evaluations = [row["evaluation"] for row in ours]
    # Its evaluations but for the last, which ends with the pass of the certificate.
    assert evaluations == [*range(1, solution.n_evaluations), solution.n_evaluations + 1]
    # Both have a KKT residual of at most 1e-8; which of two such points is given is the certificate's affair.
    assert ours[-1]["multiplier"] == pytest.approx(float(solution.multipliers[0]), abs=1e-8)


def test_below_beta_s_easy_range_our_path_still_ends_at_the_optimum(hard: pa.Table) -> None:
    ours = _rows(hard, OURS)
    assert ours[-1]["ending"] == "converged"
    assert ours[-1]["multiplier"] == pytest.approx(float(solve_dual(_hard()).multipliers[0]), abs=1e-10)
    evaluations = [row["evaluation"] for row in ours]
    assert evaluations == sorted(set(evaluations))


def test_a_step_is_the_slack_times_its_size_and_never_below_zero() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=5, n_responses=6, n_constraints=2, seed=0)
    problem = problem_at_depth(r_pk, g_pkm, depth=0.3, beta=0.2)
    h_pkm = g_pkm - problem.thresholds_m
    lam_m, expected = np.ones(2), []
    for _ in range(6):
        expected.append(lam_m[0])
        w_pk = np.exp((r_pk + h_pkm @ lam_m) / 0.2)
        slack_m = np.mean(np.einsum("pk,pkm->pm", w_pk, h_pkm) / np.sum(w_pk, axis=1)[:, np.newaxis], axis=0)
        lam_m = np.maximum(lam_m - slack_m, 0.0)
    found = [row["multiplier"] for row in _rows(convergence_table(problem, n_steps=6), STEP_ONE)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_safe_step_never_goes_up(hard: pa.Table) -> None:
    gap = np.array([row["gap"] for row in _rows(hard, SAFE_STEP)])
    assert np.all(np.diff(gap) <= 1e-15)
    assert gap[-1] < gap[0]


def test_step_one_oscillates_where_it_is_longer_than_two_over_the_curvature(hard: pa.Table) -> None:
    rows = _rows(hard, STEP_ONE)
    assert rows[-1]["ending"] == "oscillates"
    assert len(rows) == 300
    assert solve_dual(_hard()).hessian[0, 0] > 2.0
    assert min(row["gap"] for row in rows[150:]) > 0.01


def test_restarts_follow_the_published_ladder(hard: pa.Table) -> None:
    rows = _rows(hard, RESTARTS)
    steps = [row["step_size"] for row in rows]
    ladder = list(dict.fromkeys(steps))
    assert ladder == [4.0, 2.0, 0.5, 0.0625, 0.00390625][: len(ladder)]
    assert len(ladder) > 1
    assert [steps.count(step) for step in ladder[:-1]] == [200] * (len(ladder) - 1)
    starts = [steps.index(step) for step in ladder]
    assert [rows[start]["multiplier"] for start in starts] == [1.0] * len(ladder)
    last = [row["multiplier"] for row in rows[-5:]]
    assert max(last) - min(last) < 1e-5
    assert rows[-1]["ending"] in ("converged", "stopped early")
    assert rows[-1]["evaluation"] == len(rows)


def test_the_best_constant_step_needs_no_more_evaluations_than_the_others(easy: pa.Table) -> None:
    best, *others = (_rows(easy, method)[-1]["evaluation"] for method in (BEST_STEP, STEP_ONE, SAFE_STEP))
    assert best <= min(others)


def test_the_bound_holds_for_any_multipliers_and_is_reached_by_two_responses() -> None:
    # Two equally likely responses of scores a and -a have the variance a squared: Popoviciu's bound, at lambda*.
    assert covariance_bound(two_responses(rho=1.0, a=0.4, beta=1.0)) == pytest.approx(0.16)
    r_pk, g_pkm = draw_scores(n_prompts=20, n_responses=8, n_constraints=3, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.zeros(3), beta=0.5)
    rng = np.random.default_rng(1)
    largest = max(
        float(np.linalg.eigvalsh(evaluate_dual(problem, rng.gamma(1.0, 2.0, size=3)).hess_mm)[-1]) for _ in range(50)
    )
    assert 0 < largest * problem.beta < covariance_bound(problem)


def test_an_infeasible_margin_is_no_path_to_show() -> None:
    problem = _easy()
    with pytest.raises(InfeasibleError):
        convergence_table(problem.with_thresholds(problem.reference_means_m + 5.0))


def test_the_figure_marks_every_ending_within_its_bounds(hard: pa.Table) -> None:
    figure = convergence_figure(hard)
    require_nothing_cut_off(figure)
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:5] == [OURS, STEP_ONE, RESTARTS, SAFE_STEP, BEST_STEP]
    assert {"converged", "oscillates"} <= set(labels[5:])
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert "1e-6" in ticks
