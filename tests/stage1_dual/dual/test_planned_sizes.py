"""Sizes from a pilot, against simulated truth: plans, what to go on to, the evaluation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.pilots import BETA, draw_gaussian, pilot_rows, size_request

from stage1_dual.dual import Pilot, plan_sizes, reward_cost, top_up, why_not_so_many


@pytest.mark.parametrize(("relative", "n_constraints", "within"), [(True, 1, 0.025), (False, 2, 0.13)])
def test_a_plan_is_kept_as_often_as_it_says(relative, n_constraints, within):
    """40 pilots with a run each: at a nominal 5%, more than 6 misses come up in one of 300 such tests."""
    margin, n_responses, missed, sizes = 0.2 if relative else 0.4, 64, 0, []
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        pilot = Pilot.measure(
            pilot_rows(*draw_gaussian(rng, 64, 32, n_constraints=n_constraints), margin, relative=relative)
        )
        plan = plan_sizes(pilot, size_request(within, n_constraints, n_responses=n_responses))
        assert plan.reasons == ()
        sizes.append(plan.n_prompts)
        run = pilot_rows(
            *draw_gaussian(rng, plan.n_prompts, n_responses, n_constraints=n_constraints), margin, relative=relative
        )
        # E_lam[g] of the population: reward and scores have covariance S, and a tilt moves the means by S (1, lam).
        correlation = -0.4
        own = np.full((n_constraints, n_constraints), correlation**2) + np.eye(n_constraints) * (1 - correlation**2)
        slack_m = (correlation + own @ run.multipliers_m) / BETA - margin
        missed += bool((np.abs(slack_m) > within).any())
    assert missed <= 6
    assert np.median(sizes) > 40  # not the least there is, with which nothing would be missed


def test_the_cheapest_plan_is_no_dearer_than_any_fixed_number_of_responses():
    pilot = Pilot.measure(pilot_rows(*draw_gaussian(np.random.default_rng(3), 64, 32), 0.4, relative=False))
    plan = plan_sizes(pilot, size_request(0.1))
    assert plan.miss <= 0.05
    for count in (8, 16, 32, 64, 128, 256):
        fixed = plan_sizes(pilot, size_request(0.1, n_responses=count))
        is_candidate = fixed.outcome == "planned" and abs(pilot.bias_at(count)[0]) <= 0.2 * 0.1
        assert not is_candidate or plan.n_prompts * plan.n_responses <= fixed.n_prompts * count
    enough = plan_sizes(pilot, size_request(0.1, n_prompts=4 * plan.n_prompts))
    assert enough.outcome == "planned"
    assert enough.reasons == ()
    assert enough.miss <= 0.05


def test_fewer_responses_cost_reward():
    pilot = Pilot.measure(pilot_rows(*draw_gaussian(np.random.default_rng(4), 200, 64), 0.5))
    # A threshold further out costs reward, at the price of the multiplier and of the KL that it takes.
    assert reward_cost(pilot, 16) == pytest.approx(2 * reward_cost(pilot, 32), rel=0.1)
    assert reward_cost(pilot, 32) > 0


def test_the_evaluation_says_satisfied_as_often_as_was_asked_for():
    rng = np.random.default_rng(5)
    pilot = Pilot.measure(pilot_rows(*draw_gaussian(rng, 400, 64), 0.3, relative=False))
    plan = plan_sizes(pilot, size_request(0.1, evaluation_responses=32))
    spread = math.sqrt((pilot.moments.between_mm.first[0, 0] + pilot.sampled_m[0] / 32) / plan.evaluation_prompts)
    # The policy lies `room` beyond the demand, off by the run's own error, and is judged by an interval over prompts.
    truth = plan.room_m[0] + plan.errors_m[0] * rng.normal(size=20_000)
    satisfied = np.mean(truth + spread * rng.normal(size=20_000) - 1.96 * spread > 0)
    assert 0.945 < satisfied < 0.975


def test_topping_up_grows_within_the_limits_and_ends():
    pilot = Pilot.measure(pilot_rows(*draw_gaussian(np.random.default_rng(11), 64, 32), 0.4, relative=False))
    drawn = {"drawn_prompts": 64, "drawn_responses": 32}
    n_prompts, n_responses = top_up(pilot, size_request(0.06, **drawn, most_prompts=5000, most_responses=512))
    assert 64 <= n_prompts <= 256
    assert 32 <= n_responses <= 128
    assert n_prompts * n_responses > 64 * 32
    assert top_up(pilot, size_request(0.06, **drawn, most_prompts=64, most_responses=512)) == (64, 64)
    assert top_up(pilot, size_request(0.06, **drawn, most_prompts=64, most_responses=32)) is None
    assert top_up(pilot, size_request(5.0, **drawn, most_prompts=5000, most_responses=512)) is None


def test_limits_that_leave_nothing_are_said_with_what_would_do_without_them():
    pilot = Pilot.measure(pilot_rows(*draw_gaussian(np.random.default_rng(3), 64, 32), 0.4, relative=False))
    plan = plan_sizes(pilot, size_request(0.1))
    sizes = (plan.n_prompts, plan.n_responses)
    few = plan_sizes(pilot, size_request(0.1, most_prompts=plan.n_prompts // 2))
    assert (few.outcome, few.instead) == ("out of reach", sizes)
    assert "within what is allowed with probability" in few.reasons[0]
    tiny = plan_sizes(pilot, size_request(0.1, n_responses=2))
    assert (tiny.outcome, tiny.instead) == ("out of reach", sizes)
    assert tiny.reasons == ("2 responses a prompt are too few: a plan has at least 8",)
    never = plan_sizes(pilot, size_request(1e-6))
    assert (never.outcome, never.instead) == ("out of reach", None)
    assert why_not_so_many(pilot, size_request(0.1), 2) == "too few for the KL"
    assert why_not_so_many(pilot, size_request(0.1), plan.n_responses) is None


def test_what_is_planned_is_to_be_trusted_where_any_number_of_responses_is():
    """Of a demand of which the cheapest number of responses leaves a bias that is known too badly."""
    found = 0
    for seed in range(30):
        pilot = Pilot.measure(pilot_rows(*draw_gaussian(np.random.default_rng(seed), 40, 16), 0.5))
        plan = plan_sizes(pilot, size_request(0.25))
        if plan.outcome == "planned":
            assert why_not_so_many(pilot, size_request(0.25), plan.n_responses) is None
            found += 1
    assert found > 10


def test_where_nothing_binds_the_evaluation_that_is_planned_proves_it():
    rng = np.random.default_rng(6)
    correlation, demand, responses = 0.6, 0.25, 24
    pilot = Pilot.measure(pilot_rows(*draw_gaussian(rng, 400, 64, correlation=correlation), demand))
    plan = plan_sizes(pilot, size_request(0.1, evaluation_responses=responses))
    assert plan.outcome == "nothing binds"
    assert plan.n_prompts is None
    truth = correlation / BETA - demand
    assert plan.offset_m[0] == pytest.approx(truth, abs=4 * plan.errors_m[0])
    assert plan.evaluation_prompts > 30
    satisfied = 0
    for _ in range(400):
        # The policy of the reward alone shifts the rewards by 1 / beta; the prompts' own means cancel in a margin.
        shape = (plan.evaluation_prompts, responses)
        of_policy = correlation / BETA + rng.normal(size=shape)
        slack_p = (of_policy - rng.normal(size=shape)).mean(axis=1) - demand
        satisfied += slack_p.mean() - 1.96 * slack_p.std(ddof=1) / math.sqrt(len(slack_p)) > 0
    assert 0.93 < satisfied / 400 < 0.995  # a little more than 95%: the pilot's own error is in it


def test_an_evaluation_has_prompts_enough_for_an_interval_and_sees_what_does_not_bind():
    rng = np.random.default_rng(12)
    r_pk, g_pkm = draw_gaussian(rng, 64, 32)
    wide = plan_sizes(Pilot.measure(pilot_rows(r_pk, g_pkm, 0.4)), size_request(5.0))
    assert wide.evaluation_prompts == 30
    # A second column that hardly has room of its own, and is noisier: it decides.
    rows = pilot_rows(r_pk, np.concatenate([g_pkm, 1.5 * rng.normal(size=g_pkm.shape)], axis=2), 0.3)
    rows = replace(rows, target_m=np.array([0.3, -0.2]), multipliers_m=np.array([rows.multipliers_m[0], 0.0]))
    both = plan_sizes(Pilot.measure(rows), size_request(0.1, 2))
    alone = plan_sizes(Pilot.measure(pilot_rows(r_pk, g_pkm, 0.3)), size_request(0.1))
    assert both.evaluation_prompts > alone.evaluation_prompts
