from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.dual_oracles import cvxpy_primal
from helpers.dual_problems import draw_scores

from stage1_dual.dual import (
    DualProblem,
    InfeasibleError,
    InputError,
    Tail,
    UngroupedScores,
    climb_ladder,
    evaluate_dual,
    fix_tails,
    group_on_disk,
    maximise_over_tails,
    reference_tail,
    solve_dual,
)
from stage1_dual.dual import cvar as cvar_module


def tail_problem(
    *, margin: float, level: float, n_prompts: int = 60, n_responses: int = 16, seed: int = 3
) -> tuple[np.ndarray, np.ndarray, DualProblem]:
    r_pk, g_pkm = draw_scores(n_prompts=n_prompts, n_responses=n_responses, n_constraints=1, seed=seed)
    loose = DualProblem.from_arrays(r_pk, g_pkm, thresholds=0.0, beta=1.0)
    return r_pk, g_pkm, loose.with_thresholds(reference_tail(loose.samples, 0, level)[1] + margin)


def value_at(problem: DualProblem, tails: list[Tail], at_c: list[float]) -> float:
    try:
        return solve_dual(fix_tails(problem, tails, np.array(at_c))).primal_value
    except InfeasibleError:
        return -np.inf


def replace_rows(problem: DualProblem, rows_of: DualProblem) -> DualProblem:
    """The problem with the caller's rows of the one it was derived from, for weights in their layout."""
    return replace(problem, rows=rows_of.rows)


def policy_cvar(problem: DualProblem, weights_pk: np.ndarray, g_pk: np.ndarray, level: float) -> float:
    """The mean of the worst share of all responses, sorted one by one."""
    order = np.argsort(g_pk, axis=None)
    mass, scores = weights_pk.ravel()[order] / len(weights_pk), g_pk.ravel()[order]
    before = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
    return float(np.clip(level - before, 0.0, mass) @ scores / level)


def test_the_mean_of_the_worst_and_why_its_policies_do_not_mix() -> None:
    def of(scores: list[float]) -> float:
        problem = DualProblem.from_arrays([[0.0] * len(scores)], [scores], thresholds=0.0, beta=1.0)
        return reference_tail(problem.samples, 0, 0.2)[1]

    always_half, mostly_one = [0.5] * 20, [0.0] * 2 + [1.0] * 18
    assert of(always_half) == pytest.approx(0.5)
    assert of(mostly_one) == pytest.approx(0.5)
    assert of(always_half + mostly_one) == pytest.approx(0.375)


def test_prompts_count_the_same_however_many_responses_they_have() -> None:
    prompt, scores = np.array([0, 0, 0, 0, 1]), np.array([1.0, 2.0, 3.0, 4.0, 0.0])
    problem = DualProblem.from_rows(prompt, np.zeros(5), scores, thresholds=0.0, beta=1.0)
    # The worst half is the second prompt, the worst three quarters hold half of the first as well.
    assert reference_tail(problem.samples, 0, 0.5) == pytest.approx((0.0, 0.0))
    assert reference_tail(problem.samples, 0, 0.75) == pytest.approx((2.0, (0.125 * 1 + 0.125 * 2) / 0.75))


