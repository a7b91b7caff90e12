from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_oracles import cvxpy_dual, cvxpy_primal
from helpers.dual_problems import GaussianPopulation, draw_scores, problem_at_depth, problem_inside, two_responses
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stage1_dual.dual import (
    AttainableMeans,
    DualProblem,
    DualSolution,
    InfeasibleError,
    certify,
    evaluate_dual,
    solve_dual,
    threshold_at_multipliers,
)
from stage1_dual.dual import solver as solver_module

EXACT = 1e-10  # exact symmetries of the mathematics; measured at most 1e-12


def assert_certified(problem: DualProblem, solution: DualSolution) -> None:
    assert np.all(solution.multipliers >= 0)
    # The target after the Newton polish; a certificate alone asks 1e-8.
    assert solution.kkt_residual <= 1e-10
    scale = max(problem.beta, problem.reward_scale, float(solution.multipliers @ problem.score_scale_m))
    assert abs(solution.duality_gap) <= 1e-9 * scale
    assert np.all((solution.ess_p >= 1) & (solution.ess_p <= problem.samples.counts_p))
    assert solution.predicted_kl >= 0


@pytest.mark.parametrize("rho", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("a", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_closed_form_of_two_responses(rho: float, a: float, beta: float) -> None:
    solution = solve_dual(two_responses(rho=rho, a=a, beta=beta))
    assert solution.multipliers[0] == pytest.approx(rho / (2 * a), rel=1e-10)
    # At lam* both responses weigh a half: no KL, reward rho / 2.
    assert solution.predicted_reward == pytest.approx(rho / 2, rel=1e-9)
    assert solution.predicted_kl == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("oracle", [cvxpy_dual, cvxpy_primal])
@pytest.mark.parametrize(
    ("n_constraints", "depth", "beta"),
    [(1, 0.4, 1.0), (1, 0.4, 0.3), (1, -0.5, 1.0), (1, 0.8, 2.0), (2, 0.3, 1.0), (3, 0.5, 1.0), (3, 0.5, 0.4)],
)
def test_agrees_with_cvxpy(oracle, n_constraints: int, depth: float, beta: float) -> None:  # type: ignore[no-untyped-def]
    r_pk, g_pkm = draw_scores(n_prompts=20, n_responses=12, n_constraints=n_constraints, seed=3)
    problem = problem_at_depth(r_pk, g_pkm, depth=depth, beta=beta)
    solution = solve_dual(problem)
    answer = oracle(r_pk, g_pkm, b_m=problem.thresholds_m, beta=beta)
    assert_certified(problem, solution)
    assert solution.dual_value == pytest.approx(answer.value, abs=1e-8)
    np.testing.assert_allclose(solution.multipliers, answer.lam_m, atol=1e-5)


def test_one_active_and_one_inactive_constraint_against_cvxpy() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=25, n_responses=10, n_constraints=2, seed=8)
    b_m = g_pkm.mean(axis=(0, 1)) + np.array([0.5, -2.0])
    solution = solve_dual(DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=1.0))
    answer = cvxpy_dual(r_pk, g_pkm, b_m=b_m, beta=1.0)
    np.testing.assert_allclose(solution.multipliers, answer.lam_m, atol=1e-5)
    assert solution.multipliers[0] > 0.1
    assert solution.multipliers[1] == 0.0
    assert solution.slack[1] > 1.0


