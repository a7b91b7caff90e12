"""The evaluation on populations where every quantity is known."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.solutions import bound, build_solution
from scipy import stats

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.dual.solving import build_problem
from pipeline.evaluation import evaluate_policy, judge, mean_interval, predict_tilt
from pipeline.scoring.joined import JoinedScores
from stage1_dual.dual import tilt


def joined(reward, scores):
    """Scored samples of prompts p0, p1, ...: a list of rewards (k_p,), a list of constraint scores (k_p, m)."""
    counts = [len(r_k) for r_k in reward]
    return JoinedScores(
        prompt_ids=tuple(f"p{place:04d}" for place in range(len(counts))),
        prompt_n=np.repeat(np.arange(len(counts)), counts),
        sample_index_n=np.concatenate([np.arange(count) for count in counts]),
        reward_n=np.concatenate(list(reward)),
        score_names=("g",),
        scores_ns=np.concatenate(list(scores)),
        cut_off_n=np.zeros(sum(counts), dtype=bool),
    )


def solution(*multipliers, beta=1.0, names=("g",), directions=(">=",)):
    """The evaluation's own thresholds are given to it; of the solution it reads the rest."""
    entries = zip(names, directions, multipliers, strict=True)
    return build_solution(*(bound(name, way, multiplier=lam) for name, way, lam in entries), beta=beta, reward="r")


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


def test_paired_intervals_are_tighter_and_cover():
    """Prompts differ by far more than the policy gains: pairing must remove that, and 95% must mean 95%."""
    rng = np.random.default_rng(2)
    covered, paired_width, plain_width = 0, [], []
    repeats = 300
    for _ in range(repeats):
        level_p = 3 * rng.normal(size=50)
        ref_p, pol_p = level_p + 0.1 * rng.normal(size=50), level_p + 0.5 + 0.1 * rng.normal(size=50)
        low, high = mean_interval(pol_p - ref_p)
        covered += low <= 0.5 <= high
        paired_width.append(high - low)
        plain_width.append(np.diff(mean_interval(pol_p))[0])
    assert abs(covered - 0.95 * repeats) < 4 * np.sqrt(0.95 * 0.05 * repeats)
    assert np.mean(paired_width) < 0.1 * np.mean(plain_width)


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
    ],
)
def test_verdicts(interval, direction, expected):
    assert judge(interval, 0.0, direction) == expected


def test_the_worst_constraint_is_the_status():
    rng = np.random.default_rng(3)
    ones = [np.ones(4) for _ in range(20)]
    scores = [np.column_stack([np.ones(4), np.ones(4)]) + 0.01 * rng.normal(size=(4, 2)) for _ in range(20)]
    result = evaluate_policy(
        reference=joined(ones, scores),
        policy=joined(ones, scores),
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


def test_an_interval_needs_two_prompts():
    with pytest.raises(InputError, match="at least 2 test prompts"):
        mean_interval(np.zeros(1))


@pytest.mark.parametrize("n_prompts", [2, 3, 10, 151, 100_000])
def test_interval_is_students_to_the_last_digit(n_prompts):
    value_p = np.random.default_rng(n_prompts).normal(size=n_prompts)
    half = float(stats.t.ppf(0.975, n_prompts - 1) * value_p.std(ddof=1) / np.sqrt(n_prompts))
    assert mean_interval(value_p) == [float(value_p.mean()) - half, float(value_p.mean()) + half]


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
