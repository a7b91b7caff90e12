"""How fast the dual of one problem is minimised: our Newton's method, and projected gradient by several step rules.

Projected gradient, lambda(t+1) = max(lambda(t) - step * slack, 0) from lambda(0) = 1, is what arXiv 2405.19544 uses.
Its step rules here:

- constant step 1, as that paper states for its figure;
- the restart ladder of the paper's published code: at most 200 steps of 4, ended once the last five of at least ten
  iterates agree to 1e-5; else again from lambda(0) with the step divided by 2, then by 4, 8 and so on; ten tries;
- the safe constant step beta / L, L a bound on the largest eigenvalue of the covariance of the scores under any policy
  (:func:`covariance_bound`): D is (L / beta)-smooth, so that it cannot diverge;
- the best constant step, from a search whose evaluations are not counted: what nobody can know beforehand.

One evaluation is one pass over the samples, whoever asks for it. Ours starts at 0, takes value, slack and Hessian from
a pass, and its last one is that of the certificate. A problem much larger than this experiment's, or with a beta
far below the spread of the rewards, is started from an easier one by :func:`solve_dual`, which the path shown is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipeline.baselines.palette import SERIES
from pipeline.report.style import INK, new_figure, paper_style
from stage1_dual.dual import (
    MAX_EVALUATIONS,
    DualProblem,
    DualSolution,
    SampleBlock,
    evaluate_dual,
    minimise_dual,
    solve_dual,
)

CONVERGENCE = pa.schema(
    [
        pa.field("method", pa.string(), nullable=False),
        pa.field("evaluation", pa.int64(), nullable=False),
        pa.field("step_size", pa.float64()),
        pa.field("multiplier", pa.float64(), nullable=False),
        pa.field("gap", pa.float64(), nullable=False),
        pa.field("slack_norm", pa.float64(), nullable=False),
        pa.field("kkt_residual", pa.float64(), nullable=False),
        pa.field("ending", pa.string(), nullable=False),
    ]
)
"""One row for each evaluation of each method.