CONDITIONS = st.fixed_dictionaries(
    {
        "n_prompts": st.integers(1, 12),
        "n_responses": st.integers(2, 9),
        "n_constraints": st.integers(1, 4),
        "seed": st.integers(0, 10_000),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=CONDITIONS, inside=st.floats(0.01, 1.0), beta=st.floats(0.05, 20.0))
def test_strong_duality_and_certificate_everywhere(shape: dict[str, int], inside: float, beta: float) -> None:
    problem = problem_inside(*draw_scores(**shape), inside=inside, beta=beta, seed=shape["seed"])
    solution = solve_dual(problem)
    assert_certified(problem, solution)
    assert np.all(solution.slack >= -1e-9 * problem.score_scale_m)
    assert solution.primal_value == pytest.approx(
        solution.predicted_reward - beta * solution.predicted_kl, abs=1e-9 * max(1.0, beta)
    )
    # The minimum really is one: nothing on a random feasible ray is lower.
    rng = np.random.default_rng(shape["seed"])
    for _ in range(3):
        other = np.maximum(solution.multipliers + 0.1 * rng.normal(size=shape["n_constraints"]), 0.0)
        assert evaluate_dual(problem, other).value >= solution.dual_value - 1e-12 * max(1.0, beta)


REGRESSIONS = [
    # Fewer responses than constraints, ties and constants at low beta: singular Hessians and collapsed weights.
    ({"n_prompts": 1, "n_responses": 2, "n_constraints": 7, "seed": 911466410}, 0.551, 0.0375, "plain"),
    ({"n_prompts": 2, "n_responses": 2, "n_constraints": 6, "seed": 605269912}, 0.101, 0.00789, "binary"),
    ({"n_prompts": 2, "n_responses": 2, "n_constraints": 9, "seed": 826941628}, 0.00196, 0.00279, "rounded"),
    ({"n_prompts": 2, "n_responses": 3, "n_constraints": 9, "seed": 558129967}, 0.00209, 0.00492, "binary"),
]

RESHAPE = {
    "plain": lambda g: g,
    "rounded": np.round,
    "skewed": lambda g: np.exp(2 * g),
    "binary": lambda g: (g > 0.5).astype(float),
}


def _assert_odd_scores_certified(shape: dict[str, int], inside: float, beta: float, kind: str) -> None:
    r_pk, g_pkm = draw_scores(**shape)
    problem = problem_inside(r_pk, RESHAPE[kind](g_pkm), inside=inside, beta=beta, seed=shape["seed"])
    with np.errstate(all="raise"):
        assert_certified(problem, solve_dual(problem))


@pytest.mark.parametrize(("shape", "inside", "beta", "kind"), REGRESSIONS)
def test_odd_scores_that_once_failed(shape: dict[str, int], inside: float, beta: float, kind: str) -> None:
    _assert_odd_scores_certified(shape, inside, beta, kind)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=CONDITIONS, inside=st.floats(1e-3, 1.0), log_beta=st.floats(-3.0, 3.0), kind=st.sampled_from(sorted(RESHAPE))
)
def test_odd_scores_are_certified_at_every_beta(
    shape: dict[str, int], inside: float, log_beta: float, kind: str
) -> None:
    _assert_odd_scores_certified(shape, inside, 10**log_beta, kind)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=CONDITIONS, inside=st.floats(0.05, 1.0), scale=st.floats(0.01, 100.0))
def test_symmetries(shape: dict[str, int], inside: float, scale: float) -> None:
    r_pk, g_pkm = draw_scores(**shape)
    problem = problem_inside(r_pk, g_pkm, inside=inside, beta=1.0, seed=shape["seed"])
    b_m = problem.thresholds_m
    solution = solve_dual(problem)
    # Fewer responses than constraints can leave lam* not unique: then there is no one vector to compare.
    assume(not solution.dependent_constraints)
    lam_m = solution.multipliers
    rng = np.random.default_rng(shape["seed"])
    order = rng.permutation(shape["n_responses"])
    shift_p = rng.normal(size=(shape["n_prompts"], 1))
    size = max(1.0, float(lam_m.max()))

    def check(expected: np.ndarray, r: np.ndarray, g: np.ndarray, b: np.ndarray, beta: float) -> None:
        found = solve_dual(DualProblem.from_arrays(r, g, thresholds=b, beta=beta)).multipliers
        # Relative to the size of the multipliers: near the largest margin they are less well determined.
        np.testing.assert_allclose(
            found / np.max(expected, initial=size), expected / np.max(expected, initial=size), atol=1e-8
        )

    check(lam_m, r_pk + shift_p, g_pkm, b_m, 1.0)
    check(lam_m * scale, r_pk * scale, g_pkm, b_m, scale)
    check(lam_m / scale, r_pk, g_pkm * scale, b_m * scale, 1.0)
    check(lam_m, r_pk, g_pkm + 3.0, b_m + 3.0, 1.0)
    check(lam_m, r_pk[:, order], g_pkm[:, order], b_m, 1.0)
    check(lam_m, np.tile(r_pk, 2), np.tile(g_pkm, (1, 2, 1)), b_m, 1.0)
    check(lam_m, np.repeat(r_pk, 2, axis=0), np.repeat(g_pkm, 2, axis=0), b_m, 1.0)