@pytest.mark.parametrize("level", [0.2, 0.5])
def test_the_best_level_is_that_of_cvxpy_over_all_scores(level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # The best level is a quantile, hence one of the scores: all of them are tried.
    monkeypatch.setattr(cvar_module, "_FEWEST_IN_TAIL", 0.0)
    monkeypatch.setattr(cvar_module, "_CLOSED", 1e-7)
    r_pk, g_pkm, problem = tail_problem(margin=0.5, level=level, n_prompts=6, n_responses=5, seed=2)
    found = maximise_over_tails(problem, [Tail(0, level)])
    values = {}
    for at in np.unique(g_pkm):
        u_pkm = at - np.maximum(at - g_pkm, 0.0) / level
        if u_pkm.max(axis=1).mean() > problem.thresholds_m[0] + 1e-6:
            values[at] = cvxpy_primal(r_pk, u_pkm, b_m=problem.thresholds_m, beta=1.0).value
    best = max(values, key=lambda at: values[at])
    assert found.at_c[0] == pytest.approx(best, abs=1e-12)
    assert found.solution.primal_value == pytest.approx(values[best], abs=1e-8)
    assert found.largest_gain <= 1e-6
    assert min(values.values()) < values[best] - 0.05


def test_the_policy_meets_its_cvar_and_the_level_is_its_quantile() -> None:
    _, g_pkm, problem = tail_problem(margin=0.3, level=0.1)
    found = maximise_over_tails(problem, [Tail(0, 0.1)])
    weights_pk = replace_rows(found.problem, problem).tilted_weights(found.solution.multipliers)
    g_pk = g_pkm[..., 0]
    assert policy_cvar(problem, weights_pk, g_pk, 0.1) == pytest.approx(problem.thresholds_m[0], abs=1e-9)
    at = found.at_c[0]
    assert np.sum(weights_pk[g_pk < at]) / 60 <= 0.1 <= np.sum(weights_pk[g_pk <= at]) / 60
    # The effective number of responses in the tail.
    tail = weights_pk[g_pk <= at]
    assert found.tail_responses_c[0] == pytest.approx(tail.sum() ** 2 / np.sum(tail**2))
    # Any other level has a policy that meets the CVaR too, at a lower value.
    for other in (at - 0.2, at + 0.2):
        fixed = fix_tails(problem, [Tail(0, 0.1)], np.array([other]))
        there = solve_dual(fixed)
        weights_pk = replace_rows(fixed, problem).tilted_weights(there.multipliers)
        assert policy_cvar(problem, weights_pk, g_pk, 0.1) > problem.thresholds_m[0]
        assert there.primal_value < found.solution.primal_value - 1e-3


def test_the_value_has_the_slope_of_the_formula() -> None:
    _, g_pkm, problem = tail_problem(margin=0.3, level=0.1)
    step = 1e-6
    for at in (-1.7, -1.45):
        fixed = fix_tails(problem, [Tail(0, 0.1)], np.array([at]))
        solution = solve_dual(fixed)
        below = replace_rows(fixed, problem).tilted_weights(solution.multipliers)[g_pkm[..., 0] < at].sum() / 60
        ends = [value_at(problem, [Tail(0, 0.1)], [at + side * step]) for side in (-1, 1)]
        slope = (ends[1] - ends[0]) / (2 * step)
        assert slope == pytest.approx(solution.multipliers[0] * (1 - below / 0.1), abs=1e-5)


def test_a_lower_maximum_does_not_hold_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvar_module, "_FEWEST_IN_TAIL", 0.0)
    rng = np.random.default_rng(199)
    rng.integers(2, 6), rng.integers(3, 6)
    r_pk, g_pk = np.round(rng.normal(size=(3, 5)) * 3, 1), rng.integers(0, 6, size=(3, 5)).astype(float)
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=0.0, beta=0.3)
    best = DualProblem.from_arrays(np.zeros((3, 1)), g_pk.max(axis=1, keepdims=True), thresholds=0.0, beta=1.0)
    reach = [reference_tail(one.samples, 0, 0.5)[1] for one in (problem, best)]
    problem = problem.with_thresholds(reach[0] + 0.6 * (reach[1] - reach[0]))
    values = [value_at(problem, [Tail(0, 0.5)], [at]) for at in range(6)]
    assert values[5] > values[4] + 1e-3
    assert np.argmax(values) == 2
    found = maximise_over_tails(problem, [Tail(0, 0.5)])
    assert found.at_c.tolist() == [2.0]
    assert found.solution.primal_value == pytest.approx(values[2], abs=1e-9)
    # Nor is the least over the levels, which minimising the dual over level and multiplier would find, the answer.
    at_wrong = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
    fixed = fix_tails(problem, [Tail(0, 0.5)], np.array([float(at_wrong)]))
    assert evaluate_dual(fixed, solve_dual(fixed).multipliers).value < values[2] - 0.4


def test_what_is_said_of_other_levels_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvar_module, "_MOST_SOLVES", 8)
    _, _, problem = tail_problem(margin=0.5, level=0.1)
    found = maximise_over_tails(problem, [Tail(0, 0.1)])
    assert found.n_solves <= 16
    assert found.largest_gain > 1e-3
    best = max(value_at(problem, [Tail(0, 0.1)], [at]) for at in np.linspace(-1.9, -1.0, 60))
    assert found.solution.primal_value <= best + 1e-2
    assert best <= found.solution.primal_value + found.largest_gain + 1e-9


def test_two_tails_are_searched_together() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=16, n_constraints=2, seed=3)
    loose = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=1.0)
    tails = [Tail(0, 0.1), Tail(1, 0.2)]
    margins = [0.3, 0.2]
    problem = loose.with_thresholds(
        [reference_tail(loose.samples, tail.place, tail.level)[1] + m for tail, m in zip(tails, margins, strict=True)]
    )
    found = maximise_over_tails(problem, tails)
    assert np.all(found.solution.multipliers > 0)
    assert found.largest_gain <= 1e-3 * max(1.0, problem.reward_scale)
    for shift in ((-0.1, 0.0), (0.1, 0.0), (0.0, -0.1), (0.0, 0.1), (0.1, -0.1), (-0.1, 0.1)):
        assert value_at(problem, tails, list(found.at_c + shift)) <= found.solution.primal_value + found.largest_gain


