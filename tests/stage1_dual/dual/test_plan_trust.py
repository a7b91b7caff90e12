"""What a plan is not trusted for, in its own words."""

import math

import numpy as np
from helpers.pilots import draw_gaussian, pilot_rows, size_request

from stage1_dual.dual import Pilot, plan_sizes


def test_a_demand_that_the_reward_meets_alone_is_not_planned_for():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(6), 64, 32, correlation=0.6)
    plan = plan_sizes(Pilot.measure(pilot_rows(r_pk, g_pkm, -0.5)), size_request(0.1))
    assert "lambda* is 0" in plan.reasons[0]


def test_too_few_responses_for_the_tilt_are_said():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(7), 64, 64)
    pilot = Pilot.measure(pilot_rows(r_pk, g_pkm, 0.4, beta=0.6))
    assert pilot.kl > 1
    plan = plan_sizes(pilot, size_request(0.3, n_responses=8))
    assert any("cannot carry a KL" in reason for reason in plan.reasons)
    assert plan_sizes(pilot, size_request(0.3)).n_responses >= math.exp(pilot.kl / 0.35)


def test_small_pilots_are_not_trusted():
    rows = pilot_rows(*draw_gaussian(np.random.default_rng(8), 20, 6), 0.2)
    reasons = plan_sizes(Pilot.measure(rows), size_request(0.1)).reasons
    assert any("20 prompts of the pilot" in reason for reason in reasons)
    assert any("has 6 responses" in reason for reason in reasons)
