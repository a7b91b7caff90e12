"""The figure of a plan, with awkward data."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.figures import require_nothing_cut_off

from pipeline.planning.plan_figure import plan_figure
from stage1_dual.dual import DualProblem, Pilot, PilotRows, SizeRequest, plan_sizes, solve_dual


def pilot_of(seed: int, *, beta: float) -> Pilot:
    rng = np.random.default_rng(seed)
    r_pk = rng.normal(size=(40, 32))
    g_pk = rng.normal(size=(40, 32)) + rng.normal(size=(40, 1))
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + 0.4, beta=beta)
    column_mn = g_pk.reshape(1, -1)
    return Pilot.measure(
        PilotRows(
            counts_p=np.full(40, 32),
            reward_n=r_pk.ravel(),
            column_mn=column_mn,
            reference_mn=column_mn,
            target_m=np.array([0.4]),
            multipliers_m=solve_dual(problem).multipliers,
            beta=beta,
            is_equality_m=np.zeros(1, dtype=bool),
            names=("g",),
        )
    )


@pytest.mark.parametrize(("beta", "within"), [(2.0, 0.08), (0.8, 0.2), (2.0, 0.005), (2.0, 3.0)])
def test_the_plan_lies_inside_and_nothing_is_cut_off(beta, within):
    pilot = pilot_of(0, beta=beta)
    request = SizeRequest(np.array([within]), 0.95, None, np.array([2 * within]))
    plan = plan_sizes(pilot, request)
    figure = plan_figure(pilot, request, plan)
    (axes,) = figure.axes
    assert axes.get_xlim()[0] <= plan.n_responses <= axes.get_xlim()[1]
    assert axes.get_ylim()[0] <= plan.n_prompts <= axes.get_ylim()[1]
    require_nothing_cut_off(figure)
