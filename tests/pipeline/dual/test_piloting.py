"""What a pilot says of each kind of statistic, against runs that are drawn again and again from a known population."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.scored_rows import Rows

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.constraint_text import read_constraints
from pipeline.contracts.errors import InputError
from pipeline.contracts.statistics import Statistic
from pipeline.dual.piloting import measure_pilot
from pipeline.dual.posing import pose
from stage1_dual.dual import solve_dual

BETA = 1.5
N_PROMPTS, N_RESPONSES = 120, 24


def population() -> Rows:
    """300 prompts of 200 responses, which is the truth that runs are drawn from with replacement."""
    rng = np.random.default_rng(21)
    prompt_n = np.repeat(np.arange(300), 200)
    often_n = np.repeat(rng.beta(0.8, 1.6, 300), 200)
    unsafe_n = rng.random(len(prompt_n)) < often_n
    claims_n = 1.0 + rng.poisson(3.0, len(prompt_n))
    kind_n = np.array(["a", "b", "c"], dtype=object)[prompt_n % 3]
    scores = {
        "g": rng.normal(size=len(prompt_n)) - 1.5 * unsafe_n,
        "claims": claims_n,
        "errors": rng.binomial(claims_n.astype(int), np.where(unsafe_n, 0.4, 0.15)).astype(float),
    }
    return Rows(prompt_n, rng.normal(size=len(prompt_n)) + 0.5 * unsafe_n, scores, {"kind": kind_n})


def drawn(rows: Rows, rng: np.random.Generator, n_prompts: int, n_responses: int) -> Rows:
    prompt_p = rng.integers(300, size=n_prompts)
    take = (prompt_p[:, None] * 200 + rng.integers(200, size=(n_prompts, n_responses))).ravel()
    return Rows(
        np.repeat(np.arange(n_prompts), n_responses),
        rows.reward_n[take],
        {name: value_n[take] for name, value_n in rows.scores.items()},
        {name: value_n[take] for name, value_n in rows.columns.items()},
    )


def value(rows: Rows, statistic: Statistic, weight_n: FloatArray) -> float:
    found = rows.statistic_columns(statistic)
    return float(
        weight_n
        @ found.u_n
        / (1.0 if found.h_n is None else weight_n @ found.h_n)
        / (weight_n.sum() if found.h_n is None else 1.0)
    )


@pytest.mark.parametrize(
    "text",
    [
        "g >= ref + 0.35",
        "share(g >= -1) >= 0.82",
        "share(g >= -1) >= ref + 0.1",
        "shortfall(g, 0) <= ref - 0.15",
        "errors per claims <= ref - 0.03",
        "errors per claims <= 0.19",
        "g[kind=a] >= ref + 0.3",
        "g = -0.2",
    ],
)
def test_errors_are_those_of_the_statistic_in_the_population(text):
    """The spread of the slack over 100 runs, which is known to 7%, and its mean."""
    truth, (constraint,) = population(), read_constraints([text])
    uniform_n = np.full(len(truth.prompt_n), 1.0)
    demanded = constraint.absolute_threshold(value(truth, constraint.statistic, uniform_n))
    rng = np.random.default_rng(5)
    slacks = []
    for _ in range(100):
        posed = pose(drawn(truth, rng, N_PROMPTS, N_RESPONSES), constraints=[constraint], beta=BETA)
        solution = solve_dual(posed.problem)
        column_n = truth.statistic_columns(constraint.statistic).less(posed.plan.ratios[0]) * constraint.sign
        logit = ((truth.reward_n + solution.multipliers[0] * column_n) / BETA).reshape(300, 200)
        weight = np.exp(logit - logit.max(axis=1, keepdims=True))
        weight_n = (weight / weight.sum(axis=1, keepdims=True)).ravel()
        slacks.append(constraint.sign * (value(truth, constraint.statistic, weight_n) - demanded))
    pilot = measure_pilot(pose(drawn(truth, rng, 600, 48), constraints=[constraint], beta=BETA))
    prediction = pilot.predict(N_RESPONSES)
    error = prediction.errors_m(N_PROMPTS)[0]
    assert np.std(slacks, ddof=1) == pytest.approx(error, rel=0.2)
    assert np.mean(slacks) == pytest.approx(prediction.offset_m[0], abs=0.35 * error)


def test_a_tail_is_refused_with_what_to_do_instead():
    (constraint,) = read_constraints(["cvar(g, 0.1) >= -4"])
    with pytest.raises(InputError, match="share or a shortfall instead"):
        measure_pilot(pose(population(), constraints=[constraint], beta=BETA))


def test_units_are_the_users_whatever_the_scale_and_the_direction():
    rng = np.random.default_rng(6)
    rows = drawn(population(), rng, 80, 24)
    larger = Rows(rows.prompt_n, rows.reward_n, {"g": -10.0 * rows.scores["g"]}, {})
    (plain,), (turned,) = read_constraints(["g >= ref + 0.3"]), read_constraints(["g <= ref - 3"])
    one = measure_pilot(pose(rows, constraints=[plain], beta=BETA)).predict(32)
    ten = measure_pilot(pose(larger, constraints=[turned], beta=BETA)).predict(32)
    np.testing.assert_allclose(ten.errors_m(100), 10 * one.errors_m(100), rtol=1e-6)
    np.testing.assert_allclose(ten.offset_m, 10 * one.offset_m, rtol=1e-6)
