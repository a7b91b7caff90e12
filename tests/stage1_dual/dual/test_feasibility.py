from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from stage1_dual.dual import AttainableMeans, DualProblem, InfeasibleError, solve_dual, solve_frontier


def _check_by_hand(error: InfeasibleError, g_pkm: np.ndarray, b_m: np.ndarray) -> None:
    """The certificate's claim, from the raw scores: no reweighting reaches <v, b> on average."""
    v_m = error.certificate.direction
    assert np.all(v_m >= 0)
    assert v_m.sum() == pytest.approx(1.0)
    best_combination = np.mean([max(float(v_m @ (g_m - b_m)) for g_m in g_km) for g_km in g_pkm])
    assert best_combination < 0
    assert error.certificate.support_value == pytest.approx(best_combination, abs=1e-12)
    best_alone = [np.mean([max(g_km[:, j]) for g_km in g_pkm]) for j in range(len(b_m))]
    np.testing.assert_allclose(error.certificate.best_attainable, best_alone, atol=1e-12)


def _full_program(g_pkm: np.ndarray, base_m: np.ndarray, direction_m: np.ndarray) -> float:
    """Largest t with base + t * direction attainable, over the weights of all samples at once."""
    n_prompts, n_responses, n_constraints = g_pkm.shape
    n = n_prompts * n_responses
    result = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-g_pkm.reshape(n, n_constraints).T / n_prompts, direction_m]),
        b_ub=-base_m,
        A_eq=np.column_stack([np.kron(np.eye(n_prompts), np.ones(n_responses)), np.zeros(n_prompts)]),
        b_eq=np.ones(n_prompts),
        bounds=[(0, None)] * n + [(None, None)],
    )
    assert result.status == 0
    return float(result.x[-1])


def test_one_infeasible_constraint_names_what_is_attainable() -> None:
    r_pk = np.zeros((2, 2))
    g_pk = np.array([[0.0, 1.0], [2.0, 4.0]])  # reference mean 1.75, best mean (1 + 4) / 2 = 2.5
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=3.0, beta=1.0, constraint_names=["harmless"])
    with pytest.raises(InfeasibleError) as caught:
        solve_dual(problem)
    message = str(caught.value)
    assert "cannot be met by any policy on these 4 samples" in message
    assert "harmless: threshold 3 asked, best attainable alone 2.5" in message
    assert "reference mean 1.75, margin 1.25 asked, largest 0.75" in message
    certificate = caught.value.certificate
    assert certificate.support_value == pytest.approx(-0.5)
    assert certificate.largest_feasible_scale == pytest.approx(0.75 / 1.25)
    _check_by_hand(caught.value, g_pk[..., np.newaxis], np.array([3.0]))


def test_two_constraints_each_feasible_alone_but_not_together() -> None:
    # One prompt, the responses (1, 0) and (0, 1): both means cannot exceed a half.
    g_pkm = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    problem = DualProblem.from_arrays(
        np.zeros((1, 2)), g_pkm, thresholds=[0.6, 0.7], beta=1.0, constraint_names=["kind", "safe"]
    )
    with pytest.raises(InfeasibleError) as caught:
        solve_dual(problem)
    _check_by_hand(caught.value, g_pkm, np.array([0.6, 0.7]))
    np.testing.assert_allclose(caught.value.certificate.direction, [0.5, 0.5], atol=1e-9)
    assert caught.value.certificate.support_value == pytest.approx(0.5 - 0.65)
    # The reference is (0.5, 0.5) already: no positive part of the margins fits.
    assert caught.value.certificate.largest_feasible_scale is None
    message = str(caught.value)
    assert "cannot be met together" in message
    assert "0.5*kind + 0.5*safe can reach at most 0.5 on average, and the thresholds ask 0.65" in message


SHAPES = st.fixed_dictionaries(
    {
        "n_prompts": st.integers(1, 10),
        "n_responses": st.integers(2, 8),
        "n_constraints": st.integers(1, 5),
        "seed": st.integers(0, 10_000),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=SHAPES, reach=st.floats(0.0, 2.0))
def test_verdict_scale_and_certificate_agree_with_the_full_linear_program(shape: dict[str, int], reach: float) -> None:
    r_pk, g_pkm = draw_scores(**shape)
    reference_m = g_pkm.mean(axis=(0, 1))
    margin_m = reach * np.abs(np.random.default_rng(shape["seed"]).normal(size=shape["n_constraints"]))
    b_m = reference_m + margin_m
    depth = _full_program(g_pkm, b_m, np.ones(shape["n_constraints"]))
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=1.0)
    attainable = AttainableMeans(problem)
    if abs(depth) > 1e-7:
        assert attainable.judge(problem).status == ("feasible" if depth > 0 else "infeasible")
    if depth < -1e-7:
        with pytest.raises(InfeasibleError) as caught:
            solve_dual(problem)
        _check_by_hand(caught.value, g_pkm, b_m)
        scale = caught.value.certificate.largest_feasible_scale
        expected = _full_program(g_pkm, reference_m, margin_m)
        if scale is None:
            assert expected <= 1e-9
        else:
            assert scale == pytest.approx(expected, abs=1e-7)
            assert (
                attainable.judge(problem.with_thresholds(reference_m + 0.999 * scale * margin_m)).status == "feasible"
            )


