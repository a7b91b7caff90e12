"""What a plan is not trusted for, in its own words."""

import math

import numpy as np
from helpers.pilots import draw_gaussian, pilot_rows, size_request

from stage1_dual.dual import Pilot, plan_sizes
from stage1_dual.dual.plan_trust import pilot_reasons, size_reasons, unsure_that_nothing_binds


def test_a_pilot_on_which_nothing_binds_says_so_only_where_it_knows():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(6), 64, 32, correlation=0.6)
    sure = Pilot.measure(pilot_rows(r_pk, g_pkm, -0.5))
    assert unsure_that_nothing_binds(sure, 0.95) == []
    (room,), (error,) = sure.moments.room_m, sure.room_errors_m
    pilot = Pilot.measure(pilot_rows(r_pk, g_pkm, -0.5 + room - 1.5 * error))
    assert not pilot.is_active_m.any()
    (reason,) = unsure_that_nothing_binds(pilot, 0.95)
    assert "it may bind" in reason
    assert plan_sizes(pilot, size_request(0.1)).outcome == "not trusted"


def test_too_few_responses_for_the_tilt_are_said_without_what_they_would_leave():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(7), 64, 64)
    pilot = Pilot.measure(pilot_rows(r_pk, g_pkm, 0.4, beta=0.6))
    assert pilot.kl > 1
    (reason,) = size_reasons(pilot, 8, np.array([0.3]))
    assert reason.startswith(f"8 responses a prompt are too few: the KL of {pilot.kl:.2f} nats needs")
    assert plan_sizes(pilot, size_request(0.3)).n_responses >= math.exp(pilot.kl / 0.35)


def test_a_bias_that_takes_most_of_what_is_allowed_is_said():
    pilot = Pilot.measure(pilot_rows(*draw_gaussian(np.random.default_rng(3), 64, 32), 0.4))
    assert size_reasons(pilot, 64, np.array([0.1])) == []
    (reason,) = size_reasons(pilot, 64, np.array([0.02]))
    assert "whatever the number of prompts" in reason


def test_a_score_that_never_differs_is_named():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(8), 64, 32)
    pilot = Pilot.measure(pilot_rows(r_pk, np.ones_like(g_pkm), -0.5, relative=False))
    assert "no prompt of the pilot has responses that differ" in pilot_reasons(pilot)[0]


def test_small_pilots_are_not_trusted():
    rows = pilot_rows(*draw_gaussian(np.random.default_rng(8), 20, 6), 0.2)
    reasons = plan_sizes(Pilot.measure(rows), size_request(0.1)).reasons
    assert any("20 prompts of the pilot" in reason for reason in reasons)
    assert any("has 6 responses" in reason for reason in reasons)
