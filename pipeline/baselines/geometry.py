"""The geometry of a problem with one constraint, in the plane of slack and value.

Every policy is a point (E[g] - b, E[r] - beta KL). For any multiplier and any policy

    value + lam * slack = L(pi, lam) <= D(lam) ,

hence all policies lie on or below the line of slope -lam through (0, D(lam)), and the policy tilted by lam lies on it.
The tilted policies of all multipliers, the negative ones included, are the upper edge of what is attainable; at lam*
the line touches it where the slack is 0 (if the constraint binds), so that D(lam*) is the best value of a policy that
satisfies the constraint: strong duality, seen. How far a policy lies below the line of lam* is its Lagrangian gap,
D(lam*) - L(pi, lam*) = beta E_x KL(pi || pi_lam*).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from pipeline.baselines.palette import SERIES
from pipeline.contracts.errors import InputError
from pipeline.report.style import (
    BLUE,
    FORBIDDEN,
    GREY,
    INK,
    few_ticks,
    interval_bars,
    legend_above,
    new_figure,
    paper_style,
    printable,
)
from stage1_dual.dual import DualProblem, evaluate_dual, tilt

FRONTIER = pa.schema(
    [
        pa.field("lam", pa.float64(), nullable=False),
        pa.field("slack", pa.float64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("kl", pa.float64(), nullable=False),
    ]
)
"""One row for each multiplier (reward per score unit), ascending: the policy tilted by it. ``slack`` is in score units
and positive where the constraint is satisfied, ``value`` is ``reward`` less beta times ``kl`` (nats), reward units.
"""

POLICIES = pa.schema(
    [
        pa.field("method", pa.string(), nullable=False),
        pa.field("slack", pa.float64(), nullable=False),
        pa.field("slack_ci95_low", pa.float64()),
        pa.field("slack_ci95_high", pa.float64()),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("value_ci95_low", pa.float64()),
        pa.field("value_ci95_high", pa.float64()),
    ]
)
"""One row for each measured policy: slack in score units and E[r] - beta KL in reward units, with 95% intervals, or
null where there is none. A method may have several rows.
"""


@dataclass(frozen=True)
class SupportingLine:
    """The line that no policy is above.

    Attributes:
        lam: minus its slope, reward per score unit.
        dual_value: D(lam), its height at slack 0, reward units.
        tangent_slack: of the policy tilted by ``lam``, where it touches the frontier, score units.
        tangent_value: E[r] - beta KL of that policy, reward units.
        reference_slack: of the reference policy, score units.
        reference_value: E[r] of the reference policy, whose KL is 0, reward units.
    """

    lam: float
    dual_value: float
    tangent_slack: float
    tangent_value: float
    reference_slack: float
    reference_value: float

    def height(self, slack: np.ndarray) -> np.ndarray:
        """Of the line at slacks of any shape, reward units."""
        return self.dual_value - self.lam * slack


def multiplier_grid(problem: DualProblem, lam_star: float, *, n_points: int = 301) -> np.ndarray:
    """Multipliers whose points make a smooth edge well to both sides of ``lam_star``, shape (n_points,).

    The unit is the larger of lam* and beta over the spread of the score, a nat per standard deviation.

    Raises:
        InputError: the problem has not one constraint.
    """
    _require_one_constraint(problem)
    unit = max(lam_star, problem.beta / float(problem.score_scale_m[0]))
    return np.linspace(-2.0 * unit, lam_star + 3.0 * unit, n_points)


def frontier_points(problem: DualProblem, lam_grid: ArrayLike) -> pa.Table:
    """The upper edge of the attainable slacks and values, by tilting.

    Args:
        problem: the samples, the threshold of the one constraint, and beta.
        lam_grid: multipliers, reward per score unit, shape (g,). Negative ones give the edge left of the policy that
            ignores the constraint; they are no solution of a problem.

    Returns:
        Rows of ``FRONTIER``.

    Raises:
        InputError: the problem has not one constraint, or the grid is not finite numbers, at least one.
    """
    _require_one_constraint(problem)
    lam_g = np.sort(np.atleast_1d(np.asarray(lam_grid, dtype=np.float64)))
    if lam_g.ndim != 1 or len(lam_g) == 0 or not bool(np.all(np.isfinite(lam_g))):
        raise InputError(f"`lam_grid` is {lam_grid!r}; it must be a list of finite numbers, at least one")
    rows = []
    for lam in lam_g:
        policy = tilt(problem, np.array([lam]))
        reward, kl = float(np.mean(policy.reward_p)), float(np.mean(policy.kl_p))
        rows.append(
            {
                "lam": float(lam),
                "slack": float(np.mean(policy.slack_mp)),
                "value": reward - problem.beta * kl,
                "reward": reward,
                "kl": kl,
            }
        )
    return pa.Table.from_pylist(rows, schema=FRONTIER)


def supporting_line(problem: DualProblem, lam: float) -> SupportingLine:
    """The line of a multiplier: of lam*, or of any other.

    Args:
        problem: the samples, the threshold of the one constraint, and beta.
        lam: reward per score unit, not negative.

    Raises:
        InputError: the problem has not one constraint, or ``lam`` is negative or not finite.
    """
    _require_one_constraint(problem)
    if not (np.isfinite(lam) and lam >= 0):
        raise InputError(f"`lam` is {lam}; it must be finite and not negative")
    point = frontier_points(problem, [lam]).to_pylist()[0]
    dual_value = evaluate_dual(problem, np.array([lam])).value
    return SupportingLine(
        lam=lam,
        dual_value=dual_value,
        tangent_slack=point["slack"],
        tangent_value=point["value"],
        reference_slack=float((problem.reference_means_m - problem.thresholds_m)[0]),
        reference_value=problem.reference_reward,
    )


def geometry_figure(
    frontier: pa.Table, line: SupportingLine, policies: pa.Table, *, looks: Mapping[str, tuple[str, str]]
) -> Figure:
    """The attainable set under its edge with the line that supports it; below, the measured policies from near.

    The dotted distance of a policy to the line is its Lagrangian gap. All should be of the same prompts: that nothing
    lies above the line holds for each set of prompts, not across two of them. (Nor does it hold exactly for a policy
    measured on samples of its own: those are not the ones the frontier is a reweighting of.)

    Args:
        frontier: rows of ``FRONTIER``, from negative multipliers on to show the edge left of the reward's optimum.
        line: of lam*.
        policies: rows of ``POLICIES``, at least one.
        looks: colour and marker of methods; others get those of the common palette in order.
    """
    near = _padded([0.0, line.tangent_slack, *_values(policies, "slack")], 0.15)
    slack, value = (frontier[name].to_numpy() for name in ("slack", "value"))
    best_reward = float(slack[np.argmax(value)])
    wide = _padded([*near, line.reference_slack, best_reward], 0.12)
    spare = iter(SERIES * policies.num_rows)
    shown = {method: looks.get(method) or next(spare) for method in dict.fromkeys(policies["method"].to_pylist())}
    with paper_style():
        figure = new_figure(height_inches=5.2)
        top, bottom = figure.subplots(2, 1)
        for axes, limits in ((top, wide), (bottom, near)):
            axes.set_xlim(limits)
            axes.set_ylim(_heights(slack, value, line, policies, limits))
            _draw_geometry(axes, slack, value, line)
            for method, look in shown.items():
                _draw_policies(axes, policies.filter(pc.equal(policies["method"], method)), line, method, look)
            few_ticks(axes)
            axes.set_ylabel("value E[r] − β KL (reward)")
        top.add_patch(
            Rectangle(
                (near[0], bottom.get_ylim()[0]),
                near[1] - near[0],
                float(np.ptp(bottom.get_ylim())),
                fill=False,
                edgecolor=INK,
                linewidth=0.6,
                zorder=7,
            )
        )
        bottom.set_xlabel("slack E[g] − b (score); frame enlarged")
        figure.align_ylabels()
        legend_above(figure, top, columns=2)
    return figure


def _require_one_constraint(problem: DualProblem) -> None:
    if problem.n_constraints != 1:
        raise InputError(f"`problem` has {problem.n_constraints} constraints; the plane is that of one")


def _values(table: pa.Table, name: str) -> list[float]:
    """A figure of all rows, with the ends of its intervals."""
    columns = (table[column].to_pylist() for column in (name, f"{name}_ci95_low", f"{name}_ci95_high"))
    return [value for column in columns for value in column if value is not None]


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = share * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def _heights(
    slack: np.ndarray, value: np.ndarray, line: SupportingLine, policies: pa.Table, limits: tuple[float, float]
) -> tuple[float, float]:
    """What is to be seen between ``limits``: the far ends of the edge are all cost, and would flatten the rest."""
    heights = [*_values(policies, "value"), line.tangent_value, *line.height(np.array(limits))]
    if limits[0] <= line.reference_slack <= limits[1]:
        heights.append(line.reference_value)
    order = np.argsort(slack)
    heights += list(np.interp(limits, slack[order], value[order]))
    return _padded(heights, 0.06)


def _draw_geometry(axes: Axes, slack: np.ndarray, value: np.ndarray, line: SupportingLine) -> None:
    limits, (floor, _) = np.array(axes.get_xlim()), axes.get_ylim()
    axes.axvspan(limits[0], 0.0, color=FORBIDDEN, linewidth=0, zorder=0, label="constraint violated")
    axes.fill_between(slack, floor, value, color=BLUE, alpha=0.1, linewidth=0, zorder=1, label="attainable")
    axes.plot(slack, value, color=BLUE, zorder=3, label="frontier")
    dashes = (0, (4, 2))
    axes.plot(limits, line.height(limits), color=INK, linewidth=1.0, linestyle=dashes, label="line of slope −λ*")
    axes.plot(
        [line.tangent_slack], [line.tangent_value], "*", color=INK, markersize=8, zorder=6, label="tilted optimum"
    )
    axes.plot([line.reference_slack], [line.reference_value], "s", color=GREY, markersize=4.5, label="reference")


def _draw_policies(axes: Axes, rows: pa.Table, line: SupportingLine, method: str, look: tuple[str, str]) -> None:
    color, marker = look
    slack, value = (rows[name].to_numpy() for name in ("slack", "value"))
    axes.errorbar(
        slack,
        value,
        xerr=_bars(rows, "slack"),
        yerr=_bars(rows, "value"),
        fmt=marker,
        color=color,
        markersize=4.5,
        elinewidth=0.8,
        zorder=5,
        label=printable(method),
    )
    axes.vlines(slack, value, line.height(slack), color=color, linewidth=0.9, linestyle=":", zorder=4)


def _bars(rows: pa.Table, name: str) -> np.ndarray:
    """Lengths of error bars, shape (2, rows); 0 where there is no interval, and where it lies beside its value."""
    columns = (name, f"{name}_ci95_low", f"{name}_ci95_high")
    value, low, high = (np.array(rows[column].to_pylist(), dtype=np.float64) for column in columns)
    return np.asarray(np.nan_to_num(interval_bars(value, low, high)))
