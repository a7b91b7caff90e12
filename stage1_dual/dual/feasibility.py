"""Can any reweighting of the samples meet the thresholds? Decided before solving, proved either way.

The means a policy supported on the samples can attain form a polytope A, with support function
F(v) = E_x max_k <v, g(x, y_k)>. By linear programming duality (a theorem of the alternative)

    max over a in A of min_j (a_j - b_j) / s_j  =  min over v >= 0, <v, s> = 1 of  F(v) - <v, b>.

Positive: a strictly feasible policy exists, hence a finite lam* (Slater). Negative: v proves infeasibility. Zero: the
thresholds lie on the boundary of A, reached only by deterministic policies, and no finite lam attains the infimum.

With an equality no policy has room on both sides, and full support takes its place: a finite lam* exists where a
policy that gives every response weight meets the equalities and is not below the bounds (the refined Slater condition;
Boyd and Vandenberghe, Convex Optimization, 5.2.3). The reference gives every response weight, so there is one exactly
where a policy lies beyond the thresholds on the way from the reference, at means c, through them: where

    max { t : a in A, a_j = c_j + t (b_j - c_j) for equalities, a_j >= c_j + t (b_j - c_j) for bounds }
        =  min over v, v_j >= 0 for bounds, <v, b - c> = 1 of  F(v) - <v, c>

exceeds 1. Below 1 v proves infeasibility, and at 1 the thresholds lie on the boundary.

One constraint is a closed form. Several are solved by column generation: A has as many vertices as there are choices
of one response per prompt, but the linear program holds only the few vertices its own prices asked for, so its size
does not depend on the number of prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.errors import InfeasibilityCertificate, InfeasibleError
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray, combine

FeasibilityStatus = Literal["feasible", "boundary", "infeasible"]

# Column generation on a polytope in m dimensions needs a few times m columns; this only bounds a defect.
_MAX_COLUMNS = 1_000
# A policy so many times as far from the reference as the thresholds shows that they are well inside.
_FAR_BEYOND = 2.0
# HiGHS works to about 1e-9 on a program scaled like this one: closer than that it cannot tell zero from positive.
_LP_RESOLUTION = 1e-9


@dataclass(frozen=True, eq=False)
class Feasibility:
    """The verdict on one set of thresholds.

    Attributes:
        status: "feasible" (strictly), "boundary" or "infeasible".
        margin: the optimum above, in standard deviations s of the constraints: how far inside (positive) or outside
            (negative) the thresholds lie; with an equality, how much further away from the reference they could be.
            For "feasible" it is a lower bound: the search stops at the proof.
        direction_m: the vector v of the optimum, of bounds non-negative, its sizes sum to 1, shape (m,); None for
            "feasible".
    """

    status: FeasibilityStatus
    margin: float
    direction_m: FloatArray | None


@dataclass(frozen=True, eq=False)
class _Step:
    """Bounds on the largest t with base + t * direction attainable, and the prices that prove the upper one."""

    lower: float
    upper: float
    prices_m: FloatArray


class AttainableMeans:
    """The polytope A of one set of samples, remembering the vertices found so that further thresholds come cheap.

    Coordinates are (E[g_j] - E_x[shift_j]) / s_j over the constraints that vary within some prompt.
    """

    def __init__(self, problem: DualProblem) -> None:
        self._samples = problem.samples
        self._facts = problem.samples.facts
        self.varying = np.flatnonzero(~problem.is_constant_m)
        self._is_equality = problem.is_equality_m[self.varying]
        self._is_constant_equality_m = problem.is_equality_m & problem.is_constant_m
        self._scale = problem.score_scale_m[self.varying]
        n_varying = len(self.varying)
        centred_m = self._facts.reference_means_m - (self._facts.score_pivot_m + self._facts.score_shift_m)
        # The reference itself: every program below starts feasible.
        self._vertices: list[FloatArray] = [centred_m[self.varying] / self._scale]
        prices_qv = np.eye(n_varying)
        if n_varying > 1:
            prices_qv = np.vstack([prices_qv, np.full(n_varying, 1.0 / n_varying)])
        prices_qv = np.vstack([prices_qv, -np.eye(n_varying)[self._is_equality]])
        self._vertices.extend(self._supporting_vertices(prices_qv))
        self._best_v = np.array([self._vertices[1 + v][v] for v in range(n_varying)], dtype=np.float64)
        self._worst_v = np.full(n_varying, np.nan)
        equal = np.flatnonzero(self._is_equality)
        for v, vertex in zip(equal, self._vertices[len(self._vertices) - len(equal) :], strict=True):
            self._worst_v[v] = vertex[v]

    def best_attainable_m(self) -> FloatArray:
        """Largest attainable mean of each constraint alone, score units, shape (m,)."""
        best_m = self._facts.reference_means_m.copy()
        shift_m = self._facts.score_pivot_m + self._facts.score_shift_m
        best_m[self.varying] = shift_m[self.varying] + self._best_v * self._scale
        return best_m

    def worst_attainable_m(self) -> FloatArray:
        """Smallest attainable mean of each equality alone, score units, shape (m,); NaN for bounds."""
        worst_m = np.where(self._is_constant_equality_m, self._facts.reference_means_m, np.nan)
        shift_m = self._facts.score_pivot_m + self._facts.score_shift_m
        worst_m[self.varying] = shift_m[self.varying] + self._worst_v * self._scale
        return worst_m

    def judge(self, problem: DualProblem) -> Feasibility:
        """Decide feasibility for the thresholds of ``problem``: the same samples, bounds and equalities."""
        rounding_m = _rounding(problem)
        unmet = problem.is_constant_m & (problem.slack_shift_m < -rounding_m)
        exceeded = problem.is_constant_m & problem.is_equality_m & (problem.slack_shift_m > rounding_m)
        if bool(np.any(unmet | exceeded)):
            worst = int(np.flatnonzero(unmet | exceeded)[0])
            direction_m = np.eye(problem.n_constraints)[worst] * (-1.0 if exceeded[worst] else 1.0)
            return Feasibility("infeasible", -math.inf, direction_m)
        n_varying = len(self.varying)
        if n_varying == 0:
            return Feasibility("feasible", math.inf, None)
        if bool(np.any(self._is_equality)):
            return self._judge_beyond(problem, float(np.max(rounding_m[self.varying] / self._scale)))
        base_v = -problem.slack_shift_m[self.varying] / self._scale
        tolerance = float(np.max(rounding_m[self.varying] / self._scale))
        alone_v = self._best_v - base_v
        tightest = int(np.argmin(alone_v))
        if n_varying == 1 or alone_v[tightest] <= tolerance:
            unit = np.eye(n_varying)[tightest]
            step = _Step(lower=float(alone_v[tightest]), upper=float(alone_v[tightest]), prices_m=unit)
        else:
            step = self._largest_step(base_v, np.ones(n_varying), enough=max(tolerance, _LP_RESOLUTION))
            tolerance = max(tolerance, _LP_RESOLUTION)
        direction_m = self._to_raw(step.prices_m, problem.n_constraints)
        if step.upper < -tolerance:
            return Feasibility("infeasible", step.upper, direction_m)
        if step.lower > tolerance or self._pins_a_mean(step.prices_m):
            return Feasibility("feasible", step.lower, None)
        return Feasibility("boundary", step.upper, direction_m)

    def _judge_beyond(self, problem: DualProblem, rounding: float) -> Feasibility:
        """The verdict where there is an equality: whether a policy lies beyond the thresholds."""
        margin_v = self._margin(problem)
        length = float(np.max(np.abs(margin_v)))
        tolerance = max(rounding, _LP_RESOLUTION)
        if not bool(np.any(margin_v[~self._is_equality] > rounding)) and not bool(
            np.any(np.abs(margin_v[self._is_equality]) > rounding)
        ):
            return Feasibility("feasible", math.inf, None)
        step = self._step_alone(margin_v)
        if len(margin_v) > 1 and step.upper > 1.0:
            step = self._largest_step(self._vertices[0], margin_v, enough=1.0 + tolerance / length)
        upper, lower = (step.upper - 1.0) * length, (step.lower - 1.0) * length
        if lower > tolerance:
            return Feasibility("feasible", lower, None)
        direction_m = self._to_raw(step.prices_m, problem.n_constraints)
        return Feasibility("infeasible" if upper < -tolerance else "boundary", upper, direction_m)

    def _margin(self, problem: DualProblem) -> FloatArray:
        """The thresholds over the reference, in coordinates of the polytope, shape (v,)."""
        margin_v: FloatArray = -problem.slack_shift_m[self.varying] / self._scale - self._vertices[0]
        return margin_v

    def _step_alone(self, margin_v: FloatArray) -> _Step:
        """The smallest over the constraints, each taken alone, of the largest step along the margins, shape (v,)."""
        room_v = self._best_v - self._vertices[0]
        falling = self._is_equality & (margin_v < 0)
        room_v[falling] = (self._vertices[0] - self._worst_v)[falling]
        size_v = np.where(self._is_equality, np.abs(margin_v), margin_v)
        step_v = np.divide(room_v, size_v, out=np.full_like(room_v, np.inf), where=size_v > 0)
        tightest = int(np.argmin(step_v))
        prices_v = np.zeros_like(margin_v)
        prices_v[tightest] = 1.0 / margin_v[tightest]
        return _Step(lower=float(step_v[tightest]), upper=float(step_v[tightest]), prices_m=prices_v)

    def largest_scale(self, problem: DualProblem) -> float | None:
        """Largest t such that reference + t * (threshold - reference) is attainable; None when no t > 0 is."""
        margin_m = problem.thresholds_m - problem.reference_means_m
        unmet_m = np.where(problem.is_equality_m, np.abs(margin_m), margin_m) > _rounding(problem)
        if bool(np.any(problem.is_constant_m & unmet_m)):
            return None
        margin_v = margin_m[self.varying] / self._scale
        if not bool(np.any((margin_v > 0) | (self._is_equality & (margin_v < 0)))):
            return None
        if len(self.varying) == 1:
            scale = self._step_alone(margin_v).lower
        else:
            scale = self._largest_step(self._vertices[0], margin_v, enough=math.inf).lower
        return scale if scale > 0 else None

    def support_value(self, problem: DualProblem, direction_m: FloatArray) -> float:
        """E_x max_k <v, g - b>, score units."""
        largest = sum(self._samples.map(partial(_largest_sum, direction_m=direction_m)))
        return float(largest / self._facts.n_prompts + direction_m @ problem.slack_shift_m)

    def _support(self, prices_v: FloatArray) -> tuple[float, FloatArray]:
        """F(v) and a vertex that attains it, remembered."""
        (vertex,) = self._supporting_vertices(prices_v[np.newaxis])
        self._vertices.append(vertex)
        return float(prices_v @ vertex), vertex

    def _supporting_vertices(self, prices_qv: FloatArray) -> list[FloatArray]:
        """A vertex of A that is furthest in each of q directions, in one pass; shape (v,) each."""
        if len(prices_qv) == 0:
            return []
        prices_qm = np.zeros((len(prices_qv), len(self._facts.is_constant_m)))
        prices_qm[:, self.varying] = prices_qv / self._scale
        sums_qm = sum(self._samples.map(partial(_vertex_sums, prices_qm=prices_qm)), np.zeros(1))
        return list(sums_qm[:, self.varying] / self._scale / self._facts.n_prompts)

    def _largest_step(self, base_v: FloatArray, direction_v: FloatArray, *, enough: float) -> _Step:
        """Largest t with base + t * direction dominated by A, by column generation; stops once t > ``enough``.

        Equalities must be met, not dominated. There HiGHS is trusted to 1e-9: the point it found is checked.
        """
        # Imported where it is used: it takes longer to import than most problems to solve, and one constraint has no
        # linear program.
        from scipy.optimize import linprog

        n_varying = len(base_v)
        equal, bounded = np.flatnonzero(self._is_equality), np.flatnonzero(~self._is_equality)
        # With an equality only what lies a little beyond the thresholds matters, and margins may be next to nothing.
        farthest = 2.0 * _FAR_BEYOND if len(equal) else None
        upper, prices_v = math.inf, np.full(n_varying, 1.0 / n_varying)
        while True:
            vertices = np.array(self._vertices)
            n_columns = len(vertices)
            master = linprog(
                np.append(np.zeros(n_columns), -1.0),
                A_ub=np.column_stack([-vertices.T, direction_v])[bounded],
                b_ub=-base_v[bounded],
                A_eq=np.vstack(
                    [np.append(np.ones(n_columns), 0.0), np.column_stack([-vertices.T, direction_v])[equal]]
                ),
                b_eq=np.append(1.0, -base_v[equal]),
                bounds=[(0.0, None)] * n_columns + [(None, farthest)],
                method="highs-ds",
                options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
            )
            if master.x is None or master.status != 0:
                raise RuntimeError(f"HiGHS did not solve the feasibility program: {master.message}")
            mixture = np.maximum(master.x[:-1], 0.0)
            attained_v = mixture @ vertices / np.sum(mixture)
            # From the attained point, not from the solver's objective: this bound holds without trusting HiGHS.
            pushing = (direction_v > 0) | (self._is_equality & (direction_v < 0))
            lower = float(np.min((attained_v - base_v)[pushing] / direction_v[pushing]))
            missed_v = (attained_v - base_v - lower * direction_v)[equal]
            if not np.all(np.abs(missed_v) <= _LP_RESOLUTION * np.maximum(1.0, np.abs(attained_v[equal]))):
                raise RuntimeError(f"HiGHS missed an equality of the feasibility program by {missed_v.tolist()}")
            if farthest is not None and lower >= _FAR_BEYOND:
                return _Step(lower=lower, upper=math.inf, prices_m=prices_v)
            new_prices_v = np.empty(n_varying)
            new_prices_v[bounded] = np.maximum(-master.ineqlin.marginals, 0.0)
            new_prices_v[equal] = -master.eqlin.marginals[1:]
            new_prices_v /= new_prices_v @ direction_v
            value, vertex = self._support(new_prices_v)
            bound = value - float(new_prices_v @ base_v)
            if bound < upper:
                upper, prices_v = bound, new_prices_v
            known = bool(np.any(np.all(vertices == vertex, axis=1)))
            closed = upper - lower <= 1e-13 * max(1.0, abs(upper))
            if lower > enough or closed or known or n_columns > _MAX_COLUMNS:
                return _Step(lower=lower, upper=upper, prices_m=prices_v)

    def _pins_a_mean(self, prices_v: FloatArray) -> bool:
        """Whether <v, g> is the same for all responses of each prompt: then two-sided constraints pin a mean, which
        policies of full support can attain, so a finite lam* exists although no slack can be positive.
        """
        prices_m = np.zeros(len(self._facts.is_constant_m))
        prices_m[self.varying] = prices_v / self._scale
        sizes = np.max(list(self._samples.map(partial(_sizes, prices_m=prices_m))), axis=0)
        return bool(sizes[0] <= 1e-12 * sizes[1])

    def _to_raw(self, prices_v: FloatArray, n_constraints: int) -> FloatArray:
        direction_m = np.zeros(n_constraints)
        direction_m[self.varying] = prices_v / self._scale
        return np.asarray(direction_m / np.sum(np.abs(direction_m)), dtype=np.float64)


def require_feasible(problem: DualProblem, attainable: AttainableMeans) -> None:
    """Return when the thresholds are strictly feasible on the samples.

    Raises:
        InfeasibleError: they are not, or they lie on the boundary; the message names constraints, what was asked and
            what is attainable, and the certificate can be checked by hand.
    """
    verdict = attainable.judge(problem)
    if verdict.status == "feasible" or verdict.direction_m is None:
        return
    certificate = InfeasibilityCertificate(
        thresholds=problem.thresholds_m,
        direction=verdict.direction_m,
        support_value=attainable.support_value(problem, verdict.direction_m),
        best_attainable=attainable.best_attainable_m(),
        worst_attainable=attainable.worst_attainable_m(),
        largest_feasible_scale=attainable.largest_scale(problem),
    )
    raise InfeasibleError(_message(problem, verdict.status, certificate), certificate=certificate)


def _rounding(problem: DualProblem) -> FloatArray:
    """What rounding of the data alone can do to a slack, score units, shape (m,)."""
    magnitude_m = problem.score_magnitude_m + np.abs(problem.thresholds_m)
    return np.asarray(8 * np.finfo(np.float64).eps * magnitude_m, dtype=np.float64)


def _message(problem: DualProblem, status: FeasibilityStatus, certificate: InfeasibilityCertificate) -> str:
    reference_m = problem.reference_means_m
    involved = [j for j in range(problem.n_constraints) if abs(certificate.direction[j]) > 1e-9]
    together = " together" if len(involved) > 1 else ""
    head = f"The thresholds cannot be met{together} by any policy on these {problem.n_samples} samples."
    if status == "boundary":
        head = (
            f"The thresholds lie exactly on the boundary of what these {problem.n_samples} samples can attain"
            f"{together}: no finite multiplier attains the infimum of the dual."
        )
    lines = [head]
    for j in involved:
        asked, best = problem.thresholds_m[j], certificate.best_attainable[j]
        line = f"  {problem.constraint_names[j]}: "
        if problem.is_equality_m[j]:
            worst = certificate.worst_attainable[j]
            line += f"exactly {_number(asked)} asked, attainable alone {_number(worst)} to {_number(best)} "
            line += f"(reference mean {_number(reference_m[j])})"
        else:
            line += f"threshold {_number(asked)} asked, best attainable alone {_number(best)} "
            line += f"(reference mean {_number(reference_m[j])}, margin {_number(asked - reference_m[j])} "
            line += f"asked, largest {_number(best - reference_m[j])})"
        lines.append(line)
    if len(involved) > 1:
        mix = " + ".join(f"{certificate.direction[j]:.4g}*{problem.constraint_names[j]}" for j in involved)
        asked = float(certificate.direction @ problem.thresholds_m)
        lines.append(
            f"  Proof: {mix} can reach at most {_number(asked + certificate.support_value)} on average, "
            f"and the thresholds ask {_number(asked)}."
        )
    scale = certificate.largest_feasible_scale
    if scale is not None and problem.n_constraints > 1:
        scaled = ", ".join(
            f"{name} {_number(reference_m[j] + scale * (problem.thresholds_m[j] - reference_m[j]))}"
            for j, name in enumerate(problem.constraint_names)
        )
        lines.append(f"  With all margins scaled by one factor, anything below {scale:.6g} is feasible: {scaled}.")
    towards = "Lower a threshold below what is attainable"
    if bool(np.any(problem.is_equality_m[involved])):
        towards = "Move a threshold to well within what is attainable"
    lines.append(f"{towards}, or draw more responses per prompt.")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.6g}"


def _largest_sum(block: SampleBlock, *, direction_m: FloatArray) -> float:
    """Sum over prompts of max_k <v, g_c>."""
    return float(np.sum(block.segments.max(combine(direction_m, block.scores_mn))))


def _vertex_sums(block: SampleBlock, *, prices_qm: FloatArray) -> FloatArray:
    """Sum over prompts of the centred scores of the response that is furthest in each direction, shape (q, m)."""
    rows_qp = [block.segments.argmax_rows(combine(prices_m, block.scores_mn)) for prices_m in prices_qm]
    return np.stack([np.sum(block.scores_mn[:, rows_p], axis=1) for rows_p in rows_qp])


def _sizes(block: SampleBlock, *, prices_m: FloatArray) -> tuple[float, float]:
    """Largest |<v, g_c>| and largest sum of |v_j g_cj|."""
    combined_n = combine(prices_m, block.scores_mn)
    return float(np.max(np.abs(combined_n))), float(np.max(combine(np.abs(prices_m), np.abs(block.scores_mn))))
