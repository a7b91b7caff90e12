from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_oracles import cvxpy_budget
from helpers.dual_problems import draw_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_dual.dual import (
    LARGEST_KL_SHARE,
    DualProblem,
    InfeasibleError,
    InputError,
    KlBudgetError,
    certify,
    evaluate_dual,
    solve_dual,
)

SHAPE = {"n_prompts": 20, "n_responses": 12, "seed": 3}


def budget_problem(margins: list[float], *, kl: float, equal: tuple[int, ...] = (), **shape: int) -> DualProblem:
    r_pk, g_pkm = draw_scores(n_constraints=len(margins), **{**SHAPE, **shape})
    thresholds = g_pkm.mean(axis=(0, 1)) + margins
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=thresholds, beta=1.0)
    return problem.with_equalities(np.isin(np.arange(len(margins)), equal)).with_kl_budget(kl)


@pytest.mark.parametrize(
    ("margins", "kl", "equal"),
    [([0.3], 0.3, ()), ([0.3, 0.2], 0.5, ()), ([0.3, -0.2], 0.3, (1,)), ([-1.0], 0.1, ()), ([], 0.2, ())],
)
def test_agrees_with_cvxpy(margins: list[float], kl: float, equal: tuple[int, ...]) -> None:
    problem = budget_problem(margins, kl=kl, equal=equal)
    solution = solve_dual(problem)
    r_pk, g_pkm = draw_scores(n_constraints=len(margins), **SHAPE)
    answer = cvxpy_budget(r_pk, g_pkm, b_m=problem.thresholds_m, kl=kl, equal=equal)
    assert solution.kl_budget == kl
    assert solution.kkt_residual <= 1e-9
    assert solution.predicted_kl == pytest.approx(kl, rel=1e-10)
    # Clarabel's own accuracy: it stops at a relative gap of 1e-8.
    assert solution.dual_value == pytest.approx(answer.value, abs=1e-7)
    assert solution.primal_value == pytest.approx(solution.predicted_reward, abs=1e-12)
    assert solution.beta == pytest.approx(answer.beta, rel=1e-5)
    np.testing.assert_allclose(solution.multipliers, answer.lam_m, atol=1e-4)


def test_two_responses_in_closed_form() -> None:
    # One prompt of rewards 0 and 1, no constraint: the weight w of the better one has w log 2w + (1 - w) log 2(1 - w)
    # nats, and beta = 1 / log(w / (1 - w)).
    weight = 0.7
    kl = weight * np.log(2 * weight) + (1 - weight) * np.log(2 * (1 - weight))
    problem = DualProblem.from_arrays([[0.0, 1.0]], np.zeros((1, 2, 0)), thresholds=[], beta=1.0)
    solution = solve_dual(problem.with_kl_budget(kl))
    assert solution.beta == pytest.approx(1.0 / np.log(weight / (1 - weight)), rel=1e-9)
    assert solution.predicted_reward == pytest.approx(weight, rel=1e-9)


def test_gaussian_reward_in_closed_form() -> None:
    # A Gaussian reward of standard deviation 1 is moved by 1 / beta, at 1 / (2 beta**2) nats.
    from scipy.special import ndtri

    quantiles_k = ndtri((np.arange(20_000) + 0.5) / 20_000)[np.newaxis]
    problem = DualProblem.from_arrays(quantiles_k, np.zeros((1, 20_000, 0)), thresholds=[], beta=1.0)
    solution = solve_dual(problem.with_kl_budget(0.5))
    assert solution.beta == pytest.approx(1.0, rel=2e-3)
    assert solution.predicted_reward == pytest.approx(1.0, rel=2e-3)


def test_the_beta_that_is_found_is_that_of_an_ordinary_problem() -> None:
    problem = budget_problem([0.3, 0.2], kl=0.4)
    found = solve_dual(problem)
    plain = solve_dual(problem.with_kl_budget(None).with_beta(found.beta))
    np.testing.assert_allclose(found.multipliers, plain.multipliers, rtol=1e-8)
    assert plain.predicted_kl == pytest.approx(0.4, rel=1e-8)
    assert plain.kl_budget is None


def test_neither_start_matters() -> None:
    problem = budget_problem([0.3, 0.2], kl=0.4)
    found = solve_dual(problem)
    again = solve_dual(problem.with_beta(40.0), initial_multipliers=[3.0, 0.0])
    assert again.beta == pytest.approx(found.beta, rel=1e-9)
    np.testing.assert_allclose(again.multipliers, found.multipliers, rtol=1e-8)


def test_units_do_not_matter() -> None:
    r_pk, g_pkm = draw_scores(n_constraints=1, **SHAPE)
    threshold = g_pkm.mean() + 0.3
    plain = solve_dual(DualProblem.from_arrays(r_pk, g_pkm, thresholds=threshold, beta=1.0).with_kl_budget(0.3))
    scaled = solve_dual(
        DualProblem.from_arrays(1e6 * r_pk, 1e-3 * g_pkm, thresholds=1e-3 * threshold, beta=1.0).with_kl_budget(0.3)
    )
    assert scaled.beta == pytest.approx(1e6 * plain.beta, rel=1e-8)
    np.testing.assert_allclose(scaled.multipliers, 1e9 * plain.multipliers, rtol=1e-8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), betas=st.tuples(st.floats(0.1, 5.0), st.floats(0.1, 5.0)), weight=st.floats(0, 1))