def test_symmetries_to_rounding_on_ordinary_data() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=100, n_responses=32, n_constraints=2, seed=5)
    problem = problem_at_depth(r_pk, g_pkm, depth=0.4, beta=1.0)
    b_m, solution = problem.thresholds_m, solve_dual(problem)
    shift_p = np.random.default_rng(0).normal(size=(100, 1))
    shifted = DualProblem.from_arrays(r_pk + shift_p, g_pkm, thresholds=b_m, beta=1.0)
    np.testing.assert_allclose(solve_dual(shifted).multipliers, solution.multipliers, atol=EXACT)
    np.testing.assert_allclose(
        shifted.tilted_weights(solution.multipliers), problem.tilted_weights(solution.multipliers), atol=EXACT
    )
    tiled = DualProblem.from_arrays(np.tile(r_pk, 3), np.tile(g_pkm, (1, 3, 1)), thresholds=b_m, beta=1.0)
    np.testing.assert_allclose(solve_dual(tiled).multipliers, solution.multipliers, atol=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_one_constraint_multiplier_grows_with_its_threshold(seed: int) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=16, n_constraints=1, seed=seed)
    lams = [
        solve_dual(problem_at_depth(r_pk, g_pkm, depth=depth, beta=1.0)).multipliers[0]
        for depth in np.linspace(-0.9, 0.95, 12)
    ]
    assert np.all(np.diff(lams) >= 0)
    assert lams[0] == 0.0
    assert lams[-1] > 1.0


@pytest.mark.parametrize("n_constraints", [1, 3])
def test_ragged_rows_equal_dense_arrays(n_constraints: int) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=9, n_constraints=n_constraints, seed=2)
    dense = problem_at_depth(r_pk, g_pkm, depth=0.5, beta=0.8)
    order = np.random.default_rng(0).permutation(r_pk.size)
    ids = np.repeat(np.arange(40), 9)[order]
    r_n, g_nm = r_pk.reshape(-1)[order], g_pkm.reshape(-1, n_constraints)[order]
    rows = DualProblem.from_rows(ids, r_n, g_nm, thresholds=dense.thresholds_m, beta=0.8)
    # Repeating every response of some prompts makes the counts differ and changes no expectation.
    again = np.concatenate([np.arange(r_n.size), np.flatnonzero(ids % 3 == 0)])
    ragged = DualProblem.from_rows(ids[again], r_n[again], g_nm[again], thresholds=dense.thresholds_m, beta=0.8)
    assert len(set(ragged.samples.counts_p)) > 1
    expected = solve_dual(dense)
    for problem in (rows, ragged):
        found = solve_dual(problem)
        np.testing.assert_allclose(found.multipliers, expected.multipliers, atol=EXACT)
        assert found.dual_value == pytest.approx(expected.dual_value, abs=EXACT)
        assert found.predicted_kl == pytest.approx(expected.predicted_kl, abs=EXACT)
    weights_pk = dense.tilted_weights(expected.multipliers)
    np.testing.assert_allclose(rows.tilted_weights(expected.multipliers), weights_pk.reshape(-1)[order], atol=EXACT)


@pytest.mark.parametrize("n_constraints", [1, 3, 10])
@pytest.mark.parametrize("beta", [1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("depth", [-0.3, 0.3, 0.9])
def test_every_beta_is_certified_and_ordinary_ones_are_quick(n_constraints: int, beta: float, depth: float) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=150, n_responses=24, n_constraints=n_constraints, seed=1)
    problem = problem_at_depth(r_pk, g_pkm, depth=depth, beta=beta)
    solution = solve_dual(problem)
    assert_certified(problem, solution)
    assert solution.n_evaluations <= (12 if beta >= 0.1 else 60)


def test_evaluations_are_counted_honestly(monkeypatch: pytest.MonkeyPatch) -> None:
    from stage1_dual.dual import solver

    calls = 0

    def counting(problem: DualProblem, lam_m: np.ndarray):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return evaluate_dual(problem, lam_m)

    monkeypatch.setattr(solver, "evaluate_dual", counting)
    r_pk, g_pkm = draw_scores(n_prompts=20, n_responses=8, n_constraints=2, seed=0)
    problem = problem_at_depth(r_pk, g_pkm, depth=0.6, beta=0.01)
    assert solve_dual(problem).n_evaluations == calls
    calls = 0
    assert solve_dual(problem, initial_multipliers=[50.0, 0.0]).n_evaluations == calls


@pytest.mark.parametrize("start", [[0.0, 0.0], [0.3, 0.3], [40.0, 0.0], [1e4, 1e4]])
def test_the_start_does_not_matter(start: list[float]) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=16, n_constraints=2, seed=6)
    problem = problem_at_depth(r_pk, g_pkm, depth=0.5, beta=1.0)
    solution = solve_dual(problem)
    warm = solve_dual(problem, initial_multipliers=start)
    np.testing.assert_allclose(warm.multipliers, solution.multipliers, atol=EXACT)
    at_answer = solve_dual(problem, initial_multipliers=solution.multipliers)
    assert at_answer.n_evaluations <= 2