def test_the_polytope_is_reused_for_other_thresholds() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=10, n_constraints=3, seed=3)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.zeros(3), beta=1.0)
    shared = AttainableMeans(problem)
    rng = np.random.default_rng(0)
    statuses = []
    for _ in range(40):
        other = problem.with_thresholds(g_pkm.mean(axis=(0, 1)) + rng.uniform(-0.5, 2.0, size=3))
        statuses.append(shared.judge(other).status)
        assert statuses[-1] == AttainableMeans(other).judge(other).status
    assert set(statuses) == {"feasible", "infeasible"}


def test_program_stays_small_as_prompts_grow() -> None:
    columns = []
    for n_prompts in (50, 2_000):
        r_pk, g_pkm = draw_scores(n_prompts=n_prompts, n_responses=8, n_constraints=4, seed=1)
        problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=g_pkm.mean(axis=(0, 1)) + 5.0, beta=1.0)
        attainable = AttainableMeans(problem)
        problem = problem.with_thresholds(problem.reference_means_m + 0.9 * problem.score_scale_m)
        attainable.judge(problem)
        attainable.largest_scale(problem)
        columns.append(len(attainable._vertices))
    assert max(columns) <= 60


def test_boundary_of_one_constraint_says_so() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=20, n_responses=6, n_constraints=1, seed=0)
    best = float(np.mean(g_pkm.max(axis=1)))
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=best, beta=1.0)
    with pytest.raises(InfeasibleError, match=r"exactly on the boundary .* no finite multiplier attains") as caught:
        solve_dual(problem)
    assert caught.value.certificate.support_value == pytest.approx(0.0, abs=1e-14)
    assert caught.value.certificate.largest_feasible_scale == pytest.approx(1.0, rel=1e-12)


def test_boundary_of_two_constraints_together_says_so() -> None:
    # Between the vertices (1, 0) and (0, 1) of one prompt with a third response below the edge.
    g_pkm = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    problem = DualProblem.from_arrays(np.zeros((1, 3)), g_pkm, thresholds=[0.25, 0.75], beta=1.0)
    with pytest.raises(InfeasibleError, match="exactly on the boundary"):
        solve_dual(problem)
    inside = solve_dual(problem.with_thresholds([0.25, 0.75 - 1e-3]))
    assert inside.kkt_residual <= 1e-10


def test_boundary_of_one_among_several() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=20, n_responses=6, n_constraints=2, seed=0)
    b_m = np.array([np.mean(g_pkm[..., 0].max(axis=1)), -5.0])
    with pytest.raises(InfeasibleError, match=r"boundary .*\n  constraint_0: threshold"):
        solve_dual(DualProblem.from_arrays(r_pk, g_pkm, thresholds=b_m, beta=1.0))


def test_constant_constraint_below_its_threshold_is_infeasible_and_named() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=5, n_responses=4, n_constraints=2, seed=0)
    g_pkm[..., 1] = 0.25
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[0.0, 0.5], beta=1.0, constraint_names=["kind", "fixed"])
    with pytest.raises(InfeasibleError, match=r"fixed: threshold 0\.5 asked, best attainable alone 0\.25") as caught:
        solve_dual(problem)
    _check_by_hand(caught.value, g_pkm, np.array([0.0, 0.5]))
    assert caught.value.certificate.largest_feasible_scale is None


def test_margins_below_the_reference_are_always_feasible() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=5, n_responses=4, n_constraints=3, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=g_pkm.mean(axis=(0, 1)) - 0.1, beta=1.0)
    assert AttainableMeans(problem).judge(problem).status == "feasible"
    assert AttainableMeans(problem).largest_scale(problem) is None


@pytest.mark.parametrize("start", [None, 20.0, 40.0])
def test_the_boundary_is_seen_from_every_start(start: float | None) -> None:
    """One response in 128 has the score: the multiplier moves it far although its standard deviation is small."""
    rng = np.random.default_rng(0)
    g_pk = np.zeros((200, 128))
    g_pk[np.arange(200), rng.integers(128, size=200)] = 1.0
    problem = DualProblem.from_arrays(rng.normal(size=g_pk.shape), g_pk, thresholds=1.0, beta=1.0)
    with pytest.raises(InfeasibleError, match="boundary"):
        solve_dual(problem, initial_multipliers=None if start is None else [start])
    assert solve_frontier(problem, [0.5, 0.9, 1.0]).status_g.tolist() == ["certified", "certified", "boundary"]