def test_the_dual_is_jointly_convex_in_beta_and_lam(seed: int, betas: tuple[float, float], weight: float) -> None:
    problem = budget_problem([0.3, 0.2], kl=0.4, seed=seed)
    lams = 2.0 * np.random.default_rng(seed).random((2, 2))

    def value(beta: float, lam_m: np.ndarray) -> float:
        return evaluate_dual(problem.with_beta(beta), lam_m).value + beta * 0.4

    ends = [value(beta, lam_m) for beta, lam_m in zip(betas, lams, strict=True)]
    between = value(weight * betas[0] + (1 - weight) * betas[1], weight * lams[0] + (1 - weight) * lams[1])
    assert between <= weight * ends[0] + (1 - weight) * ends[1] + 1e-12
    assert solve_dual(problem).dual_value <= between + 1e-10


def test_the_certificate_judges_beta_too() -> None:
    problem = budget_problem([0.3], kl=0.3)
    solution = solve_dual(problem)
    right = certify(problem.with_beta(solution.beta), solution.multipliers)
    assert right.is_valid
    assert right.duality_gap == pytest.approx(0.0, abs=1e-9)
    # Multipliers that are optimal for another beta.
    other = solve_dual(problem.with_kl_budget(None).with_beta(1.01 * solution.beta))
    wrong = certify(problem.with_beta(other.beta), other.multipliers)
    assert not wrong.is_valid
    assert wrong.kkt_residual == pytest.approx(abs(wrong.kl - 0.3) / 0.3, rel=1e-9)
    assert certify(problem.with_kl_budget(None).with_beta(other.beta), other.multipliers).is_valid


def test_a_budget_the_constraints_exceed_is_refused_with_what_they_take() -> None:
    # Two responses of scores 1 and -1: a mean of m takes the KL of (1 + m) / 2, the reward 0 for both all but nothing.
    problem = DualProblem.from_arrays([[0.0, 1e-3]], [[1.0, -1.0]], thresholds=0.6, beta=1.0)
    least = 0.8 * np.log(1.6) + 0.2 * np.log(0.4)
    with pytest.raises(KlBudgetError, match=r"too small.* spends 0\.192745 nats") as caught:
        solve_dual(problem.with_kl_budget(0.1))
    assert caught.value.attainable_kl == pytest.approx(least, rel=1e-6)


def test_a_budget_beyond_the_best_policy_is_refused_with_what_that_spends() -> None:
    # Three responses in four are as good as can be: log(4 / 3) nats reach them all.
    problem = DualProblem.from_arrays([[1.0, 1.0, 1.0, 0.0]], np.zeros((1, 4, 0)), thresholds=[], beta=1.0)
    assert solve_dual(problem.with_kl_budget(0.28)).predicted_kl == pytest.approx(0.28)
    with pytest.raises(KlBudgetError, match=r"does not bind.* spends 0\.287682 nats") as caught:
        solve_dual(problem.with_kl_budget(0.4))
    assert caught.value.attainable_kl == pytest.approx(np.log(4 / 3), rel=1e-6)


def test_a_reward_that_is_the_same_for_all_leaves_beta_open() -> None:
    problem = DualProblem.from_arrays([[0.0, 0.0]], [[1.0, -1.0]], thresholds=0.6, beta=1.0)
    with pytest.raises(KlBudgetError, match=r"leaves beta open.* 0\.192745 nats"):
        solve_dual(problem.with_kl_budget(0.2))


def test_thresholds_out_of_reach_are_so_at_any_budget() -> None:
    with pytest.raises(InfeasibleError, match="cannot be met"):
        solve_dual(budget_problem([5.0], kl=0.3))


@pytest.mark.parametrize("kl", [0.0, -1.0, np.nan, np.inf, "much"])
def test_a_budget_is_a_positive_number(kl: object) -> None:
    with pytest.raises(InputError, match=r"`kl` is .* positive, finite number of nats"):
        budget_problem([0.3], kl=kl)  # type: ignore[arg-type]


def test_a_budget_the_samples_cannot_show_is_refused_with_the_number() -> None:
    largest = LARGEST_KL_SHARE * np.log(12)
    assert budget_problem([0.3], kl=0.999 * largest).kl_budget == pytest.approx(largest, rel=1e-2)
    with pytest.raises(InputError, match=r"12 responses a prompt can show at most 0\.87.*at least 22 responses"):
        budget_problem([0.3], kl=1.08)
    # Beyond what anybody draws, and beyond what a float holds.
    for kl in (30.0, 1000.0):
        with pytest.raises(InputError, match=r"Lower it$"):
            budget_problem([0.3], kl=kl)