@pytest.mark.parametrize("offset", [1e6, -1e6])
@pytest.mark.parametrize("by_prompt", [False, True])
def test_large_offsets_cost_no_accuracy(offset: float, by_prompt: bool) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=20, n_constraints=2, seed=7)
    # Multiples of 2**-30 keep every sum below exact, so that the two problems are the same to the last bit.
    r_pk, g_pkm = np.round(r_pk * 2**30) / 2**30, np.round(g_pkm * 2**30) / 2**30
    b_m = np.round(problem_at_depth(r_pk, g_pkm, depth=0.5, beta=1.0).thresholds_m * 2**30) / 2**30
    expected = solve_dual(DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=1.0))
    r_offset = offset * (np.arange(60.0)[:, np.newaxis] if by_prompt else 1.0)
    moved = DualProblem.from_arrays(r_pk + r_offset, g_pkm + offset, thresholds=b_m + offset, beta=1.0)
    solution = solve_dual(moved)
    np.testing.assert_allclose(solution.multipliers, expected.multipliers, atol=1e-9)
    assert solution.duality_gap == pytest.approx(expected.duality_gap, abs=1e-13)
    assert abs(solution.duality_gap) <= 1e-11
    np.testing.assert_allclose(solution.slack, expected.slack, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e8, 1e150])
def test_units_do_not_matter(scale: float) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=12, n_constraints=2, seed=9)
    problem = problem_at_depth(r_pk, g_pkm, depth=0.5, beta=1.0)
    expected = solve_dual(problem).multipliers
    scores = DualProblem.from_arrays(r_pk, g_pkm * scale, thresholds=problem.thresholds_m * scale, beta=1.0)
    np.testing.assert_allclose(solve_dual(scores).multipliers * scale, expected, rtol=1e-9, atol=1e-12)
    both = DualProblem.from_arrays(r_pk * scale, g_pkm, thresholds=problem.thresholds_m, beta=scale)
    np.testing.assert_allclose(solve_dual(both).multipliers / scale, expected, rtol=1e-9, atol=1e-12)


