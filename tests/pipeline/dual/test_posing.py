"""Every statistic against cvxpy over the weights of the samples, and what holds between statistics."""

from __future__ import annotations

from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
from helpers.scored_rows import Rows

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.contracts.statistics import Statistic
from pipeline.dual.posing import PosedProblem, pose
from stage1_dual.dual import solve_dual

N_PROMPTS, N_RESPONSES, BETA = 12, 16, 0.7
GAP = 1e-9
TOLERANCE = float(np.sqrt(2 * N_PROMPTS * GAP / BETA))
"""Of weights: by Pinsker's inequality a policy that is off by so much loses more than the gap that Clarabel leaves."""


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(3)
    prompt_n = np.repeat(np.arange(N_PROMPTS), N_RESPONSES)
    g_n = rng.normal(size=len(prompt_n)) + 0.3 * (prompt_n % 3)
    claims_n = 1.0 + rng.poisson(2.0, len(prompt_n))
    return Rows(
        prompt_n,
        rng.normal(size=len(prompt_n)) - 0.5 * g_n,
        {"g": g_n, "claims": claims_n, "facts": claims_n * (0.6 + 0.1 * np.tanh(g_n))},
        {
            "kind": np.array(["a", "b", "c"], dtype=object)[prompt_n % 3],
            "polite": np.where(rng.random(len(prompt_n)) < 0.4, "yes", "no").astype(object),
        },
    )


def mean(rows: Rows, weight: cp.Expression, value_n: FloatArray) -> cp.Expression:
    return cp.sum(cp.multiply(weight, value_n.reshape(N_PROMPTS, N_RESPONSES))) / N_PROMPTS


def best_weights(rows: Rows, constraint: Constraint, threshold: float) -> FloatArray:
    """Maximise E[r] - beta KL over the weights of the responses, the statistic written down from its definition."""
    weight = cp.Variable((N_PROMPTS, N_RESPONSES), nonneg=True)
    stated, g_n = constraint.statistic, rows.scores[constraint.statistic.score]
    where_n = np.ones(len(g_n))
    for column, values in stated.where:
        where_n = where_n * np.array([value in values for value in rows.columns[column]])
    if stated.kind == "share":
        value_n = np.array([1.0 if g >= stated.at_least else 0.0 for g in g_n])
    elif stated.kind == "shortfall":
        value_n = np.array([max(stated.below - g, 0.0) for g in g_n])
    else:
        value_n = g_n
    under_n = where_n if stated.per is None else where_n * rows.scores[stated.per]
    above, below = mean(rows, weight, value_n * where_n), mean(rows, weight, under_n)
    bound = {">=": above >= threshold * below, "<=": above <= threshold * below, "=": above == threshold * below}
    kl = cp.sum(cp.rel_entr(weight, np.full((N_PROMPTS, N_RESPONSES), 1 / N_RESPONSES))) / N_PROMPTS
    problem = cp.Problem(
        cp.Maximize(mean(rows, weight, rows.reward_n) - BETA * kl),
        [bound[constraint.direction], cp.sum(weight, axis=1) == 1],
    )
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=GAP, tol_gap_rel=GAP, tol_feas=GAP)
    assert problem.status == cp.OPTIMAL
    return np.asarray(weight.value).reshape(-1)


def statistic_under(rows: Rows, statistic: Statistic, weight_n: FloatArray) -> float:
    columns = rows.statistic_columns(statistic)
    h_n = np.ones(len(weight_n)) if columns.h_n is None else columns.h_n
    return float(weight_n @ columns.u_n / (weight_n @ h_n))


