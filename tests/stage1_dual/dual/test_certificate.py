from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
from helpers.dual_oracles import naive_dual_value, naive_policy
from helpers.dual_problems import draw_scores, problem_at_depth
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_dual.dual import (
    DualProblem,
    InfeasibleError,
    NotCertifiedError,
    certify,
    dual_function,
    evaluate_dual,
    segments,
    solve_dual,
    solver,
    tilt,
    tilting,
)
from stage1_dual.dual import certificate as certificate_module
from stage1_dual.dual.certificate import require_certified
from stage1_dual.dual.solver import continue_minimum


@pytest.fixture
def problem() -> DualProblem:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=12, n_constraints=2, seed=3)
    return problem_at_depth(r_pk, g_pkm, depth=0.5, beta=0.7)


def test_residual_is_the_definition(problem: DualProblem) -> None:
    lam_m = np.array([0.2, 0.0])
    certificate = certify(problem, lam_m)
    slack_m = np.mean(tilt(problem, lam_m).slack_mp, axis=1)
    expected = np.max(np.abs(np.minimum(lam_m * problem.score_scale_m / 0.7, slack_m / problem.score_scale_m)))
    assert certificate.kkt_residual == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(certificate.slack_m, slack_m, atol=1e-13)
    # Weak duality in its exact form for a tilted policy.
    assert certificate.duality_gap == pytest.approx(float(lam_m @ slack_m), abs=1e-13)
    np.testing.assert_allclose(certificate.complementarity_m, lam_m * slack_m, atol=1e-13)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_prompts=st.integers(1, 8),
    n_responses=st.integers(1, 9),
    n_constraints=st.integers(0, 4),
    # From hardly tilted to exponents of hundreds of nats, on both sides of where shifts and deviations are needed.
    nats=st.floats(0.1, 300.0),
    offset=st.sampled_from([0.0, 1e3]),
    is_ragged=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_certificate_and_evaluation_are_the_definitions(
    n_prompts: int, n_responses: int, n_constraints: int, nats: float, offset: float, is_ragged: bool, seed: int
) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=n_prompts, n_responses=n_responses, n_constraints=n_constraints, seed=seed)
    rng = np.random.default_rng(seed)
    lam_m, b_m = rng.exponential(size=n_constraints), rng.normal(size=n_constraints)
    beta = float(np.max(np.abs(r_pk) + np.abs(g_pkm - b_m) @ lam_m)) / nats
    ids, r_n, g_nm = np.arange(n_prompts).repeat(n_responses), r_pk.reshape(-1), g_pkm.reshape(r_pk.size, -1)
    if is_ragged:
        # One more prompt, of a single response, which no multiplier moves.
        ids, r_n, g_nm = np.append(ids, n_prompts), np.append(r_n, 0.0), np.vstack([g_nm, b_m])
    problem = DualProblem.from_rows(ids, r_n + offset, g_nm + offset, thresholds=b_m + offset, beta=beta)
    found, evaluation = certify(problem, lam_m), evaluate_dual(problem, lam_m)
    value = naive_dual_value(r_pk, g_pkm, b_m=b_m, beta=beta, lam_m=lam_m)
    policy = naive_policy(r_pk, g_pkm, b_m=b_m, beta=beta, lam_m=lam_m)
    share = n_prompts / problem.n_prompts
    close = {"rtol": 1e-10, "atol": 1e-12 * (1 + offset)}
    for dual_value in (found.dual_value, evaluation.value):
        np.testing.assert_allclose(dual_value, share * value + offset, **close)
    np.testing.assert_allclose(found.reward, share * policy.reward + offset, **close)
    np.testing.assert_allclose(found.primal_value, found.reward - beta * found.kl, **close)
    np.testing.assert_allclose(found.kl, share * policy.kl, rtol=1e-10, atol=1e-11 * (1 + offset / beta))
    np.testing.assert_allclose(found.ess_p[:n_prompts], policy.ess_p, rtol=1e-9 * (1 + offset))
    for result in (found, evaluation):
        np.testing.assert_allclose(result.slack_m, share * policy.slack_m, **close)
        np.testing.assert_allclose(
            result.hess_mm * beta, share * policy.covariance_mm, rtol=1e-8, atol=1e-12 + 1e-12 * offset
        )


@pytest.mark.parametrize("nudge", [[1e-6, 0.0], [0.0, -1e-6], [0.1, 0.1], [-0.05, 0.0], [5.0, 5.0]])
def test_what_is_not_optimal_is_refused(problem: DualProblem, nudge: list[float]) -> None:
    best = solve_dual(problem).multipliers
    assert certify(problem, best).is_valid
    certificate = certify(problem, best + np.array(nudge))
    assert not certificate.is_valid
    with pytest.raises(NotCertifiedError, match=r"KKT residual .* raise beta"):
        require_certified(problem, certificate)


def test_negative_multipliers_are_refused_even_with_no_slack(problem: DualProblem) -> None:
    # At thresholds met with equality by lam = (-0.5, 0.4), the slack is zero and only the sign is wrong.
    lam_m = np.array([-0.5, 0.4])
    tight = problem.with_thresholds(np.mean(tilt(problem, lam_m).scores_mp, axis=1))
    certificate = certify(tight, lam_m)
    assert abs(certificate.duality_gap) < 1e-12
    assert certificate.kkt_residual == np.inf


def test_unused_multiplier_on_a_constant_constraint_is_refused() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=5, n_responses=4, n_constraints=2, seed=0)
    g_pkm[..., 1] = 1.0
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=[-5.0, 0.0], beta=1.0)
    assert certify(problem, np.array([0.0, 0.0])).kkt_residual == 0.0
    assert certify(problem, np.array([0.0, 0.3])).kkt_residual == np.inf