class TestDegenerate:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=10, n_constraints=2, seed=11)

    def test_all_equal_rewards(self) -> None:
        problem = DualProblem.from_arrays(np.full((30, 10), 7.0), self.g_pkm, thresholds=[0.5, 0.5], beta=1e-3)
        assert_certified(problem, solve_dual(problem))

    def test_single_response_prompts_move_nothing_but_count(self) -> None:
        ids = np.concatenate([np.repeat(np.arange(30), 10), np.arange(30, 50)])
        r_n = np.concatenate([self.r_pk.reshape(-1), np.full(20, 3.0)])
        g_n = np.concatenate([self.g_pkm[..., 0].reshape(-1), np.full(20, -1.0)])
        problem = DualProblem.from_rows(ids, r_n, g_n, thresholds=0.0, beta=1.0)
        solution = solve_dual(problem)
        assert_certified(problem, solution)
        np.testing.assert_array_equal(solution.ess_p[30:], 1.0)
        # mean over 50 prompts is 0, 20 of them are at -1: the other 30 must reach 2/3.
        alone = DualProblem.from_arrays(self.r_pk, self.g_pkm[..., 0], thresholds=2 / 3, beta=1.0)
        np.testing.assert_allclose(solution.multipliers, solve_dual(alone).multipliers, rtol=1e-9)

    def test_only_single_responses(self) -> None:
        solution = solve_dual(DualProblem.from_rows([0, 1], [1.0, 2.0], [1.0, 2.0], thresholds=1.5, beta=1.0))
        assert solution.multipliers[0] == 0.0
        assert solution.dual_value == 1.5
        with pytest.raises(InfeasibleError):
            solve_dual(DualProblem.from_rows([0, 1], [1.0, 2.0], [1.0, 2.0], thresholds=1.51, beta=1.0))

    @pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3.3])
    def test_constant_constraint_met_or_on_its_threshold_gets_zero(self, value: float) -> None:
        g_pkm = self.g_pkm.copy()
        g_pkm[..., 1] = value
        for b in (value - 1.0, value):
            problem = DualProblem.from_arrays(self.r_pk, g_pkm, thresholds=[0.4, b], beta=1.0)
            solution = solve_dual(problem)
            assert_certified(problem, solution)
            assert solution.multipliers[1] == 0.0
            assert solution.dependent_constraints == ()
            alone = DualProblem.from_arrays(self.r_pk, g_pkm[..., 0], thresholds=0.4, beta=1.0)
            np.testing.assert_allclose(solution.multipliers[:1], solve_dual(alone).multipliers, atol=EXACT)

    def test_duplicated_constraints_are_named_and_share_one_multiplier(self) -> None:
        g_pkm = np.stack([self.g_pkm[..., 0], 2 * self.g_pkm[..., 0], self.g_pkm[..., 1]], axis=2)
        problem = DualProblem.from_arrays(
            self.r_pk, g_pkm, thresholds=[0.4, 0.8, 0.3], beta=1.0, constraint_names=["kind", "kinder", "safe"]
        )
        solution = solve_dual(problem)
        assert_certified(problem, solution)
        assert solution.dependent_constraints == ("kind", "kinder")
        unique = DualProblem.from_arrays(self.r_pk, self.g_pkm, thresholds=[0.4, 0.3], beta=1.0)
        expected = solve_dual(unique)
        assert expected.dependent_constraints == ()
        combined = solution.multipliers[0] + 2 * solution.multipliers[1]
        assert combined == pytest.approx(expected.multipliers[0], abs=1e-8)
        assert solution.dual_value == pytest.approx(expected.dual_value, abs=EXACT)

    def test_two_sided_constraints_pin_a_mean(self) -> None:
        g_pk = self.g_pkm[..., 0]
        pinned = DualProblem.from_arrays(self.r_pk, np.stack([g_pk, -g_pk], axis=2), thresholds=[0.3, -0.3], beta=1.0)
        solution = solve_dual(pinned)
        assert_certified(pinned, solution)
        assert solution.predicted_constraints[0] == pytest.approx(0.3, abs=1e-9)
        assert solution.dependent_constraints == ("constraint_0", "constraint_1")

    @pytest.mark.parametrize("margin", [-1e-12, 0.0, 1e-12])
    def test_thresholds_around_activity(self, margin: float) -> None:
        loose = DualProblem.from_arrays(self.r_pk, self.g_pkm, thresholds=[0.0, 0.0], beta=1.0)
        at_zero = threshold_at_multipliers(loose, [0.0, 0.0])
        problem = loose.with_thresholds(at_zero + margin)
        solution = solve_dual(problem)
        assert_certified(problem, solution)
        assert np.all(solution.multipliers <= 1e-10)

    def test_close_below_the_largest_attainable(self) -> None:
        best = self.g_pkm[..., 0].max(axis=1).mean()
        for distance in (1e-3, 1e-6, 1e-9):
            problem = DualProblem.from_arrays(self.r_pk, self.g_pkm[..., 0], thresholds=best - distance, beta=1.0)
            solution = solve_dual(problem)
            assert_certified(problem, solution)
            # slack is tiny against s here whatever lam is, so look at what was asked itself.
            assert solution.slack[0] == pytest.approx(0.0, abs=1e-3 * distance + 1e-14)

    def test_no_constraints(self) -> None:
        problem = DualProblem.from_arrays(self.r_pk, np.empty((30, 10, 0)), thresholds=np.empty(0), beta=1.0)
        solution = solve_dual(problem)
        assert solution.multipliers.shape == (0,)
        expected = np.mean(np.log(np.mean(np.exp(self.r_pk), axis=1)))
        assert solution.dual_value == pytest.approx(expected, abs=1e-13)


