"""``frontier.parquet``: what each threshold costs, in the user's own directions and units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.contracts.problem import Constraint, constraint_signs
from pipeline.contracts.shards import write_parquet
from pipeline.dual.posing import Chosen, PosedProblem, pose
from pipeline.progress import progress_bar
from stage1_dual.dual import AttainableMeans, Frontier, solve_frontier

_REACH = 0.95
"""How far a sweep goes from the reference mean towards the best the samples can attain: beyond, few responses rule."""


def sweep_constraints(posed: PosedProblem, *, n_points: int, show_progress: bool = False) -> pa.Table:
    """Sweep each constraint's threshold, the others held: from the reference to near the best attainable.

    The grid also holds the thresholds of the problem itself, so that the run's own point lies on the curve.

    Args:
        posed: the problem, with its own thresholds.
        n_points: points of each sweep.
        show_progress: show how many of the sweeps are done.
    """
    problem, moves = posed.problem, posed.moves
    attainable = AttainableMeans(problem)
    best_m = attainable.best_attainable_m()
    tables = []
    bar = progress_bar(total=problem.n_constraints, doing="frontier", unit="constraints", shown=show_progress)
    for j in range(problem.n_constraints):
        start, best = problem.reference_means_m[j], best_m[j]
        own = problem.thresholds_m[j]
        sweep = np.linspace(start, start + _REACH * (best - start), n_points)
        grid = np.tile(problem.thresholds_m, (n_points + 1, 1))
        grid[:, j] = np.sort(np.append(sweep, own))
        if moves:
            points = [[_at_column(posed, place, value) for place, value in enumerate(row)] for row in grid]
            tables.append(_solve_one_by_one(posed, points, swept=[j]))
        else:
            tables.append(_rows(posed, [j], solve_frontier(problem, grid, attainable=attainable)))
        bar.update()
    bar.close()
    return pa.concat_tables(tables)


def solve_points(posed: PosedProblem, points: Sequence[Sequence[Constraint]], *, swept: Sequence[int]) -> pa.Table:
    """Solve for many settings of the same constraints; infeasible ones are marked, not dropped.

    Args:
        posed: the rows that determine lambda*, under the first of them.
        points: for each point the m constraints, neighbours close to each other.
        swept: places of the constraints that vary.
    """
    if posed.moves:
        return _solve_one_by_one(posed, points, swept=swept)
    signs_m = constraint_signs(points[0])
    thresholds_gm = np.array(
        [
            [
                unit.column_threshold(bound.absolute_threshold(unit.reference))
                for bound, unit in zip(point, posed.units, strict=True)
            ]
            for point in points
        ]
    )
    return _rows(posed, swept, solve_frontier(posed.problem, thresholds_gm * signs_m))


def _at_column(posed: PosedProblem, place: int, value: float) -> Constraint:
    """A constraint at the threshold that a turned one of its column stands for."""
    constraint = posed.constraints[place]
    return replace(constraint, threshold=posed.units[place].threshold(constraint.sign * float(value)), margin=None)


def _solve_one_by_one(
    posed: PosedProblem, points: Sequence[Sequence[Constraint]], *, swept: Sequence[int]
) -> pa.Table:
    """Points of constraints whose columns differ from threshold to threshold."""
    assert posed.rows is not None  # nothing moves elsewhere
    tables = []
    for point in points:
        here = pose(posed.rows, constraints=point, beta=posed.problem.beta, chosen=Chosen(posed.plan.at))
        here = here.within(posed.problem.kl_budget)
        found = solve_frontier(here.problem, here.problem.thresholds_m[np.newaxis])
        if found.status_g[0] == "certified":
            here = here.of_policy(found.multipliers_gm[0], beta=float(found.beta_g[0]))
        tables.append(_rows(here, swept, found))
    return pa.concat_tables(tables)


def write_frontier(path: Path, frontier: pa.Table, *, metadata: Mapping[str, str]) -> None:
    """Write ``frontier.parquet``."""
    write_parquet(path, frontier, metadata=metadata)


def _rows(posed: PosedProblem, swept: Sequence[int], frontier: Frontier) -> pa.Table:
    """``threshold`` and ``margin`` are those of the first constraint that varies."""
    constraints, units = posed.constraints, posed.units
    signs_m, first = constraint_signs(constraints), swept[0]
    label = ",".join(constraints[place].name for place in swept)
    column_gm = signs_m * frontier.thresholds_gm
    threshold_gm = np.stack([unit.threshold(column_gm[:, j]) for j, unit in enumerate(units)], axis=1)
    margin_gm = threshold_gm - np.array([unit.reference for unit in units])
    columns: dict[str, pa.Array] = {
        "constraint": pa.array([label] * len(threshold_gm), pa.string()),
        "threshold": pa.array(threshold_gm[:, first], pa.float64()),
        "margin": pa.array(margin_gm[:, first], pa.float64()),
        "feasible": pa.array(frontier.status_g == "certified", pa.bool_()),
        "status": pa.array(frontier.status_g.tolist(), pa.string()),
        "beta": pa.array(frontier.beta_g, pa.float64()),
        "reward": pa.array(frontier.reward_g, pa.float64()),
        "kl": pa.array(frontier.kl_g, pa.float64()),
        "dual_value": pa.array(frontier.dual_value_g, pa.float64()),
        "ess_median": pa.array(frontier.ess_median_g, pa.float64()),
        "kkt_residual": pa.array(frontier.kkt_residual_g, pa.float64()),
    }
    for place, (constraint, unit) in enumerate(zip(constraints, units, strict=True)):
        columns[f"threshold_{constraint.name}"] = pa.array(threshold_gm[:, place], pa.float64())
        columns[f"margin_{constraint.name}"] = pa.array(margin_gm[:, place], pa.float64())
        columns[f"multiplier_{constraint.name}"] = pa.array(frontier.multipliers_gm[:, place], pa.float64())
        predicted_g = unit.value(constraint.sign * frontier.constraints_gm[:, place])
        columns[f"predicted_{constraint.name}"] = pa.array(predicted_g, pa.float64())
    return pa.table(columns)