def test_shares_no_code_with_the_solver() -> None:
    """By name, and by what would happen: see the wrong kernels below."""
    shared = {name for module in (dual_function, solver, tilting, segments) for name in _functions(module)}
    assert {"evaluate_dual", "newton_step", "weigh_block", "combine", "weighted_products"} <= shared
    assert not shared & _functions(certificate_module)


def _functions(module: ModuleType) -> set[str]:
    """Names of the functions of this package that a module calls, its classes' methods left out."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
    if module is solver:
        del found["certify"], found["require_certified"]
    return {name for name, value in found.items() if value.__module__.startswith("stage1_dual.dual")}


def _tilt_too_far(coefficients_m: Any, values_mn: Any, *, out: Any = None) -> Any:
    return np.matmul(1.1 * coefficients_m, values_mn, out=out)


def _leave_out_the_first(coefficients_m: Any, values_mn: Any, *, out: Any = None) -> Any:
    return np.matmul(coefficients_m[1:], values_mn[1:], out=out)


def _weigh_the_first_response_twice(self: Any, left_n: Any, right_n: Any) -> Any:
    products_n = left_n * right_n
    return np.add.reduceat(products_n, self.starts_p, axis=-1) + products_n[..., self.starts_p]


def _forget_the_last_response(self: Any, values_n: Any) -> Any:
    return np.add.reduceat(values_n, self.starts_p, axis=-1) - values_n[..., self.starts_p + self.counts_p - 1]


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (segments.combine, _tilt_too_far),
        (segments.combine, _leave_out_the_first),
        (segments.Segments.dot, _weigh_the_first_response_twice),
        (segments.Segments.sum, _forget_the_last_response),
    ],
)
def test_a_wrong_kernel_of_the_solver_is_caught(
    kernel: FunctionType, wrong: FunctionType, is_ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solver finds the minimum of a wrong dual, and knows of nothing amiss; the certificate does."""
    problem = _problem(is_ragged=is_ragged)
    right = solve_dual(problem).multipliers
    # In place: whoever imported the kernel, under whatever name, has the wrong one from here on.
    monkeypatch.setattr(kernel, "__code__", wrong.__code__)
    minimum = continue_minimum(problem, right, looks_ahead=False)
    assert minimum.is_converged
    assert np.max(np.abs(minimum.lam_m - right)) > 1e-3
    assert not certify(problem, minimum.lam_m).is_valid
    assert certify(problem, right).is_valid
    # Feasibility is decided by other means, of which the wrong kernel may be one: an error too, never an answer.
    with pytest.raises((NotCertifiedError, InfeasibleError)):
        solve_dual(problem)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_wrong_thresholds_in_the_gradient_are_caught(is_ragged: bool) -> None:
    problem = _problem(is_ragged=is_ragged)
    problem.slack_shift_m[:] += 0.01
    with pytest.raises(NotCertifiedError, match="not certified"):
        solve_dual(problem)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_the_hessian_is_the_certificates_own(is_ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong Hessian only slows the solver down, so that its answer is right; what is reported must be too."""
    problem = _problem(is_ragged=is_ragged)
    right = solve_dual(problem)

    def half(segments: Any, vectors_mn: Any, weights_n: Any, factor_p: Any, *, work_n: Any) -> Any:
        np.multiply(weights_n, 0.5, out=work_n)
        return np.stack([segments.sum(vectors_mn * (row_n * work_n)) @ factor_p for row_n in vectors_mn])

    monkeypatch.setattr(segments.weighted_products, "__code__", half.__code__)
    assert not np.allclose(evaluate_dual(problem, right.multipliers).hess_mm, right.hessian, rtol=0.1)
    np.testing.assert_array_equal(certify(problem, right.multipliers).hess_mm, right.hessian)


def _problem(*, is_ragged: bool) -> DualProblem:
    """Two constraints that bind; evenly weighted, as most problems are."""
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=12, n_constraints=2, seed=8)
    ids, r_n, g_nm = np.arange(60).repeat(12), r_pk.reshape(-1), g_pkm.reshape(-1, 2)
    keep = np.arange(len(ids)) % 7 != 3 if is_ragged else np.full(len(ids), True)
    problem = DualProblem.from_rows(ids[keep], r_n[keep], g_nm[keep], thresholds=[0.0, 0.0], beta=1.0)
    return problem.with_thresholds(problem.reference_means_m + 0.3)


def test_a_solver_that_stops_early_is_caught(problem: DualProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MAX_EVALUATIONS", 2)
    monkeypatch.setattr(solver, "_WARM_EVALUATIONS", 2)
    with pytest.raises(NotCertifiedError, match="not certified"):
        solve_dual(problem)


def test_an_equality_is_judged_by_its_slack_whatever_its_multiplier(problem: DualProblem) -> None:
    lam_m = np.array([-0.5, 0.4])
    tight = problem.with_thresholds(np.mean(tilt(problem, lam_m).scores_mp, axis=1))
    assert certify(tight.with_equalities([True, False]), lam_m).is_valid
    assert certify(tight.with_equalities([False, True]), lam_m).kkt_residual == np.inf
    # Below its threshold or above it: a bound with no multiplier would not mind the latter.
    for off in (-1e-3, 1e-3):
        moved = tight.with_thresholds(tight.thresholds_m + off * tight.score_scale_m * np.array([1.0, 0.0]))
        found = certify(moved.with_equalities([True, False]), lam_m)
        assert found.kkt_residual == pytest.approx(1e-3, rel=1e-6)