A = (("kind", ("a",)),)
CASES = {
    "share": Constraint("c", ">=", 0.75, statistic=Statistic("g", "share", at_least=0.0)),
    "share over the reference": Constraint("c", ">=", margin=0.1, statistic=Statistic("g", "share", at_least=0.0)),
    "at most a share": Constraint("c", "<=", 0.3, statistic=Statistic("g", "share", at_least=0.5)),
    "shortfall": Constraint("c", "<=", 0.1, statistic=Statistic("g", "shortfall", below=0.0)),
    "mean where": Constraint("c", ">=", 0.3, statistic=Statistic("g", where=A)),
    "mean where, over the reference": Constraint("c", ">=", margin=0.4, statistic=Statistic("g", where=A)),
    "share where": Constraint("c", ">=", 0.7, statistic=Statistic("g", "share", at_least=0.0, where=A)),
    "per": Constraint("c", ">=", 0.65, statistic=Statistic("facts", per="claims")),
    "per, over the reference": Constraint("c", ">=", margin=0.02, statistic=Statistic("facts", per="claims")),
    "per where": Constraint("c", ">=", 0.64, statistic=Statistic("facts", per="claims", where=A)),
    "mean given an event": Constraint("c", ">=", 0.6, statistic=Statistic("g", where=(("polite", ("yes",)),))),
    "equality above": Constraint("c", "=", 0.5, statistic=Statistic("g")),
    "equality below": Constraint("c", "=", -0.8, statistic=Statistic("g")),
    "equality of a share": Constraint("c", "=", margin=0.0, statistic=Statistic("g", "share", at_least=0.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_policy_is_the_best_of_all_reweightings(rows: Rows, name: str) -> None:
    constraint = CASES[name]
    uniform_n = np.full(len(rows.prompt_n), 1.0 / N_RESPONSES)
    reference = statistic_under(rows, constraint.statistic, uniform_n)

    posed = pose(rows, constraints=[constraint], beta=BETA)
    solution = solve_dual(posed.problem)
    weight_n = posed.problem.tilted_weights(solution.multipliers)

    np.testing.assert_allclose(
        weight_n, best_weights(rows, constraint, constraint.absolute_threshold(reference)), atol=TOLERANCE
    )
    assert posed.units[0].reference == pytest.approx(reference, abs=1e-12)
    assert statistic_under(rows, constraint.statistic, weight_n) == pytest.approx(
        constraint.absolute_threshold(reference), abs=1e-8
    )
    if "equality" not in name:
        assert solution.multipliers[0] > 0


def slacks(posed: PosedProblem) -> FloatArray:
    return solve_dual(posed.problem).slack


def test_each_category_equals_separate_solves(rows: Rows) -> None:
    each = [
        Constraint(f"c[{kind}]", ">=", margin=0.3, statistic=Statistic("g", where=(("kind", (kind,)),)))
        for kind in "abc"
    ]
    together = solve_dual(pose(rows, constraints=each, beta=BETA).problem).multipliers
    for kind, multiplier in zip("abc", together, strict=True):
        mask_n = rows.columns["kind"] == kind
        own = Rows(
            rows.prompt_n[mask_n],
            rows.reward_n[mask_n],
            {name: score_n[mask_n] for name, score_n in rows.scores.items()},
            {},
        )
        alone = pose(own, constraints=[Constraint("c", ">=", margin=0.3, statistic=Statistic("g"))], beta=BETA)
        assert solve_dual(alone.problem).multipliers[0] == pytest.approx(multiplier, abs=1e-7)


def test_a_band_is_two_bounds_of_which_one_binds(rows: Rows) -> None:
    low = Constraint("g.at_least", ">=", 0.4, statistic=Statistic("g"))
    high = Constraint("g.at_most", "<=", 0.9, statistic=Statistic("g"))
    both = solve_dual(pose(rows, constraints=[low, high], beta=BETA).problem)
    alone = solve_dual(pose(rows, constraints=[low], beta=BETA).problem)
    np.testing.assert_allclose(both.multipliers, [alone.multipliers[0], 0.0], atol=1e-9)


def test_a_share_is_indifferent_to_monotone_rescaling_of_its_score(rows: Rows) -> None:
    def solved(scores: FloatArray, at_least: float) -> FloatArray:
        constraint = Constraint("c", ">=", 0.75, statistic=Statistic("g", "share", at_least=at_least))
        other = replace(rows, scores={"g": scores})
        return solve_dual(pose(other, constraints=[constraint], beta=BETA).problem).multipliers

    g_n = rows.scores["g"]
    np.testing.assert_array_equal(solved(g_n, 0.25), solved(np.exp(2 * g_n), float(np.exp(0.5))))


def test_constants_of_a_prompt_leave_the_policy_and_make_units_those_of_the_statistic(rows: Rows) -> None:
    """A ratio that does not bind, beside a constraint that does."""
    constraints = [
        Constraint("binds", ">=", 0.5, statistic=Statistic("g")),
        Constraint("loose", ">=", margin=-0.1, statistic=Statistic("facts", per="claims")),
    ]
    posed = pose(rows, constraints=constraints, beta=BETA)
    solution = solve_dual(posed.problem)
    there = posed.of_policy(solution.multipliers, beta=BETA)
    again = solve_dual(there.problem)

    np.testing.assert_allclose(again.multipliers, solution.multipliers, atol=1e-8)
    weight_n = there.problem.tilted_weights(again.multipliers)
    value = statistic_under(rows, constraints[1].statistic, weight_n)
    assert there.units[1].value(float(again.predicted_constraints[1])) == pytest.approx(value, abs=1e-9)
    slack = value - (there.units[1].reference - 0.1)
    assert there.units[1].slack(float(again.slack[1])) == pytest.approx(slack, abs=1e-9)
    assert slack > 0.05


def test_the_constants_carry_the_influence_of_the_statistic(rows: Rows) -> None:
    """The mean over redrawn prompts of the column moves as the ratio minus its margin's threshold does."""
    constraint = Constraint("c", ">=", margin=0.02, statistic=Statistic("facts", per="claims"))
    posed = pose(rows, constraints=[constraint], beta=BETA)
    solution = solve_dual(posed.problem)
    there = posed.of_policy(solution.multipliers, beta=BETA)
    weight_n = there.problem.tilted_weights(solution.multipliers)
    column_n = there.plan.turned(rows)[:, 0]
    columns = rows.statistic_columns(constraint.statistic)
    assert columns.h_n is not None

    def sums(weight_n: FloatArray, value_n: FloatArray) -> FloatArray:
        return np.bincount(rows.prompt_n, weight_n * value_n)

    uniform_n = np.full(len(rows.prompt_n), 1.0 / N_RESPONSES)
    step = 1e-6
    for prompt in range(0, N_PROMPTS, 5):
        count_p = np.full(N_PROMPTS, 1.0 / N_PROMPTS)
        count_p[prompt] += step
        moved = count_p @ sums(weight_n, columns.u_n) / (count_p @ sums(weight_n, columns.h_n)) - count_p @ sums(
            uniform_n, columns.u_n
        ) / (count_p @ sums(uniform_n, columns.h_n))
        by_column = there.units[0].slack(float(count_p @ sums(weight_n, column_n)))
        assert (moved - 0.02) / step == pytest.approx(by_column / step, abs=1e-4)


def test_no_row_that_counts_is_said(rows: Rows) -> None:
    constraint = Constraint("c", ">=", 0.0, statistic=Statistic("g", where=(("kind", ("nothing",)),)))
    with pytest.raises(InputError, match=r"constraint `c`: no response counts \(g\[kind=nothing\]\)"):
        pose(rows, constraints=[constraint], beta=BETA)
