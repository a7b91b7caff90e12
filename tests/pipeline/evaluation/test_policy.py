"""The evaluation on populations where every quantity is known."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.solutions import bound, build_solution

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.contracts.statistics import Statistic
from pipeline.dual.solving import build_problem
from pipeline.evaluation import evaluate_policy, judge, predict_tilt
from pipeline.scoring.joined import JoinedScores
from stage1_dual.dual import tilt


def joined(reward, scores, *, names=("g", "h"), category=None):
    """Scored samples of prompts p0, p1, ...: a list of rewards (k_p,), a list of scores (k_p, s)."""
    counts = [len(r_k) for r_k in reward]
    return JoinedScores(
        prompt_ids=tuple(f"p{place:04d}" for place in range(len(counts))),
        prompt_n=np.repeat(np.arange(len(counts)), counts),
        sample_index_n=np.concatenate([np.arange(count) for count in counts]),
        reward_n=np.concatenate(list(reward)),
        score_names=tuple(names[: scores[0].shape[1]]),
        scores_ns=np.concatenate(list(scores)),
        cut_off_n=np.zeros(sum(counts), dtype=bool),
        prompt_columns={} if category is None else {"category": np.array(category)},
    )


def solution(*multipliers, beta=1.0, names=("g",), directions=(">=",), statistics=None):
    """The evaluation's own thresholds are given to it; of the solution it reads the rest."""
    bounds = []
    for name, way, lam, statistic in zip(
        names, directions, multipliers, statistics or (None,) * len(names), strict=True
    ):
        changes = {}
        if statistic is not None:
            changes = {
                "score": statistic.score,
                "statistic": statistic.to_document(),
                "certified_at": -1.0 if statistic.kind == "cvar" else None,
                "column_ratio": 0.0 if statistic.is_ratio else None,
                "column_threshold": 0.0,
            }
        direction = "<=" if statistic is not None and statistic.kind == "shortfall" else way
        bounds.append(bound(name, direction, multiplier=lam, **changes))
    return build_solution(*bounds, beta=beta, reward="r")


def discrete_world(rng, n_prompts=60, n_outcomes=6):
    """Prompts with a few enumerable responses: reward (p, o), constraint (p, o), uniform reference policy."""
    level_p = rng.normal(size=(n_prompts, 1))
    reward_po = level_p + rng.normal(size=(n_prompts, n_outcomes))
    score_po = 3 * level_p + rng.normal(size=(n_prompts, n_outcomes))
    return reward_po, score_po


def draw(rng, reward_po, score_po, policy_po, n):
    reward, scores, outcomes = [], [], []
    for r_o, g_o, pi_o in zip(reward_po, score_po, policy_po, strict=True):
        drawn = rng.choice(len(r_o), size=n, p=pi_o)
        outcomes.append(drawn)
        reward.append(r_o[drawn])
        scores.append(g_o[drawn][:, None])
    return joined(reward, scores), outcomes


