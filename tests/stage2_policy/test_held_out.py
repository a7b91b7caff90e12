from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stage2_policy.data import TrainingResponses, segment_softmax
from stage2_policy.held_out import HeldOutEstimate, estimate_held_out, rounding_cost
from stage2_policy.token_sequences import TokenSequences

BETA = 0.5


@pytest.fixture
def responses() -> TrainingResponses:
    rng = np.random.default_rng(0)
    prompt_p = np.repeat([0, 1, 2], [5, 20, 9])
    tilt = rng.normal(size=34)
    return TrainingResponses(
        prompt_ids=("a", "b", "c"),
        prompt_p=prompt_p,
        sample_index=np.concatenate([np.arange(count) for count in (5, 20, 9)]),
        sequences=TokenSequences.of([([1], [2])] * 34),
        weight=segment_softmax(tilt / BETA, prompt_p),
        tilt=tilt,
        sampler_logp=np.zeros(34),
    )


def test_noise_in_the_log_probabilities_costs_its_share_of_the_closed_fraction() -> None:
    rng = np.random.default_rng(0)
    n_prompts, k, beta = 400, 64, 0.5
    prompt_p = np.repeat(np.arange(n_prompts), k)
    score = 0.8 * rng.standard_normal(len(prompt_p))
    logp = -10 + rng.standard_normal(len(prompt_p))
    error = 0.3 * rng.standard_normal(len(prompt_p)) + 5 * rng.standard_normal(n_prompts)[prompt_p]
    responses = TrainingResponses(
        prompt_ids=tuple(str(place) for place in range(n_prompts)),
        prompt_p=prompt_p,
        sample_index=np.tile(np.arange(k), n_prompts),
        sequences=TokenSequences.of([([1], [2])] * len(prompt_p)),
        weight=segment_softmax(score, prompt_p),
        tilt=beta * score,
        sampler_logp=logp - error,
    )
    judged = estimate_held_out(responses, logp=logp + score + error, ref_logp=logp, beta=beta).closed_fraction
    cost = rounding_cost(responses, ref_logp=logp, beta=beta)
    assert cost == pytest.approx(1 - judged, rel=0.1)
    assert 0.1 < cost < 0.2


def test_reference_closes_nothing_and_the_tilted_weights_everything(responses: TrainingResponses) -> None:
    ref_logp = np.random.default_rng(1).normal(size=34)
    reference = estimate_held_out(responses, logp=ref_logp, ref_logp=ref_logp, beta=BETA)
    log_ratio = np.log(responses.weight * responses.n_samples)
    tilted = estimate_held_out(responses, logp=ref_logp + log_ratio, ref_logp=ref_logp, beta=BETA)

    assert reference.closed_fraction == pytest.approx(0, abs=1e-12)
    assert reference.kl == pytest.approx(0, abs=1e-12)
    assert reference.ess_fraction == pytest.approx(1)
    assert tilted.closed_fraction == pytest.approx(1)
    assert tilted.ratio == pytest.approx(1)
    assert tilted.loss == pytest.approx(0, abs=1e-12)


def test_what_is_left_of_the_gap_is_the_divergence_to_the_tilted_weights(responses: TrainingResponses) -> None:
    logp = np.random.default_rng(3).normal(size=34)
    policy = segment_softmax(logp, responses.prompt_p)
    estimate = estimate_held_out(responses, logp=logp, ref_logp=np.zeros(34), beta=BETA)

    assert estimate.loss == pytest.approx(float(np.sum(policy * np.log(policy / responses.weight))) / 3)
    assert estimate.loss > 0


def test_lagrangian_is_the_dual_at_the_tilted_weights(responses: TrainingResponses) -> None:
    # D = beta E_x log mean_k exp(tilt / beta), by a plain loop.
    dual = np.mean(
        [BETA * np.log(np.mean(np.exp(responses.tilt[responses.prompt_p == place] / BETA))) for place in range(3)]
    )
    log_ratio = np.log(responses.weight * responses.n_samples)
    estimate = estimate_held_out(responses, logp=log_ratio, ref_logp=np.zeros(34), beta=BETA)

    assert estimate.lagrangian == pytest.approx(dual, abs=1e-12)


def test_the_standard_error_is_that_of_the_closed_fraction_over_prompts() -> None:
    """Against its spread over many draws of the prompts, which the delta method approximates."""
    rng = np.random.default_rng(5)
    n_prompts, n_samples = 60, 24
    found = []
    for _ in range(300):
        prompt_p = np.repeat(np.arange(n_prompts), n_samples)
        tilt = rng.normal(size=len(prompt_p)) * np.repeat(rng.uniform(0.3, 1.5, n_prompts), n_samples)
        one = TrainingResponses(
            prompt_ids=tuple(map(str, range(n_prompts))),
            prompt_p=prompt_p,
            sample_index=np.tile(np.arange(n_samples), n_prompts),
            sequences=TokenSequences.of([([1], [2])] * len(prompt_p)),
            weight=segment_softmax(tilt / BETA, prompt_p),
            tilt=tilt,
            sampler_logp=np.zeros(len(prompt_p)),
        )
        logp = 0.4 * tilt / BETA + rng.normal(size=len(prompt_p)) * 0.5
        found.append(estimate_held_out(one, logp=logp, ref_logp=np.zeros(len(prompt_p)), beta=BETA))
    spread = float(np.std([estimate.closed_fraction for estimate in found], ddof=1))
    errors = [estimate.closed_fraction_error or 0.0 for estimate in found]
    # 300 draws give the spread to 1 / sqrt(600), 4%; four of those.
    assert float(np.sqrt(np.mean(np.square(errors)))) == pytest.approx(spread, rel=0.16)


def test_one_prompt_has_no_standard_error_and_a_log_without_one_is_read(responses: TrainingResponses) -> None:
    estimate = estimate_held_out(responses, logp=np.arange(34.0) / 9, ref_logp=np.zeros(34), beta=BETA)
    assert estimate.closed_fraction_error is not None
    metrics = estimate.metrics("eval")
    assert HeldOutEstimate.from_metrics(metrics, "eval") == estimate
    del metrics["eval_closed_fraction_error"]
    assert HeldOutEstimate.from_metrics(metrics, "eval").closed_fraction_error is None
    one = replace(
        responses,
        prompt_ids=("a",),
        prompt_p=np.zeros(5, dtype=int),
        **{name: getattr(responses, name)[:5] for name in ("sample_index", "sequences", "weight", "tilt")},
        sampler_logp=np.zeros(5),
    )
    alone = estimate_held_out(one, logp=np.arange(5.0), ref_logp=np.zeros(5), beta=BETA)
    assert alone.closed_fraction_error is None
    assert "eval_closed_fraction_error" not in alone.metrics("eval")


def test_any_other_policy_closes_less_than_everything(responses: TrainingResponses) -> None:
    rng = np.random.default_rng(2)
    log_ratio = np.log(responses.weight * responses.n_samples)
    for scale in (0.1, 1.0, 3.0):
        logp = log_ratio + scale * rng.normal(size=34)
        estimate = estimate_held_out(responses, logp=logp, ref_logp=np.zeros(34), beta=BETA)
        assert estimate.closed_fraction < 1
