"""Sizes from a pilot: its moments against slow loops and closed forms, its plans against simulated truth."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.contracts.errors import InputError
from stage1_dual.dual import DualProblem, Pilot, PilotRows, SizeRequest, plan_sizes, reward_cost, solve_dual, top_up
from stage1_dual.dual.pilot import _jackknife, _prompt_terms, _weights

BETA = 2.0


def draw(rng, n_prompts, n_responses, *, n_constraints=1, effect=0.5, correlation=-0.4):
    """Rewards and scores that are Gaussian with standard deviation 1 within a prompt, shapes (p, k) and (p, k, m)."""
    r_pk = rng.normal(size=(n_prompts, n_responses))
    own_pkm = rng.normal(size=(n_prompts, n_responses, n_constraints))
    g_pkm = correlation * r_pk[:, :, None] + math.sqrt(1 - correlation**2) * own_pkm
    return r_pk, g_pkm + effect * rng.normal(size=(n_prompts, 1, n_constraints))


def rows_of(r_pk, g_pkm, margins, *, relative=True, beta=BETA, equal=False):
    """The rows of a pilot at the solution of its own problem."""
    n_prompts, n_responses = r_pk.shape
    m = g_pkm.shape[2]
    margins_m = np.full(m, margins)
    reference_m = g_pkm.mean(axis=(0, 1)) if relative else np.zeros(m)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=reference_m + margins_m, beta=beta)
    problem = problem.with_equalities(np.full(m, equal))
    column_mn = np.ascontiguousarray(g_pkm.reshape(-1, m).T)
    return PilotRows(
        counts_p=np.full(n_prompts, n_responses),
        reward_n=r_pk.ravel(),
        column_mn=column_mn,
        reference_mn=column_mn if relative else np.zeros_like(column_mn),
        target_m=margins_m,
        multipliers_m=solve_dual(problem).multipliers,
        beta=beta,
        is_equality_m=problem.is_equality_m,
        names=tuple(f"g{j}" for j in range(m)),
    )


def asked(within, m=1, **settings):
    defaults = {"confidence": 0.95, "evaluation_responses": 64, "room_m": np.full(m, 2 * within)}
    return SizeRequest(within_m=np.full(m, within), **{**defaults, **settings})


def tilted_means(rows, kept_k, prompt):
    """Slack and KL of one prompt by plain sums over the responses kept."""
    k = int(rows.counts_p[prompt])
    place = np.arange(prompt * k, (prompt + 1) * k)[kept_k]
    logit = (rows.reward_n[place] + rows.multipliers_m @ rows.column_mn[:, place]) / rows.beta
    weight = np.exp(logit) / np.exp(logit).sum()
    slack = rows.column_mn[:, place] @ weight - rows.reference_mn[:, place].mean(axis=1) - rows.target_m
    return slack, weight @ logit - np.log(np.mean(np.exp(logit)))


@pytest.mark.parametrize("relative", [True, False])
def test_leaving_out_one_response_is_what_a_loop_over_all_of_them_finds(relative):
    rows = rows_of(*draw(np.random.default_rng(0), 5, 12, n_constraints=2), 0.3, relative=relative)
    terms = _prompt_terms(rows, rows.multipliers_m)
    found = _jackknife(rows, _weights(rows, rows.multipliers_m)[0])
    for prompt in range(5):
        whole, kl = tilted_means(rows, np.ones(12, bool), prompt)
        without = [tilted_means(rows, np.arange(12) != left_out, prompt) for left_out in range(12)]
        slacks = np.array([slack for slack, _ in without])
        np.testing.assert_allclose(terms.psi_mp[:, prompt], whole, atol=1e-12)
        off = slacks - slacks.mean(axis=0)
        np.testing.assert_allclose(found.within_mmp[:, :, prompt], 11 * off.T @ off, rtol=1e-9)
        np.testing.assert_allclose(found.bias_mp[:, prompt], -12 * 11 * (slacks.mean(axis=0) - whole), atol=1e-10)
        bias_of_kl = 11 * (np.mean([one for _, one in without]) - kl)
        np.testing.assert_allclose(terms.kl_p[prompt], kl - bias_of_kl, atol=1e-12)


def test_moments_are_those_of_a_gaussian_population():
    # Tilted by v = 2 KL: E w^2 = exp(v), and under w^2 the mean moves by as much again.
    effect, margin, n_responses = 0.5, 0.4, 512
    r_pk, g_pkm = draw(np.random.default_rng(1), 400, n_responses, effect=effect)
    pilot = Pilot.measure(rows_of(r_pk, g_pkm, margin, relative=False))
    moment, moved = math.exp(2 * pilot.kl), margin - g_pkm.mean()
    assert pilot.second_moment == pytest.approx(moment, rel=0.05)
    assert pilot.moments.bias_m.first[0] == pytest.approx(moment * moved, rel=0.05)
    assert pilot.moments.between_mm[0, 0] == pytest.approx(effect**2, rel=0.2)
    # E w^2 (g - E_lam g)^2 = exp(v) (1 + margin^2), `moved` being how far the tilt moves the mean.
    assert pilot.moments.within_mm.first[0, 0] == pytest.approx(moment * (1 + moved**2), rel=0.05)
    assert pilot.sampled_m[0] == pytest.approx(1.0, rel=0.05)


def test_a_variance_of_many_gaussian_prompts_has_one_degree_of_freedom_less_than_prompts():
    degrees = [
        Pilot.measure(rows_of(*draw(np.random.default_rng(seed), 80, 32), 0.3, relative=False))
        .predict(32)
        .degrees_m[0]
        for seed in range(12)
    ]
    assert 50 < np.median(degrees) < 120


def test_an_inactive_constraint_moves_with_the_active_one():
    rng = np.random.default_rng(2)
    r_pk, g_pkm = draw(rng, 80, 64)
    # The second column is the first with a looser demand: it follows it one to one.
    rows = rows_of(r_pk, np.concatenate([g_pkm, g_pkm], axis=2), 0.3)
    target_m = np.array([0.3, 0.1])
    rows = replace(rows, target_m=target_m, multipliers_m=np.array([rows.multipliers_m.sum(), 0.0]))
    pilot = Pilot.measure(rows)
    np.testing.assert_allclose(pilot.moments.room_m, [0.0, 0.2], atol=1e-9)
    np.testing.assert_allclose(pilot.moments.between_mm[0, 0], pilot.moments.between_mm[1, 1])
    prediction = pilot.predict(64)
    assert not prediction.two_sided_m[1]
    # It is 0.2 beyond its demand, so that only the other one can be missed.
    assert prediction.miss(200, np.array([0.1, 0.1])) == prediction.miss(200, np.array([0.1, 10.0]))


@pytest.mark.parametrize(("relative", "n_constraints", "within"), [(True, 1, 0.025), (False, 2, 0.13)])
def test_a_plan_is_kept_as_often_as_it_says(relative, n_constraints, within):
    """40 pilots with a run each: at a nominal 5%, more than 6 misses come up in one of 300 such tests."""
    margin, n_responses, missed, sizes = 0.2 if relative else 0.4, 64, 0, []
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        pilot = Pilot.measure(rows_of(*draw(rng, 64, 32, n_constraints=n_constraints), margin, relative=relative))
        plan = plan_sizes(pilot, asked(within, n_constraints, n_responses=n_responses))
        assert plan.reasons == ()
        sizes.append(plan.n_prompts)
        run = rows_of(*draw(rng, plan.n_prompts, n_responses, n_constraints=n_constraints), margin, relative=relative)
        # E_lam[g] of the population: reward and scores have covariance S, and a tilt moves the means by S (1, lam).
        correlation = -0.4
        own = np.full((n_constraints, n_constraints), correlation**2) + np.eye(n_constraints) * (1 - correlation**2)
        slack_m = (correlation + own @ run.multipliers_m) / BETA - margin
        missed += bool((np.abs(slack_m) > within).any())
    assert missed <= 6
    assert np.median(sizes) > 40  # not the least there is, with which nothing would be missed


def test_the_cheapest_plan_is_no_dearer_than_any_fixed_number_of_responses():
    pilot = Pilot.measure(rows_of(*draw(np.random.default_rng(3), 64, 32), 0.4, relative=False))
    plan = plan_sizes(pilot, asked(0.1))
    assert plan.miss <= 0.05
    for count in (8, 16, 32, 64, 128, 256):
        fixed = plan_sizes(pilot, asked(0.1, n_responses=count))
        is_candidate = count >= pilot.fewest_responses() and abs(pilot.bias_at(count)[0]) <= 0.2 * 0.1
        assert not is_candidate or plan.n_prompts * plan.n_responses <= fixed.n_prompts * count
    few = plan_sizes(pilot, asked(0.1, most_prompts=plan.n_prompts // 2))
    assert few.n_prompts == plan.n_prompts // 2
    assert "with probability" in few.reasons[0]
    enough = plan_sizes(pilot, asked(0.1, n_prompts=4 * plan.n_prompts))
    assert enough.reasons == ()
    assert enough.miss <= 0.05


def test_fewer_responses_cost_reward():
    pilot = Pilot.measure(rows_of(*draw(np.random.default_rng(4), 200, 64), 0.5))
    # A threshold further out costs reward, at the price of the multiplier and of the KL that it takes.
    assert reward_cost(pilot, 16) == pytest.approx(2 * reward_cost(pilot, 32), rel=0.1)
    assert reward_cost(pilot, 32) > 0


def test_the_evaluation_says_satisfied_as_often_as_was_asked_for():
    rng = np.random.default_rng(5)
    pilot = Pilot.measure(rows_of(*draw(rng, 400, 64), 0.3, relative=False))
    plan = plan_sizes(pilot, asked(0.1, evaluation_responses=32))
    spread = math.sqrt((pilot.moments.between_mm[0, 0] + pilot.sampled_m[0] / 32) / plan.evaluation_prompts)
    # The policy lies `room` beyond the demand, off by the run's own error, and is judged by an interval over prompts.
    truth = plan.room_m[0] + plan.errors_m[0] * rng.normal(size=20_000)
    satisfied = np.mean(truth + spread * rng.normal(size=20_000) - 1.96 * spread > 0)
    assert 0.945 < satisfied < 0.975


def test_a_demand_that_the_reward_meets_alone_is_not_planned_for():
    r_pk, g_pkm = draw(np.random.default_rng(6), 64, 32, correlation=0.6)
    plan = plan_sizes(Pilot.measure(rows_of(r_pk, g_pkm, -0.5)), asked(0.1))
    assert "lambda* is 0" in plan.reasons[0]


def test_too_few_responses_for_the_tilt_are_said():
    r_pk, g_pkm = draw(np.random.default_rng(7), 64, 64)
    pilot = Pilot.measure(rows_of(r_pk, g_pkm, 0.4, beta=0.6))
    assert pilot.kl > 1
    plan = plan_sizes(pilot, asked(0.3, n_responses=8))
    assert any("cannot carry a KL" in reason for reason in plan.reasons)
    assert plan_sizes(pilot, asked(0.3)).n_responses >= math.exp(pilot.kl / 0.35)


def test_small_pilots_are_not_trusted():
    rows = rows_of(*draw(np.random.default_rng(8), 20, 6), 0.2)
    reasons = plan_sizes(Pilot.measure(rows), asked(0.1)).reasons
    assert any("20 prompts of the pilot" in reason for reason in reasons)
    assert any("has 6 responses" in reason for reason in reasons)


def test_rows_that_say_nothing_are_refused():
    rows = rows_of(*draw(np.random.default_rng(9), 6, 4), 0.1)
    with pytest.raises(InputError, match="1 response"):
        replace(rows, counts_p=np.array([1, 7, 4, 4, 4, 4]))
    with pytest.raises(InputError, match="at least 4"):
        replace(rows, counts_p=np.array([12, 12]))


def test_equalities_are_planned_for_like_bounds():
    r_pk, g_pkm = draw(np.random.default_rng(10), 64, 32)
    bound, equal = (Pilot.measure(rows_of(r_pk, g_pkm, 0.4, equal=equal)) for equal in (False, True))
    np.testing.assert_allclose(equal.moments.between_mm, bound.moments.between_mm, rtol=1e-6)
    np.testing.assert_allclose(equal.bias_at(32), bound.bias_at(32), rtol=1e-6)


def test_topping_up_grows_within_the_limits_and_ends():
    pilot = Pilot.measure(rows_of(*draw(np.random.default_rng(11), 64, 32), 0.4, relative=False))
    drawn = {"drawn_prompts": 64, "drawn_responses": 32}
    n_prompts, n_responses = top_up(pilot, asked(0.06, **drawn, most_prompts=5000, most_responses=512))
    assert 64 <= n_prompts <= 256
    assert 32 <= n_responses <= 128
    assert n_prompts * n_responses > 64 * 32
    assert top_up(pilot, asked(0.06, **drawn, most_prompts=64, most_responses=512)) == (64, 64)
    assert top_up(pilot, asked(0.06, **drawn, most_prompts=64, most_responses=32)) is None
    assert top_up(pilot, asked(5.0, **drawn, most_prompts=5000, most_responses=512)) is None