@pytest.mark.parametrize("seed", range(6))
def test_equalities_are_judged_as_by_the_full_program(seed: int) -> None:
    rng = np.random.default_rng(seed)
    r_pk, g_pkm = draw_scores(n_prompts=6, n_responses=4, n_constraints=3, seed=seed)
    is_equality_m = np.array([True, seed % 2 == 0, False])
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.zeros(3), beta=1.0).with_equalities(is_equality_m)
    attainable, reference_m = AttainableMeans(problem), problem.reference_means_m
    statuses = set()
    for _ in range(8):
        margin_m = rng.normal(size=3)
        # An equality is two opposed bounds to the full program.
        signed_pkm = np.concatenate([g_pkm, -g_pkm[..., is_equality_m]], axis=2)
        to_signed = np.vstack([np.eye(3), -np.eye(3)[is_equality_m]])
        largest = _full_program(signed_pkm, to_signed @ reference_m, to_signed @ margin_m)
        for scale in (0.2, 0.99, 1.01, 3.0):
            here = problem.with_thresholds(reference_m + scale * largest * margin_m)
            verdict = attainable.judge(here)
            assert verdict.status == ("feasible" if scale < 1 else "infeasible")
            statuses.add(verdict.status)
            if scale > 1:
                with pytest.raises(InfeasibleError) as caught:
                    solve_dual(here)
                certificate = caught.value.certificate
                v_m = certificate.direction
                assert np.all((v_m >= 0) | is_equality_m)
                assert np.abs(v_m).sum() == pytest.approx(1.0)
                by_hand = np.mean(np.max((g_pkm - here.thresholds_m) @ v_m, axis=1))
                assert certificate.support_value == pytest.approx(by_hand, abs=1e-12)
                assert by_hand < 0
                assert certificate.largest_feasible_scale == pytest.approx(1 / scale, rel=1e-6)
                worst_m = np.where(is_equality_m, g_pkm.min(axis=1).mean(axis=0), np.nan)
                np.testing.assert_allclose(certificate.worst_attainable, worst_m)
            else:
                solve_dual(here)
    assert statuses == {"feasible", "infeasible"}


def test_an_equality_at_the_edge_is_named_with_where_its_mean_can_go() -> None:
    g_pk = np.array([[0.0, 1.0], [2.0, 4.0]])  # means from 1 to 2.5
    problem = DualProblem.from_arrays(
        np.zeros((2, 2)), g_pk, thresholds=1.0, beta=1.0, constraint_names=["share"]
    ).with_equalities([True])
    with pytest.raises(InfeasibleError, match=r"boundary[^$]*share: exactly 1 asked, attainable alone 1 to 2\.5"):
        solve_dual(problem)
    with pytest.raises(InfeasibleError, match=r"cannot be met[^$]*exactly 0\.9 asked[^$]*Move a threshold") as caught:
        solve_dual(problem.with_thresholds(0.9))
    np.testing.assert_array_equal(caught.value.certificate.direction, [-1.0])
    # A bound there is met by the reference.
    assert solve_dual(problem.with_thresholds(0.9).with_equalities([False])).multipliers[0] == 0.0


def test_equalities_that_contradict_each_other_are_infeasible_however_little() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=8, n_responses=5, n_constraints=1, seed=1)
    twice = np.concatenate([g_pkm, -2 * g_pkm], axis=2)
    b = g_pkm.mean() + 0.2
    problem = DualProblem.from_arrays(r_pk, twice, thresholds=[b, -2 * b], beta=1.0).with_equalities([True, True])
    solution = solve_dual(problem)
    alone = DualProblem.from_arrays(r_pk, g_pkm, thresholds=b, beta=1.0).with_equalities([True])
    assert solution.multipliers @ [1.0, -2.0] == pytest.approx(solve_dual(alone).multipliers[0], abs=1e-8)
    assert solution.dependent_constraints == ("constraint_0", "constraint_1")
    with pytest.raises(InfeasibleError, match="together"):
        solve_dual(problem.with_thresholds([b, -2 * b - 1e-7]))


def test_an_equality_no_policy_changes_is_met_exactly_or_not() -> None:
    g_pk = np.array([[1.0, 1.0], [3.0, 3.0]])
    problem = DualProblem.from_arrays(np.array([[0.0, 1.0]] * 2), g_pk, thresholds=2.0, beta=1.0)
    assert solve_dual(problem.with_equalities([True])).multipliers[0] == 0.0
    assert solve_dual(problem.with_thresholds(1.9)).multipliers[0] == 0.0
    for threshold in (1.9, 2.1):
        with pytest.raises(InfeasibleError, match="attainable alone 2 to 2"):
            solve_dual(problem.with_equalities([True]).with_thresholds(threshold))
