"""Solutions for many thresholds at once: what each margin costs.

Between neighbouring thresholds lam* moves by the inverse Hessian of the active constraints times the change of the
thresholds. Each point starts from its nearest solved neighbour, moved along that tangent or, where another solved
point lies behind, along the cubic through both, and usually needs one or two evaluations of the dual and its
certificate. A certified solution nearly always proves by itself that its thresholds are feasible; feasibility is
decided separately only where it does not, or where it is a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.contracts.errors import InputError
from stage1_dual.dual.arguments import validate_multipliers
from stage1_dual.dual.certificate import Certificate, certify
from stage1_dual.dual.dual_function import tilt
from stage1_dual.dual.errors import InfeasibleError, KlBudgetError, NotCertifiedError
from stage1_dual.dual.feasibility import AttainableMeans
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.solver import (
    DualMinimum,
    certify_minimum,
    continue_minimum,
    minimise_dual,
    proves_feasibility,
    solve_dual,
)

# A point behind counts where it is on the line to this fraction of a step, and at least that many steps away.
_OFF_LINE = 1e-6
_LEAST_STEP = 0.2
# A bend that is not small against the tangent says that lam* has corners between the points, as for small betas.
_LARGEST_BEND = 0.5


@dataclass(frozen=True, eq=False)
class Frontier:
    """One point per threshold vector, in the order given. Numbers are NaN (and counts 0) where nothing is certified.

    Attributes:
        thresholds_gm: absolute thresholds, score units, shape (g, m).
        status_g: "certified", "infeasible" (also where it takes more than the KL budget), "boundary" (on the edge of
            what the samples can attain: no finite multiplier) or "not_certified" (float64 does not suffice, or the
            KL budget does not bind), shape (g,).
        multipliers_gm: lam*, also the shadow prices of the thresholds, reward per score unit, shape (g, m).
        beta_g: KL strength, reward per nat, shape (g,): the one given, or what spends the KL budget at each point.
        reward_g: predicted reward, reward units, shape (g,).
        constraints_gm: predicted constraint scores, score units, shape (g, m).
        kl_g: KL from the reference, nats per prompt, shape (g,).
        ess_median_g: median over prompts of the effective sample size, samples, shape (g,).
        dual_value_g: D(lam*), reward units, shape (g,).
        kkt_residual_g: dimensionless, shape (g,).
        n_evaluations_g: evaluations of the dual, shape (g,).
    """

    thresholds_gm: FloatArray
    status_g: NDArray[np.str_]
    multipliers_gm: FloatArray
    beta_g: FloatArray
    reward_g: FloatArray
    constraints_gm: FloatArray
    kl_g: FloatArray
    ess_median_g: FloatArray
    dual_value_g: FloatArray
    kkt_residual_g: FloatArray
    n_evaluations_g: NDArray[np.int64]


def solve_frontier(
    problem: DualProblem, thresholds_gm: ArrayLike, *, attainable: AttainableMeans | None = None
) -> Frontier:
    """Solve the problem for every row of thresholds; each certified as by :func:`solve_dual`.

    Infeasible points are marked, not dropped. The thresholds of ``problem`` itself are not used.

    Args:
        problem: the samples and beta or KL budget.
        thresholds_gm: absolute thresholds, score units, shape (g, m), or (g,) for one constraint. Neighbouring rows
            should be close, as along a curve or the rows of a grid.
        attainable: what the samples of ``problem`` can attain, where it is known from another sweep.

    Raises:
        InputError: the thresholds are not finite numbers of that shape.
    """
    grid_gm = _validate_grid(thresholds_gm, problem.n_constraints)
    scale_m = np.where(problem.score_scale_m > 0, problem.score_scale_m, 1.0)
    known = AttainableMeans(problem) if attainable is None else attainable
    status: list[str] = []
    points: list[_Point | None] = []
    solved: list[_Point] = []
    # Where the solved points are; as many rows of it as there are.
    at_sm = np.empty_like(grid_gm)
    for thresholds_m in grid_gm:
        # Relative to one of them: a large common offset must not round the differences.
        target_m = (thresholds_m - grid_gm[0]) / scale_m
        here, start_m = problem.with_thresholds(thresholds_m), None
        if solved:
            start_m = problem.clip_multipliers(_predict(target_m, problem, solved, at_sm[: len(solved)], scale_m))
        if problem.kl_budget is None:
            verdict, point = _solve_point(here, start_m, known)
        else:
            if solved:
                here = here.with_beta(solved[_closest(at_sm[: len(solved)], target_m)].beta)
            verdict, point = _solve_point_within(here, start_m, known)
        status.append(verdict)
        points.append(point)
        if point is not None:
            at_sm[len(solved)] = target_m
            solved.append(point)
    return _collect(grid_gm, status, points)


def threshold_at_multipliers(problem: DualProblem, lam: ArrayLike) -> FloatArray:
    """The thresholds, shape (m,), for which ``lam`` is optimal with every constraint tight: E[g] under the tilt.

    The inverse of the solve, in closed form. Where lam_j is 0, any lower threshold j has the same solution. The
    thresholds of ``problem`` itself are not used.

    Raises:
        InputError: ``lam`` is not m finite numbers, non-negative except of an equality.
    """
    tilted = tilt(problem, validate_multipliers("lam", lam, problem.is_equality_m))
    return np.asarray(np.mean(tilted.scores_mp, axis=1), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Point:
    """A point of the frontier with its certificate, which is valid."""

    minimum: DualMinimum
    certificate: Certificate
    beta: float


def _solve_point(
    problem: DualProblem, start_m: FloatArray | None, attainable: AttainableMeans
) -> tuple[str, _Point | None]:
    # Of one constraint a closed form; of several a linear program, hence last.
    verdict = attainable.judge(problem).status if problem.n_constraints == 1 else None
    if start_m is not None and verdict in (None, "feasible"):
        point = _certified_point(problem, continue_minimum(problem, start_m))
        if point is not None:
            if verdict is None and not proves_feasibility(problem, point.certificate):
                verdict = attainable.judge(problem).status
            if verdict in (None, "feasible"):
                return "certified", point
    verdict = verdict or attainable.judge(problem).status
    if verdict != "feasible":
        return verdict, None
    point = _certified_point(problem, minimise_dual(problem))
    return ("not_certified", None) if point is None else ("certified", point)


def _certified_point(problem: DualProblem, minimum: DualMinimum) -> _Point | None:
    if not minimum.is_converged:
        return None
    minimum, certificate = certify_minimum(problem, minimum)
    return _Point(minimum, certificate, problem.beta) if certificate.is_valid else None


def _solve_point_within(
    problem: DualProblem, start_m: FloatArray | None, attainable: AttainableMeans
) -> tuple[str, _Point | None]:
    """The same under a KL budget: beta is found at every point."""
    try:
        solution = solve_dual(problem, initial_multipliers=start_m)
    except InfeasibleError:
        return attainable.judge(problem).status, None
    except KlBudgetError as error:
        return ("infeasible" if error.attainable_kl > error.kl_budget else "not_certified"), None
    except NotCertifiedError:
        return "not_certified", None
    minimum = DualMinimum(solution.multipliers, solution.kkt_residual, solution.n_evaluations)
    certificate = certify(problem.with_beta(solution.beta), solution.multipliers)
    return "certified", _Point(minimum, certificate, solution.beta)


def _predict(
    target_m: FloatArray, problem: DualProblem, solved: list[_Point], at_sm: FloatArray, scale_m: FloatArray
) -> FloatArray:
    """About where lam* is, shape (m,), from solved points; theirs and the target's thresholds are over ``scale_m``.

    The tangent at the nearest, or the cubic through it and a point behind it on the same line with the same active
    constraints.
    """
    near = _closest(at_sm, target_m)
    ahead_m = target_m - at_sm[near]
    lam_m = solved[near].minimum.lam_m
    slope_m, is_unique = _slope(problem, solved[near], ahead_m * scale_m)
    behind = _closest(at_sm, at_sm[near] - ahead_m)
    lam_behind_m = solved[behind].minimum.lam_m
    back_m = at_sm[near] - at_sm[behind]
    length = float(ahead_m @ ahead_m)
    steps = float(back_m @ ahead_m) / length if length > 0 else 0.0
    is_on_line = bool(np.all(np.abs(back_m - steps * ahead_m) <= _OFF_LINE * math.sqrt(length)))
    # Where the split of lam* is not unique the points' own splits would be taken for a bend.
    are_alike = bool(np.all(problem.is_active_m(lam_behind_m) == problem.is_active_m(lam_m)))
    if is_unique and is_on_line and steps > _LEAST_STEP and are_alike:
        slope_behind_m, _ = _slope(problem, solved[behind], ahead_m * scale_m)
        # The cubic through both points and slopes, one step on: s = -steps behind, 0 near, 1 here.
        apart_m = lam_behind_m - lam_m
        squared_m = (slope_behind_m + 2.0 * slope_m) / steps + 3.0 * apart_m / steps**2
        cubed_m = (slope_behind_m + slope_m) / steps**2 + 2.0 * apart_m / steps**3
        bend_m = squared_m + cubed_m
        if np.max(np.abs(bend_m * scale_m)) <= _LARGEST_BEND * np.max(np.abs(slope_m * scale_m)):
            slope_m = slope_m + bend_m
    return lam_m + slope_m


def _closest(at_sm: FloatArray, target_m: FloatArray) -> int:
    return int(np.argmin(np.sum((at_sm - target_m) ** 2, axis=1)))


def _slope(problem: DualProblem, point: _Point, change_m: FloatArray) -> tuple[FloatArray, bool]:
    """How lam* moves for a change of the thresholds, to first order, while the same constraints are active, (m,).

    And whether no other movement does as well: not where active constraints are dependent.
    """
    slope_m = np.zeros_like(change_m)
    free = np.flatnonzero(problem.is_active_m(point.minimum.lam_m))
    if len(free) == 0:
        return slope_m, True
    hess_mm = point.certificate.hess_mm
    # Least squares: dependent constraints leave the Hessian singular.
    slope_m[free], _, rank, _ = np.linalg.lstsq(hess_mm[np.ix_(free, free)], change_m[free], rcond=1e-10)
    return slope_m, int(rank) == len(free)


def _collect(grid_gm: FloatArray, status: list[str], points: list[_Point | None]) -> Frontier:
    n_points, n_constraints = grid_gm.shape
    multipliers_gm = np.full((n_points, n_constraints), np.nan)
    constraints_gm = np.full((n_points, n_constraints), np.nan)
    scalars = np.full((6, n_points), np.nan)
    n_evaluations_g = np.zeros(n_points, dtype=np.int64)
    for row, point in enumerate(points):
        if point is None:
            continue
        certificate = point.certificate
        multipliers_gm[row] = point.minimum.lam_m
        constraints_gm[row] = grid_gm[row] + certificate.slack_m
        scalars[:, row] = (
            certificate.reward,
            certificate.kl,
            np.median(certificate.ess_p),
            certificate.dual_value,
            certificate.kkt_residual,
            point.beta,
        )
        n_evaluations_g[row] = point.minimum.n_evaluations
    return Frontier(
        thresholds_gm=grid_gm,
        status_g=np.array(status, dtype=np.str_),
        multipliers_gm=multipliers_gm,
        beta_g=scalars[5],
        reward_g=scalars[0],
        constraints_gm=constraints_gm,
        kl_g=scalars[1],
        ess_median_g=scalars[2],
        dual_value_g=scalars[3],
        kkt_residual_g=scalars[4],
        n_evaluations_g=n_evaluations_g,
    )


def _validate_grid(thresholds_gm: ArrayLike, n_constraints: int) -> FloatArray:
    try:
        grid_gm = np.array(thresholds_gm, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"`thresholds_gm` is not a rectangular array of numbers: {error}") from error
    if grid_gm.ndim == 1 and n_constraints == 1:
        grid_gm = grid_gm[:, np.newaxis]
    if grid_gm.ndim != 2 or grid_gm.shape[1] != n_constraints or len(grid_gm) == 0:
        raise InputError(
            f"`thresholds_gm` has shape {np.shape(thresholds_gm)}; it must be (points, {n_constraints}) with at least "
            f"one point"
        )
    if not bool(np.all(np.isfinite(grid_gm))):
        rows = np.flatnonzero(~np.all(np.isfinite(grid_gm), axis=1))[:5].tolist()
        raise InputError(f"`thresholds_gm` has NaN or infinite values in rows {rows}; all must be finite")
    return grid_gm