def test_numpy_error_settings_of_the_caller_do_not_matter() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=20, n_responses=8, n_constraints=2, seed=1)
    with np.errstate(all="raise"):
        for beta in (1e-3, 1.0, 1e3):
            problem = problem_at_depth(1e3 * r_pk, g_pkm, depth=0.5, beta=beta)
            assert_certified(problem, solve_dual(problem))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=CONDITIONS, inside=st.floats(-0.3, 1.0), beta=st.floats(0.02, 5.0))
def test_a_proof_of_feasibility_is_never_wrong(shape: dict[str, int], inside: float, beta: float) -> None:
    problem = problem_inside(*draw_scores(**shape), inside=inside, beta=beta, seed=shape["seed"])
    minimum = solver_module.continue_minimum(problem, np.zeros(problem.n_constraints))
    if solver_module.proves_feasibility(problem, certify(problem, minimum.lam_m)):
        assert AttainableMeans(problem).judge(problem).status == "feasible"


def test_an_ordinary_solution_proves_feasibility_without_a_linear_program(monkeypatch: pytest.MonkeyPatch) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=200, n_responses=64, n_constraints=3, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=g_pkm.mean(axis=(0, 1)) + 0.4, beta=0.5)
    monkeypatch.setattr(solver_module, "AttainableMeans", None)
    assert_certified(problem, solve_dual(problem))


@pytest.mark.parametrize("n_constraints", [1, 3])
def test_a_last_step_that_leads_astray_is_followed_up(n_constraints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=16, n_constraints=n_constraints, seed=2)
    problem = problem_at_depth(r_pk, g_pkm, depth=0.6, beta=0.5)
    expected = solve_dual(problem)
    # Every step is now foreseen to be the last.
    monkeypatch.setattr(solver_module, "_CAUTION", 0.0)
    hasty = solver_module.continue_minimum(problem, np.zeros(n_constraints))
    assert hasty.is_converged
    assert certify(problem, hasty.lam_m).kkt_residual > 1e-3
    solution = solve_dual(problem)
    assert solution.multipliers == pytest.approx(expected.multipliers, rel=1e-7)
    assert solution.n_evaluations > hasty.n_evaluations


@pytest.mark.parametrize("n_constraints", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_joint_gaussian_scores_need_two_evaluations(n_constraints: int, beta: float) -> None:
    # Their expansion is exact but for the finite number of responses.
    r_pk, g_pkm = draw_scores(n_prompts=400, n_responses=128, n_constraints=n_constraints, seed=6)
    scale_m = np.sqrt(np.mean(np.var(g_pkm, axis=1), axis=0))
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm, axis=(0, 1)) + 0.3 * scale_m, beta=beta)
    assert solve_dual(problem).n_evaluations <= 2


def test_the_start_is_no_further_than_the_expansion_reaches() -> None:
    # One response in 64 has the score: nearly all weight on it is 7.8 standard deviations, exp of which is no tilt.
    g_pk = np.tile(np.arange(64) == 63, (50, 1)).astype(np.float64)
    r_pk = np.random.default_rng(9).normal(size=g_pk.shape)
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=0.98, beta=1.0)
    dual = solver_module._ScaledDual(problem)
    assert 2.0 < dual.to_mu(dual.expansion_minimum())[0] <= 3.0


@pytest.mark.parametrize("n_responses", [16, 64, 256])
@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.98])
@pytest.mark.parametrize("beta", [0.3, 3.0])
def test_scores_that_few_responses_have(n_responses: int, threshold: float, beta: float) -> None:
    # The tilted mean is a cliff between two plateaus: a line search that trusts slopes crawls along them.
    g_pk = np.tile(np.arange(n_responses) == 0, (50, 1)).astype(np.float64)
    r_pk = np.random.default_rng(9).normal(size=g_pk.shape)
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=threshold, beta=beta)
    solution = solve_dual(problem)
    assert_certified(problem, solution)
    assert solution.n_evaluations <= 15


def test_a_multiplier_of_zero_has_no_sign() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=16, n_constraints=2, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm, axis=(0, 1)) - 5.0, beta=1.0)
    solution = solve_dual(problem)
    np.testing.assert_array_equal(solution.multipliers, 0.0)
    assert not np.signbit(solution.multipliers).any()


@pytest.mark.parametrize("margin", [-1e300, -50.0, 0.0, 2.5])
def test_the_start_is_sane_where_the_expansion_is_not(margin: float) -> None:
    # Exponential tails: two moments say little about 2.5 standard deviations.
    rng = np.random.default_rng(8)
    r_pk, g_pk = rng.exponential(size=(2, 200, 64))
    g_pk -= 0.9 * r_pk
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=np.mean(g_pk) + margin * np.std(g_pk), beta=1.0)
    solution = solve_dual(problem)
    assert_certified(problem, solution)
    assert solution.n_evaluations <= 12


