"""The frontier's table against separate solves, and in the user's own direction."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest
from helpers.dual_problems import draw_scores

from pipeline.contracts.problem import Constraint
from pipeline.dual.posing import PosedProblem, finish_posing, plan_linear
from pipeline.dual.sweep import solve_points, sweep_constraints
from stage1_dual.dual import DualProblem, solve_dual

R_PK, G_PKM = draw_scores(n_prompts=30, n_responses=20, n_constraints=2, seed=5)
BOUNDS = [Constraint("harmless", ">=", margin=0.2), Constraint("toxicity", "<=", margin=-0.1)]


def _problem(constraints: list[Constraint]) -> PosedProblem:
    problem = DualProblem.from_arrays(R_PK, G_PKM, thresholds=[0.0, 0.0], beta=1.0)
    plan, units = plan_linear(constraints)
    return finish_posing(problem, plan, units, None)


def test_each_point_is_the_solution_for_its_threshold() -> None:
    margins = np.linspace(-0.1, 0.5, 5)
    points = [[Constraint("harmless", ">=", margin=float(margin)), BOUNDS[1]] for margin in margins]
    table = solve_points(_problem(BOUNDS), points, swept=[0])
    assert table["margin"].to_numpy() == pytest.approx(margins)
    for place, point in enumerate(points):
        solution = solve_dual(_problem(point).problem)
        found = [table[f"multiplier_{bound.name}"][place].as_py() for bound in BOUNDS]
        assert found == pytest.approx(solution.multipliers, abs=1e-8)
        assert table["dual_value"][place].as_py() == pytest.approx(solution.dual_value, abs=1e-10)


def test_an_upper_bound_keeps_its_own_direction_and_an_infeasible_point_is_marked() -> None:
    problem = _problem(BOUNDS)
    reference = problem.units[1].reference
    points = [
        [BOUNDS[0], Constraint("toxicity", "<=", threshold=value)] for value in (reference - 0.1, reference - 50)
    ]
    table = solve_points(problem, points, swept=[1])
    assert table["feasible"].to_pylist() == [True, False]
    assert table["threshold"].to_pylist() == pytest.approx([reference - 0.1, reference - 50])
    assert table["margin"].to_pylist() == pytest.approx([-0.1, -50])
    assert table["predicted_toxicity"][0].as_py() <= reference - 0.1 + 1e-8
    assert np.isnan(table["reward"][1].as_py())


def test_a_sweep_goes_from_the_reference_and_holds_the_runs_own_point() -> None:
    table = sweep_constraints(_problem(BOUNDS), n_points=5)
    for bound, margin in zip(BOUNDS, (0.2, -0.1), strict=True):
        rows = table.filter(pc.equal(table["constraint"], bound.name))
        assert rows.num_rows == 6
        margins = bound.sign * rows["margin"].to_numpy()
        assert np.all(np.diff(margins) >= 0)
        assert margins[0] == pytest.approx(0.0, abs=1e-12)
        assert np.min(np.abs(rows["margin"].to_numpy() - margin)) < 1e-12
        # More of a constraint costs reward less KL, never gives any.
        value = rows.filter(rows["feasible"])["dual_value"].to_numpy()
        assert np.all(np.diff(value) <= 1e-9)