``multiplier`` is that of the first constraint, reward per score unit; ``gap`` the dual above its optimum over the
scale of the problem, dimensionless (rounding can leave it just below 0); ``slack_norm`` the Euclidean norm of the
slacks in standard deviations of their scores; ``kkt_residual`` is dimensionless. ``ending`` is empty but in a method's
last row: "converged" (a residual of at most 1e-8, as in our certificate), "stopped early" (by its own rule, with a
larger residual), "gave up" (no try met the rule), "oscillates" (never closer in the second half of its steps than in
the first) or "out of steps".
"""

OURS = "ours (Newton)"
STEP_ONE = "step 1"
RESTARTS = "restarts from step 4"
SAFE_STEP = "safe step β / L"
BEST_STEP = "best constant step"

_CONVERGED = 1e-8
"""KKT residual of an answer, as of our certificate."""

_START = 1.0
_FIRST_STEP, _N_TRIES, _STEPS_PER_TRY = 4.0, 10, 200
_AGREE, _LAST, _AT_LEAST = 1e-5, 5, 10
# Shares of 2 / (sum of the extreme eigenvalues at the optimum), the best step of a quadratic.
_SEARCHED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6)


@dataclass(frozen=True)
class _Iterate:
    """One evaluation."""

    evaluation: int
    step_size: float | None
    multiplier: float
    gap: float
    slack_norm: float
    kkt_residual: float

    @property
    def is_converged(self) -> bool:
        return self.kkt_residual <= _CONVERGED


@dataclass(frozen=True)
class _Trace:
    """What a method did, and why it ended where it did not converge."""

    method: str
    iterates: list[_Iterate]
    ending: str


class _Judge:
    """Knows the optimum, and measures any multipliers against it."""

    def __init__(self, problem: DualProblem, solution: DualSolution) -> None:
        self.problem = problem
        self._optimum = evaluate_dual(problem, solution.multipliers).centred_value
        self._score_scale_m = np.where(problem.is_constant_m, 1.0, problem.score_scale_m)
        spread = float(solution.multipliers @ problem.score_scale_m)
        self._scale = max(problem.beta, problem.reward_scale, spread)

    def measure(self, lam_m: np.ndarray, *, evaluation: int, step_size: float | None) -> tuple[_Iterate, np.ndarray]:
        """The iterate at ``lam_m``, shape (m,), and its slacks, shape (m,)."""
        dual = evaluate_dual(self.problem, lam_m)
        relative_m = dual.slack_m / self._score_scale_m
        residual_m = np.minimum(lam_m * self._score_scale_m / self.problem.beta, relative_m)
        iterate = _Iterate(
            evaluation=evaluation,
            step_size=step_size,
            multiplier=float(lam_m[0]),
            gap=(dual.centred_value - self._optimum) / self._scale,
            slack_norm=float(np.linalg.norm(relative_m)),
            kkt_residual=float(np.max(np.abs(residual_m))),
        )
        return iterate, dual.slack_m


def convergence_table(problem: DualProblem, *, n_steps: int = 1000) -> pa.Table:
    """The path of every method on one problem.

    Args:
        problem: what all minimise the dual of.
        n_steps: steps a constant step may take; the restart ladder takes what its rule asks for.

    Returns:
        Rows of ``CONVERGENCE``.

    Raises:
        InfeasibleError: no policy on the samples meets the thresholds.
        NotCertifiedError: float64 does not suffice for this problem.
    """
    solution = solve_dual(problem)
    judge = _Judge(problem, solution)
    traces = (
        _Trace(OURS, list(_our_path(judge)), ""),
        _constant(judge, STEP_ONE, 1.0, n_steps),
        _restarts(judge),
        _constant(judge, SAFE_STEP, problem.beta / covariance_bound(problem), n_steps),
        _constant(judge, BEST_STEP, _best_step(judge, solution, n_steps), n_steps),
    )
    return pa.Table.from_pylist([row for trace in traces for row in _rows(trace)], schema=CONVERGENCE)


def covariance_bound(problem: DualProblem) -> float:
    """L: no policy on the samples has a covariance E_x Cov[g] with a larger eigenvalue, score units squared.

    For every prompt the largest squared distance of a response from the centre of their range: of one score, a quarter
    of its squared range (Popoviciu's inequality).
    """
    sums = problem.samples.map(_sum_of_bounds)
    return sum(sums) / problem.n_prompts


def convergence_figure(table: pa.Table) -> Figure:
    """The gap to the optimum against evaluations, both on log scales; how a method ended is marked.

    Args:
        table: rows of ``CONVERGENCE``.
    """
    methods = list(dict.fromkeys(table["method"].to_pylist()))
    with paper_style():
        figure = new_figure(height_inches=3.2)
        axes = figure.subplots()
        for place, method in enumerate(methods):
            _draw_path(axes, table.filter(pc.equal(table["method"], method)), place)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left=0.9)
        for axis, base in ((axes.xaxis, 10), (axes.yaxis, 1000)):
            axis.set_major_locator(LogLocator(base=base, numticks=12))
            axis.set_minor_locator(NullLocator())
            # matplotlib writes powers as mathematics, which this look does not interpret.
            axis.set_major_formatter(FuncFormatter(_write_power))
        axes.set_xlabel("evaluations of the dual")
        axes.set_ylabel("D(λ) − D(λ*), over the problem's scale")
        entries = [
            Line2D([], [], color=SERIES[place % len(SERIES)][0], label=method) for place, method in enumerate(methods)
        ]
        shown = set(table["ending"].to_pylist())
        entries += [
            Line2D([], [], color=INK, linestyle="", marker=marker, markersize=5, label=label)
            for marker, label, endings in _MARKS
            if shown & endings
        ]
        figure.legend(handles=entries, loc="outside upper center", ncols=2)
    return figure


_FLOOR = 1e-16
"""Gaps at and below rounding are drawn here."""

_MARKS = (
    ("o", "converged", {"converged"}),
    ("X", "stops early", {"stopped early", "gave up"}),
    ("d", "oscillates", {"oscillates"}),
)


def _write_power(value: float, _: int | None) -> str:
    return f"{value:g}" if value >= 1 else f"1e{math.log10(value):.0f}"


def _rows(trace: _Trace) -> Iterator[dict[str, Any]]:
    for iterate in trace.iterates[:-1]:
        yield {"method": trace.method, **vars(iterate), "ending": ""}
    last = trace.iterates[-1]
    yield {"method": trace.method, **vars(last), "ending": "converged" if last.is_converged else trace.ending}


def _our_path(judge: _Judge) -> Iterator[_Iterate]:
    """What our solver has after each of its evaluations, by running it anew with a limit one larger.

    Its last step is taken without an evaluation where it leads; the pass of the certificate is counted for it.
    """
    reached = 0
    for limit in range(1, MAX_EVALUATIONS + 1):
        minimum = minimise_dual(judge.problem, max_evaluations=limit)
        if minimum.is_converged:
            yield judge.measure(minimum.lam_m, evaluation=minimum.n_evaluations + 1, step_size=None)[0]
            return
        if minimum.n_evaluations > reached:
            reached = minimum.n_evaluations
            yield judge.measure(minimum.lam_m, evaluation=reached, step_size=None)[0]


def _descend(judge: _Judge, step_size: float, *, before: int = 0) -> Iterator[tuple[_Iterate, np.ndarray]]:
    """Projected gradient from the start, for ever: each iterate and its multipliers."""
    lam_m = np.full(judge.problem.n_constraints, _START)
    evaluation = before
    while True:
        evaluation += 1
        iterate, slack_m = judge.measure(lam_m, evaluation=evaluation, step_size=step_size)
        yield iterate, lam_m
        lam_m = np.maximum(lam_m - step_size * slack_m, 0.0)


def _constant(judge: _Judge, method: str, step_size: float, n_steps: int) -> _Trace:
    iterates: list[_Iterate] = []
    for iterate, _ in _descend(judge, step_size):
        iterates.append(iterate)
        if iterate.is_converged or len(iterates) == n_steps:
            break
    half = len(iterates) // 2
    closest = [min((one.gap for one in part), default=math.inf) for part in (iterates[:half], iterates[half:])]
    return _Trace(method, iterates, "oscillates" if closest[1] >= closest[0] else "out of steps")


def _restarts(judge: _Judge) -> _Trace:
    iterates: list[_Iterate] = []
    step_size = _FIRST_STEP
    for attempt in range(1, _N_TRIES + 1):
        path: list[np.ndarray] = []
        for iterate, lam_m in _descend(judge, step_size, before=len(iterates)):
            iterates.append(iterate)
            path.append(lam_m)
            # The rule does not know the residual: it goes on, and may stop, wherever the iterates agree.
            if len(path) >= _AT_LEAST and float(np.max(np.ptp(path[-_LAST:], axis=0))) < _AGREE:
                return _Trace(RESTARTS, iterates, "stopped early")
            if len(path) == _STEPS_PER_TRY:
                break
        step_size /= 2.0**attempt
    return _Trace(RESTARTS, iterates, "gave up")


def _best_step(judge: _Judge, solution: DualSolution, n_steps: int) -> float:
    """The constant step that converges in the fewest evaluations, or else comes closest."""
    eigenvalues = np.linalg.eigvalsh(solution.hessian)
    centre = 2.0 / float(eigenvalues[0] + eigenvalues[-1])

    def effort(step_size: float) -> tuple[int, float]:
        last = _constant(judge, BEST_STEP, step_size, n_steps).iterates[-1]
        return (last.evaluation if last.is_converged else n_steps + 1, last.gap)

    return min((share * centre for share in _SEARCHED), key=effort)


def _sum_of_bounds(block: SampleBlock) -> float:
    segments = block.segments
    highest_mp, lowest_mp = segments.max(block.scores_mn), -segments.max(-block.scores_mn)
    centred_mn = segments.subtract(block.scores_mn, 0.5 * (highest_mp + lowest_mp))
    return float(np.sum(segments.max(np.sum(centred_mn**2, axis=0))))


def _draw_path(axes: Axes, rows: pa.Table, place: int) -> None:
    color, _ = SERIES[place % len(SERIES)]
    evaluation = rows["evaluation"].to_numpy()
    gap = np.maximum(rows["gap"].to_numpy(), _FLOOR)
    axes.plot(evaluation, gap, color=color, linewidth=1.8 if place == 0 else 0.9, zorder=5 if place == 0 else 3)
    ending = rows["ending"][-1].as_py()
    for marker, _, endings in _MARKS:
        if ending in endings:
            axes.plot(evaluation[-1:], gap[-1:], marker, color=color, markersize=5, clip_on=False, zorder=6)