@pytest.mark.parametrize("beta", [0.02, 1.0])
@pytest.mark.parametrize("is_typical", [True, False])
def test_a_start_from_a_few_prompts_changes_nothing(
    beta: float, is_typical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=1_000, n_responses=350, n_constraints=2, seed=1)
    if not is_typical:
        # The prompts that come first want the opposite, and three times as much.
        g_pkm[:200] *= -3.0
    problem = problem_at_depth(r_pk, g_pkm, depth=0.4, beta=beta)
    started = solve_dual(problem)
    monkeypatch.setattr(solver_module, "_SKETCH_VALUES", 10**9)
    plain = solve_dual(problem)
    assert_certified(problem, started)
    np.testing.assert_allclose(started.multipliers, plain.multipliers, atol=1e-9)
    if is_typical:
        assert started.n_evaluations <= plain.n_evaluations - (beta < 0.1)


def test_rounding_of_a_collapsed_variance_does_not_lead_uphill() -> None:
    # As found with two dependent constraints: singular, and by rounding indefinite. Steps went round in a circle.
    mu, gradient = np.array([0.0, 10.0]), np.array([2.73515192, 0.2681174])
    hessian = np.array(
        [[1.903630120341598e-07, -1.9036301224007657e-07], [-1.9036301224007657e-07, 1.9036301228714728e-07]]
    )
    step = solver_module.newton_step(mu, gradient, hessian, np.zeros(len(mu), dtype=bool))
    assert np.all(mu + step >= 0)
    assert gradient @ step < 0


@pytest.mark.parametrize("oracle", [cvxpy_dual, cvxpy_primal])
@pytest.mark.parametrize(
    ("margins", "equal"), [([0.3], (0,)), ([-0.6], (0,)), ([0.3, -0.2], (0,)), ([0.2, 0.1, -0.4], (0, 2))]
)
def test_equalities_agree_with_cvxpy(oracle, margins: list[float], equal: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    r_pk, g_pkm = draw_scores(n_prompts=20, n_responses=12, n_constraints=len(margins), seed=3)
    b_m = g_pkm.mean(axis=(0, 1)) + margins
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=0.7)
    solution = solve_dual(problem.with_equalities(np.isin(np.arange(len(margins)), equal)))
    answer = oracle(r_pk, g_pkm, b_m=b_m, beta=0.7, equal=equal)
    assert solution.kkt_residual <= 1e-10
    assert solution.dual_value == pytest.approx(answer.value, abs=1e-8)
    np.testing.assert_allclose(solution.multipliers, answer.lam_m, atol=1e-5)
    np.testing.assert_allclose(solution.slack[list(equal)], 0.0, atol=1e-9)


def test_an_equality_of_two_responses_has_a_multiplier_of_either_sign() -> None:
    # Scores (1, -1), rewards (0, 1): a mean of m needs 2 lam - 1 = beta log((1 + m) / (1 - m)).
    for mean in (-0.8, -0.4621171572600098, 0.0, 0.7):
        problem = DualProblem.from_arrays([[0.0, 1.0]], [[1.0, -1.0]], thresholds=mean, beta=1.0)
        solution = solve_dual(problem.with_equalities([True]))
        assert solution.multipliers[0] == pytest.approx(0.5 + 0.5 * np.log((1 + mean) / (1 - mean)), abs=1e-9)
        bound = solve_dual(problem).multipliers[0]
        assert bound == pytest.approx(max(solution.multipliers[0], 0.0), abs=1e-9)


def test_a_gaussian_equality_has_the_multiplier_in_closed_form() -> None:
    # lam = margin beta - Cov(r, g), here below 0: what a bound would leave alone, an equality pulls down.
    population = GaussianPopulation(correlation=0.5, margin=0.2)
    r_pk, g_pk = population.draw(np.random.default_rng(0), n_prompts=400, n_responses=400)
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + 0.2, beta=1.0).with_equalities([True])
    assert solve_dual(problem).multipliers[0] == pytest.approx(0.2 - 0.5, abs=0.02)