def test_a_bound_that_the_optimum_meets_anyway_has_no_multiplier() -> None:
    r_pk, g_pkm, problem = tail_problem(margin=-0.8, level=0.1)
    found = maximise_over_tails(problem, [Tail(0, 0.1)])
    assert found.solution.multipliers[0] == 0.0
    assert found.largest_gain == 0.0
    free = DualProblem.from_arrays(r_pk, g_pkm, thresholds=-100.0, beta=1.0)
    assert found.solution.primal_value == pytest.approx(solve_dual(free).primal_value, abs=1e-12)


def test_it_goes_with_other_constraints_equalities_and_a_kl_budget() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=80, n_responses=16, n_constraints=2, seed=5)
    loose = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=1.0)
    thresholds = [reference_tail(loose.samples, 0, 0.1)[1] + 0.4, g_pkm[..., 1].mean() + 0.1]
    problem = loose.with_thresholds(thresholds).with_equalities([False, True]).with_kl_budget(0.3)
    found = maximise_over_tails(problem, [Tail(0, 0.1)])
    assert found.solution.predicted_kl == pytest.approx(0.3, rel=1e-9)
    assert found.solution.slack[1] == pytest.approx(0.0, abs=1e-9)
    assert found.problem.beta == found.solution.beta
    weights_pk = replace_rows(found.problem, problem).tilted_weights(found.solution.multipliers)
    assert policy_cvar(problem, weights_pk, g_pkm[..., 0], 0.1) >= thresholds[0] - 1e-8
    near = [value_at(problem, [Tail(0, 0.1)], [found.at_c[0] + shift]) for shift in (-0.1, 0.1)]
    assert max(near) <= found.solution.primal_value + found.largest_gain


def test_a_cvar_out_of_reach_says_the_largest_there_is() -> None:
    _, g_pkm, problem = tail_problem(margin=0.3, level=0.2, n_prompts=20, n_responses=8, seed=5)
    # Always the best response: the mean of the worst four prompts of twenty.
    largest = np.sort(g_pkm.max(axis=1).ravel())[:4].mean()
    with pytest.raises(InfeasibleError, match=rf"best attainable alone {largest:.6g}") as caught:
        maximise_over_tails(problem.with_thresholds(largest + 0.01), [Tail(0, 0.2)])
    assert caught.value.certificate.best_attainable[0] == pytest.approx(largest)


def test_a_tail_of_too_few_responses_is_refused_with_their_number() -> None:
    _, _, problem = tail_problem(margin=0.3, level=0.02, n_prompts=20, n_responses=8, seed=5)
    with pytest.raises(InputError, match=r"the worst 0\.02 of constraint_0 .* are [\d.]+ responses in effect"):
        maximise_over_tails(problem, [Tail(0, 0.02)])


@pytest.mark.parametrize(
    ("tails", "message"),
    [
        ([], "the places of the tails are"),
        ([Tail(0, 0.1), Tail(0, 0.2)], "distinct"),
        ([Tail(2, 0.1)], "of 0 to 1"),
        ([Tail(1, 0.1)], "constraint_1: a CVaR can be bounded below, not fixed"),
    ],
)
def test_tails_that_make_no_sense_are_refused(tails: list[Tail], message: str) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=10, n_responses=5, n_constraints=2, seed=1)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.0], beta=1.0).with_equalities([False, True])
    with pytest.raises(InputError, match=message):
        maximise_over_tails(problem, tails)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, np.nan])
def test_a_level_lies_between_0_and_1(level: float) -> None:
    with pytest.raises(InputError, match="level of a CVaR"):
        Tail(0, level)


def test_scores_in_files_give_the_same_and_can_be_thinned_out(tmp_path: Path) -> None:
    r_pk, g_pkm, problem = tail_problem(margin=0.3, level=0.1)
    rows = UngroupedScores(
        np.repeat(np.arange(60, dtype=np.uint64), 16), r_pk.ravel(), g_pkm.reshape(-1, 1), np.tile(np.arange(16), 60)
    )
    grouped = group_on_disk([rows], folder=tmp_path, n_rows=len(rows.prompt_n), n_constraints=1)
    assert grouped is not None
    found = maximise_over_tails(problem.with_samples(grouped.scores), [Tail(0, 0.1)])
    expected = maximise_over_tails(problem, [Tail(0, 0.1)])
    assert found.at_c[0] == pytest.approx(expected.at_c[0], abs=1e-12)
    np.testing.assert_allclose(found.solution.multipliers, expected.solution.multipliers, rtol=1e-8)
    ladders = [climb_ladder(one.problem, one.solution) for one in (found, expected)]
    np.testing.assert_allclose(ladders[0].rungs[1].multipliers_m, ladders[1].rungs[1].multipliers_m, rtol=1e-8)
