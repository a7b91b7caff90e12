from __future__ import annotations

import math
import re

import numpy as np
import pytest
from helpers.dual_problems import GaussianPopulation, draw_scores

from stage1_dual.dual import (
    LIMITS,
    DualProblem,
    Trust,
    climb_ladder,
    diagnose,
    judge_trust,
    predict_heldout,
    solve_dual,
)

pytestmark = pytest.mark.slow


def _judge(problem: DualProblem, heldout: DualProblem | None = None) -> Trust:
    solution = solve_dual(problem)
    return judge_trust(
        problem,
        solution,
        diagnostics=diagnose(problem, solution),
        ladder=climb_ladder(problem, solution),
        heldout=None if heldout is None else predict_heldout(heldout, solution.multipliers),
    )


def _draw(*, n_prompts: int = 300, n_responses: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return GaussianPopulation().draw(np.random.default_rng(seed), n_prompts=n_prompts, n_responses=n_responses)


def _problem(r_pk: np.ndarray, g_pk: np.ndarray, *, margin: float = 0.3, beta: float = 1.0) -> DualProblem:
    return DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + margin, beta=beta)


def test_a_mild_tilt_with_many_responses_is_ok() -> None:
    trust = _judge(_problem(*_draw()), _problem(*_draw(seed=1)))
    assert trust.verdict == "ok"
    assert trust.reasons == ()
    assert trust.advice == ()
    assert all(value <= LIMITS[name][0] for name, value in trust.signs.items())


def test_scores_of_sd_6_at_beta_a_tenth_are_unreliable_and_the_advice_is_sufficient() -> None:
    r_pk, g_pk = _draw(n_prompts=400)
    problem = _problem(6 * r_pk, 6 * g_pk, margin=3.0, beta=0.1)
    trust = _judge(problem)
    assert trust.verdict == "unreliable"
    found = re.match(r"raise beta from 0.1 to about ([\d.]+)", trust.advice[0])
    assert found
    assert _judge(problem.with_beta(float(found[1]) * 1.05)).verdict != "unreliable"
    assert "more responses than 128 a prompt will hardly do" in trust.advice[1]


def test_advice_does_not_begin_with_an_alternative_to_nothing() -> None:
    r_pk, g_pk = _draw(n_responses=12)
    trust = _judge(_problem(r_pk, g_pk, margin=0.6))
    # Only the multiplier drifts: beta is not advised on, and responses stand alone.
    assert trust.signs["drift"] > LIMITS["drift"][0]
    assert not any("beta" in text for text in trust.advice)
    assert re.fullmatch(r"draw about \d+ responses a prompt instead of 12", trust.advice[0])


def test_advice_on_responses_is_of_the_right_size() -> None:
    r_pk, g_pk = _draw(n_prompts=400, n_responses=24)
    trust = _judge(_problem(r_pk, g_pk, beta=0.42))
    assert trust.verdict == "weak"
    found = re.match(r"or draw about (\d+) responses a prompt instead of 24", trust.advice[1])
    assert found
    more = _judge(_problem(*_draw(n_prompts=400, n_responses=int(2 * float(found[1]))), beta=0.42))
    assert more.signs["kl_share"] < LIMITS["kl_share"][0]
    assert more.signs["drift"] < LIMITS["drift"][0]


@pytest.mark.parametrize(
    ("sign", "change"),
    [
        ("ess_fraction_below_2", {"beta": 0.2}),
        ("kl_share", {"beta": 0.35}),
        ("drift", {"n_responses": 6}),
        ("few_prompts", {"n_prompts": 20}),
    ],
)
def test_each_sign_is_seen(sign: str, change: dict[str, float]) -> None:
    sizes = {key: int(value) for key, value in change.items() if key != "beta"}
    trust = _judge(_problem(*_draw(**sizes), beta=change.get("beta", 1.0)))
    assert trust.signs[sign] > LIMITS[sign][0]
    assert trust.verdict != "ok"
    assert trust.reasons


def test_held_out_prompts_that_violate_weaken_the_verdict() -> None:
    r_pk, g_pk = _draw()
    problem = _problem(r_pk, g_pk)
    # Other prompts on which the reference is worse: an absolute threshold does not move with them.
    scale = float(problem.score_scale_m[0])
    for shift, verdict in ((-0.15, "weak"), (-1.0, "unreliable")):
        other_r, other_g = _draw(seed=2)
        other = DualProblem.from_arrays(
            other_r, other_g - other_g.mean() + g_pk.mean() + shift, thresholds=problem.thresholds_m, beta=1.0
        )
        trust = _judge(problem, other)
        assert trust.verdict == verdict
        assert trust.signs["heldout_violation"] == pytest.approx(-shift / scale, abs=0.15)
        assert "held-out" in trust.reasons[0]
        assert trust.advice == ("use more train prompts than 300",)


def test_thresholds_out_of_reach_of_half_the_responses_are_unreliable() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=100, n_responses=16, n_constraints=1, seed=2)
    best = float(np.mean(np.max(g_pkm[..., 0], axis=1)))
    trust = _judge(DualProblem.from_arrays(r_pk, g_pkm, thresholds=best - 0.05, beta=1.0))
    assert math.isinf(trust.signs["drift"])
    assert trust.verdict == "unreliable"
    assert any("out of reach" in reason for reason in trust.reasons)


def test_no_tilt_asks_for_nothing() -> None:
    r_pk, g_pk = _draw(n_prompts=40, n_responses=2)
    trust = _judge(DualProblem.from_arrays(0 * r_pk, g_pk, thresholds=-10.0, beta=1.0))
    assert math.isnan(trust.signs["drift"])
    assert math.isnan(trust.signs["pareto_k_fraction"])
    assert trust.verdict == "ok"


def test_an_equality_is_violated_on_either_side() -> None:
    r_pk, g_pk = _draw(n_prompts=200, n_responses=64)
    heldout = _problem(*_draw(n_prompts=200, n_responses=64, seed=1))
    problem = _problem(r_pk, g_pk).with_equalities([True])
    lam = solve_dual(problem).multipliers
    reached = predict_heldout(heldout, lam).constraints
    for off, violated in ((0.0, False), (0.5, True), (-0.5, True)):
        there = heldout.with_thresholds(reached + off).with_equalities([True])
        sign = _judge(problem, there).signs["heldout_violation"]
        assert (sign > 0) == violated
        # Of a bound, a mean that lies above its threshold is no violation.
        bound = there.with_equalities([False])
        judged = judge_trust(
            bound,
            solution := solve_dual(problem),
            diagnostics=diagnose(problem, solution),
            ladder=climb_ladder(problem, solution),
            heldout=predict_heldout(bound, lam),
        )
        assert (judged.signs["heldout_violation"] > 0) == (off > 0)


def test_too_strong_a_tilt_under_a_kl_budget_is_answered_with_a_smaller_budget() -> None:
    r_pk, g_pk = _draw(n_prompts=100, n_responses=16)
    trust = _judge(_problem(r_pk, g_pk, margin=0.1).with_kl_budget(0.95))
    assert trust.verdict != "ok"
    (advice,) = [line for line in trust.advice if "KL budget" in line]
    lower = float(re.search(r"from 0\.95 to about ([\d.]+) nats", advice).group(1))  # type: ignore[union-attr]
    assert _judge(_problem(r_pk, g_pk, margin=0.1).with_kl_budget(0.95 * lower)).signs["ess_fraction_below_2"] <= 0.05