def gibbs(reward_po, score_po, lam, beta):
    logit = (reward_po + lam * score_po) / beta
    weight = np.exp(logit - logit.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def enumerate_all(reward_po, score_po):
    return joined(list(reward_po), [g[:, None] for g in score_po])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exact_tilted_policy_closes_all_and_the_reference_closes_nothing(sign):
    """D - L is exactly beta KL, so the fraction is 1 at the tilt and 0 at the reference.

    Every response of the world is repeated often enough for the correction for a finite sample to vanish; the tilted
    policy is given by its exact means.
    """
    rng = np.random.default_rng(0)
    reward_po, score_po = (np.repeat(values, 2000, axis=1) for values in discrete_world(rng))
    lam, beta = 0.7, 0.9
    tilt_po = gibbs(reward_po, sign * score_po, lam, beta)
    kl_p = (tilt_po * np.log(tilt_po * tilt_po.shape[1])).sum(axis=1)
    exact = joined(
        [np.array([value]) for value in (tilt_po * reward_po).sum(axis=1)],
        [np.array([[value]]) for value in (tilt_po * score_po).sum(axis=1)],
    )
    reference = enumerate_all(reward_po, score_po)
    direction = ">=" if sign > 0 else "<="
    arguments = {
        "reference": reference,
        "solution": solution(lam, beta=beta, directions=(direction,)),
        "constraints": [Constraint("g", direction, threshold=0.3)],
        "n_replicates": 200,
        "rng": rng,
    }
    at_tilt = evaluate_policy(policy=exact, log_ratio_n=kl_p, **arguments)
    assert at_tilt["lagrangian"]["closed_fraction"] == pytest.approx(1, abs=1e-3)
    assert at_tilt["reward"]["predicted"] == pytest.approx(at_tilt["reward"]["realised"], abs=1e-12)
    assert at_tilt["constraints"][0]["predicted"] == pytest.approx(at_tilt["constraints"][0]["realised"], abs=1e-12)
    assert at_tilt["kl"]["predicted"] == pytest.approx(at_tilt["kl"]["realised"], abs=1e-12)
    at_reference = evaluate_policy(policy=reference, log_ratio_n=np.zeros(60 * 12_000), **arguments)
    assert at_reference["lagrangian"]["closed_fraction"] == pytest.approx(0, abs=1e-12)


def test_closed_fraction_of_a_policy_halfway_in_logits_matches_enumeration():
    rng = np.random.default_rng(1)
    reward_po, score_po = discrete_world(rng, n_prompts=400)
    lam, beta = 0.5, 1.0
    half_po = gibbs(reward_po / 2, score_po / 2, lam, beta)
    policy, outcomes = draw(rng, reward_po, score_po, half_po, 64)
    log_ratio = [np.log(6 * pi_o[drawn]) for pi_o, drawn in zip(half_po, outcomes, strict=True)]
    result = evaluate_policy(
        reference=enumerate_all(np.repeat(reward_po, 200, axis=1), np.repeat(score_po, 200, axis=1)),
        policy=policy,
        log_ratio_n=np.concatenate(log_ratio),
        solution=solution(lam, beta=beta),
        constraints=[Constraint("g", ">=", margin=0.2)],
        n_replicates=500,
        rng=rng,
    )
    total_po = reward_po + lam * score_po
    attained = (half_po * (total_po - beta * np.log(6 * half_po))).sum(axis=1).mean()
    optimum = (beta * np.log(np.exp(total_po / beta).mean(axis=1))).mean()
    expected = (attained - total_po.mean()) / (optimum - total_po.mean())
    low, high = result["lagrangian"]["closed_fraction_ci95"]
    assert low < expected < high
    assert high - low < 0.1


def test_the_optimum_is_not_biased_by_few_responses():
    """On Gaussian scores log E exp(s / beta) is known: the correction must remove most of the plug-in's bias."""
    rng = np.random.default_rng(5)
    n_prompts, n_responses, sd = 4000, 64, 1.3
    reward = sd * rng.normal(size=(n_prompts, n_responses))
    samples = joined(list(reward), list(np.zeros((n_prompts, n_responses, 1))))
    predicted = predict_tilt(samples, solution=solution(0.0), thresholds_m=np.zeros(1))
    known = sd**2 / 2
    plug_in = np.log(np.exp(reward).mean(axis=1))
    plug_in_bias = plug_in.mean() - known
    assert plug_in_bias < -0.02
    corrected_bias = predicted.optimum_p.mean() - known
    assert abs(corrected_bias) < abs(plug_in_bias) / 2


@pytest.mark.parametrize("logits", [[0.0], [3.0, 3.0], [800.0, -800.0], [-1e4, 0.0, 1e4]])
def test_the_correction_survives_single_and_extreme_responses(logits):
    samples = joined([np.array(logits)] * 2, [np.zeros((len(logits), 1))] * 2)
    predicted = predict_tilt(samples, solution=solution(0.0), thresholds_m=np.zeros(1))
    largest = max(logits)
    assert (predicted.optimum_p <= largest + 0.5 + 1e-12).all()
    assert (predicted.optimum_p >= largest - np.log(len(logits)) - 1e-12).all()


@pytest.mark.parametrize(
    ("interval", "direction", "expected"),
    [
        ((0.1, 0.3), ">=", "satisfied"),
        ((0.0, 0.3), ">=", "satisfied"),
        ((-0.1, 0.3), ">=", "undecided"),
        ((-0.3, -0.1), ">=", "violated"),
        ((-0.3, -0.1), "<=", "satisfied"),
        ((-0.1, 0.3), "<=", "undecided"),
        ((0.1, 0.3), "<=", "violated"),
        ((-0.05, 0.1), "=", "satisfied"),
        ((-0.05, 0.2), "=", "undecided"),
        ((-0.3, 0.3), "=", "undecided"),
        ((0.11, 0.2), "=", "violated"),
        ((-0.2, -0.11), "=", "violated"),
    ],
)
def test_verdicts(interval, direction, expected):
    assert judge(interval, 0.0, direction, tolerance=0.1 if direction == "=" else 0.0) == expected


def populations(rng, n_prompts=80, n_responses=40):
    """A reference and a policy whose scores are one higher on the prompts of category x; h is 1, 2, 3 in turn."""
    scores = [
        np.column_stack([rng.normal(size=n_responses), 1.0 + np.arange(n_responses) % 3]) for _ in range(n_prompts)
    ]
    category = ["x" if place % 4 == 0 else "y" for place in range(n_prompts)]
    better = [s_k + np.array([float(kind == "x"), 0.0]) for s_k, kind in zip(scores, category, strict=True)]
    zeros = [np.zeros(n_responses)] * n_prompts
    return joined(zeros, scores, category=category), joined(zeros, better, category=category)


WHERE_X = (("category", ("x",)),)


@pytest.mark.parametrize(
    ("statistic", "value"),
    [
        (Statistic("g", "share", at_least=0.0), lambda g, h, x: np.mean(g >= 0)),
        (Statistic("g", "share", at_most=0.5), lambda g, h, x: np.mean(g <= 0.5)),
        (Statistic("g", "shortfall", below=-1.0), lambda g, h, x: np.mean(np.maximum(-1 - g, 0))),
        (Statistic("g", where=WHERE_X), lambda g, h, x: g[x].mean()),
        (Statistic("g", "share", at_least=0.0, where=WHERE_X), lambda g, h, x: np.mean(g[x] >= 0)),
        (Statistic("g", per="h"), lambda g, h, x: g.mean() / h.mean()),
        (Statistic("g", "cvar", level=0.05), lambda g, h, x: np.sort(g.ravel())[: g.size // 20].mean()),
        (
            Statistic("g", "cvar", level=0.1, where=WHERE_X),
            lambda g, h, x: np.sort(g[x].ravel())[: g[x].size // 10].mean(),
        ),
    ],
)
def test_each_statistic_is_judged_as_itself(statistic, value):
    """By its definition on the raw scores of both policies."""
    rng = np.random.default_rng(8)
    reference, policy = populations(rng)
    entry = evaluate_policy(
        reference=reference,
        policy=policy,
        log_ratio_n=np.zeros(policy.n_samples),
        solution=solution(0.0, statistics=(statistic,)),
        constraints=[
            Constraint("g", "<=" if statistic.kind == "shortfall" else ">=", margin=0.0, statistic=statistic)
        ],
        n_replicates=100,
        rng=rng,
    )["constraints"][0]
    x = np.arange(80) % 4 == 0
    for rows, key in ((reference, "reference"), (policy, "realised"), (reference, "predicted")):
        g, h = (rows.score_n(name).reshape(80, 40) for name in ("g", "h"))
        assert entry[key] == pytest.approx(value(g, h, x), abs=1e-12), key
    assert entry["n_prompts"] == (20 if statistic.where else 80)
    assert entry["ci95"][0] - 1e-12 <= entry["realised"] <= entry["ci95"][1] + 1e-12


def test_a_share_without_an_exception_is_not_certain():
    """40 prompts without one bad response: the interval reaches below 1, and a demand of 0.999 stays undecided."""
    rows = joined([np.zeros(16)] * 40, [np.ones((16, 1))] * 40)
    statistic = Statistic("g", "share", at_least=0.0)
    entry = evaluate_policy(
        reference=rows,
        policy=rows,
        log_ratio_n=np.zeros(640),
        solution=solution(0.0, statistics=(statistic,)),
        constraints=[Constraint("g", ">=", threshold=0.999, statistic=statistic)],
        n_replicates=100,
        rng=np.random.default_rng(0),
    )["constraints"][0]
    assert entry["realised"] == 1.0 == entry["ci95"][1]
    assert entry["ci95"][0] < 0.95
    assert entry["status"] == "undecided"


@pytest.mark.parametrize(("tolerance", "status"), [(None, "satisfied"), (0.001, "undecided")])
def test_an_equality_is_met_within_its_tolerance(tolerance, status):
    """Without one it is a tenth of a standard deviation of the column."""
    rng = np.random.default_rng(9)
    reference, _ = populations(rng, n_prompts=100, n_responses=64)
    entry = evaluate_policy(
        reference=reference,
        policy=reference,
        log_ratio_n=np.zeros(6400),
        solution=solution(-0.0, directions=("=",)),
        constraints=[Constraint("g", "=", threshold=0.0, tolerance=tolerance)],
        n_replicates=100,
        rng=rng,
    )["constraints"][0]
    assert entry["tolerance"] == (pytest.approx(0.1, rel=0.05) if tolerance is None else tolerance)
    assert entry["status"] == status


def test_the_worst_constraint_is_the_status():
    rng = np.random.default_rng(3)
    ones = [np.ones(4) for _ in range(20)]
    scores = [np.column_stack([np.ones(4), np.ones(4)]) + 0.01 * rng.normal(size=(4, 2)) for _ in range(20)]
    result = evaluate_policy(
        reference=joined(ones, scores, names=("a", "b")),
        policy=joined(ones, scores, names=("a", "b")),
        log_ratio_n=np.zeros(80),
        solution=solution(0.0, 0.0, names=("a", "b"), directions=(">=", "<=")),
        constraints=[Constraint("a", ">=", threshold=0.5), Constraint("b", "<=", threshold=0.5)],
        n_replicates=100,
        rng=rng,
    )
    assert [entry["status"] for entry in result["constraints"]] == ["satisfied", "violated"]
    assert result["status"] == "violated"
    assert result["constraints"][1]["slack"] == pytest.approx(-0.5, abs=0.02)
    assert result["lagrangian"]["closed_fraction"] is None  # constant reward, no multiplier: nothing to close


@pytest.mark.parametrize(("budget", "status"), [(0.7, "satisfied"), (0.5, "undecided"), (0.3, "violated")])
def test_a_kl_budget_is_judged_beside_the_constraints(budget, status):
    rng = np.random.default_rng(10)
    reference, _ = populations(rng)
    result = evaluate_policy(
        reference=reference,
        policy=reference,
        log_ratio_n=0.5 + 0.5 * rng.normal(size=80).repeat(40),
        solution=solution(0.0).model_copy(update={"kl_budget": budget}),
        constraints=[Constraint("g", ">=", threshold=-1.0)],
        n_replicates=100,
        rng=rng,
    )
    assert (result["kl"]["budget"], result["kl"]["status"]) == (budget, status)
    assert result["constraints"][0]["status"] == "satisfied"
    assert result["status"] == status


def test_predict_tilt_without_multiplier_at_large_beta_is_the_reference():
    rng = np.random.default_rng(4)
    samples = joined([rng.normal(size=8) for _ in range(5)], [rng.normal(size=(8, 1)) for _ in range(5)])
    predicted = predict_tilt(samples, solution=solution(0.0, beta=1e9), thresholds_m=np.zeros(1))
    assert predicted.reward == pytest.approx(samples.reward_n.mean(), abs=1e-8)
    assert predicted.kl == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("direction", [">=", "<="])
def test_the_prediction_is_that_of_the_dual(direction):
    """Worked out apart from the dual's kernels, by the same formula."""
    rng = np.random.default_rng(6)
    samples = joined([rng.normal(size=k) for k in (3, 8, 5, 40)], [rng.normal(size=(k, 1)) for k in (3, 8, 5, 40)])
    constraint = Constraint("g", direction, threshold=0.3)
    predicted = predict_tilt(
        samples, solution=solution(0.7, beta=0.8, directions=(direction,)), thresholds_m=np.array([0.3])
    )
    dual = tilt(build_problem(samples, constraints=[constraint], beta=0.8), np.array([0.7]))
    assert predicted.reward == pytest.approx(dual.reward_p.mean(), abs=1e-13)
    assert predicted.constraints == pytest.approx(constraint.sign * dual.scores_mp.mean(axis=1), abs=1e-13)
    assert predicted.kl == pytest.approx(dual.kl_p.mean(), abs=1e-13)


TWO = joined([np.zeros(2)] * 2, [np.zeros((2, 1))] * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy": joined([np.zeros(2)], [np.zeros((2, 1))])},
            "the 2 test prompts of the reference are not the 1 of",
        ),
        ({"policy": replace(TWO, prompt_ids=("p0000", "p0002"))}, "of the reference are not the 2 of the policy"),
        ({"reference": replace(TWO, prompt_n=np.zeros(4, int))}, "a test prompt has no samples of the reference"),
        ({"log_ratio_n": np.zeros(3)}, "3 log-ratios are given for 4 samples"),
        ({"solution": solution(0.0, names=("h",))}, "the constraints g are judged; those of the solution are h"),
    ],
)
def test_malformed_inputs_are_refused(changes, message):
    arguments = {
        "reference": TWO,
        "policy": TWO,
        "log_ratio_n": np.zeros(4),
        "solution": solution(0.0),
        "constraints": [Constraint("g", ">=", threshold=0.5)],
        "n_replicates": 100,
        "rng": np.random.default_rng(0),
    }
    evaluate_policy(**arguments)
    with pytest.raises(InputError, match=message):
        evaluate_policy(**{**arguments, **changes})