def test_an_equality_that_a_bound_would_meet_with_equality_changes_nothing() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=16, n_constraints=2, seed=6)
    problem = problem_at_depth(r_pk, g_pkm, depth=0.4, beta=0.5)
    bounds = solve_dual(problem)
    assert np.all(bounds.multipliers > 0)
    np.testing.assert_allclose(
        solve_dual(problem.with_equalities([True, True])).multipliers, bounds.multipliers, rtol=1e-9
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=CONDITIONS, log_beta=st.floats(-2.0, 1.0), kind=st.sampled_from(sorted(RESHAPE)), pattern=st.integers(1, 15)
)
def test_equalities_are_certified_wherever_a_policy_attains_them(
    shape: dict[str, int], log_beta: float, kind: str, pattern: int
) -> None:
    r_pk, g_pkm = draw_scores(**shape)
    # Means that a random policy attains, which gives every response weight.
    inside = problem_inside(r_pk, RESHAPE[kind](g_pkm), inside=0.0, beta=10**log_beta, seed=shape["seed"])
    is_equality_m = np.array([bool(pattern >> j & 1) for j in range(shape["n_constraints"])])
    problem = inside.with_equalities(is_equality_m)
    problem = problem.with_thresholds(inside.thresholds_m - np.where(is_equality_m, 0.0, 0.05) * inside.score_scale_m)
    with np.errstate(all="raise"):
        solution = solve_dual(problem)
    assert solution.kkt_residual <= 1e-8
    assert np.all((solution.multipliers >= 0) | is_equality_m)
    # More is asked than of bounds: the optimum is no better, and one of its multipliers may show why.
    assert solution.dual_value <= solve_dual(problem.with_equalities(~is_equality_m & False)).dual_value + 1e-8 * max(
        problem.beta, problem.reward_scale
    )


def test_a_step_with_free_multipliers_minimises_the_model() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        root = rng.normal(size=(4, 4))
        hessian, gradient, mu = root @ root.T + 0.1 * np.eye(4), 3 * rng.normal(size=4), np.array([0.5, 0.0, 0.0, 1.0])
        is_free = rng.random(4) < 0.5
        step = solver_module.newton_step(mu, gradient, hessian, is_free)
        slope = gradient + hessian @ step
        # The conditions of the model's minimum: no slope where free, complementarity elsewhere.
        np.testing.assert_allclose(np.where(is_free, slope, np.minimum(mu + step, slope)), 0.0, atol=1e-8)


def test_categories_are_solved_as_if_each_were_alone() -> None:
    # The column (g - b_G) 1_G with threshold 0, for each G: lam_G is the multiplier of the category's own problem.
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=12, n_constraints=1, seed=5)
    category_p = np.arange(60) % 3
    b_c = [g_pkm[category_p == c].mean() + margin for c, margin in enumerate((0.2, 0.4, -1.0))]
    columns = np.stack([(g_pkm[..., 0] - b) * (category_p == c)[:, None] for c, b in enumerate(b_c)], axis=-1)
    problem = DualProblem.from_arrays(r_pk, columns, thresholds=np.zeros(3), beta=1.0)
    joint = solve_dual(problem)
    assert_certified(problem, joint)
    np.testing.assert_allclose(joint.hessian - np.diag(np.diag(joint.hessian)), 0.0, atol=1e-15)
    for c, b in enumerate(b_c):
        own = category_p == c
        alone = solve_dual(DualProblem.from_arrays(r_pk[own], g_pkm[own], thresholds=b, beta=1.0))
        assert joint.multipliers[c] == pytest.approx(alone.multipliers[0], abs=1e-9)


def test_a_band_is_two_bounds_of_which_one_binds() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=16, n_constraints=1, seed=6)
    reference = g_pkm.mean()
    both = np.concatenate([g_pkm, -g_pkm], axis=2)
    for low, high, binds in ((0.2, 0.5, 0), (-1.5, -0.8, 1)):
        thresholds = [reference + low, -(reference + high)]
        band = solve_dual(DualProblem.from_arrays(r_pk, both, thresholds=thresholds, beta=1.0))
        alone = DualProblem.from_arrays(r_pk, both[..., binds], thresholds=thresholds[binds], beta=1.0)
        assert band.multipliers[binds] == pytest.approx(solve_dual(alone).multipliers[0], abs=1e-9)
        assert band.multipliers[1 - binds] == 0.0
