"""Moving a trained policy along the ray from the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import save_tiny_policy
from helpers.train_settings import changed
from transformers import AutoModelForCausalLM

from pipeline.contracts.errors import InputError
from stage2_policy.data import TrainingResponses, segment_softmax
from stage2_policy.expectations import corrected_means
from stage2_policy.logprobs import score_sequences
from stage2_policy.settings import TrainSettings
from stage2_policy.stretch import WIDEST, Change, matching_factor, values_to_match
from stage2_policy.token_sequences import TokenSequences
from stage2_policy.trainer import train_policy

pytestmark = pytest.mark.slow

SETTINGS = TrainSettings(
    epochs=2,
    learning_rate=1e-3,
    tokens_per_step=300,
    tokens_per_microbatch=120,
    held_out_fraction=0.25,
    evaluations=1,
    match_prediction=True,
)


def draw_responses(rng: np.random.Generator, *, n_prompts: int = 200, k: int = 64) -> TrainingResponses:
    prompt_p = np.repeat(np.arange(n_prompts), k)
    tilt = rng.normal(size=n_prompts * k)
    return TrainingResponses(
        prompt_ids=tuple(f"{place:04d}" for place in range(n_prompts)),
        prompt_p=prompt_p,
        sample_index=np.tile(np.arange(k), n_prompts),
        sequences=TokenSequences.of([([1], [2])] * len(prompt_p)),
        weight=segment_softmax(tilt, prompt_p),
        tilt=tilt,
        sampler_logp=np.zeros(len(prompt_p)),
    )


@pytest.mark.parametrize("share", [0.8, 1.0, 1.25])
def test_a_policy_that_learnt_a_share_of_every_score_is_stretched_by_its_inverse(share: float) -> None:
    responses = draw_responses(np.random.default_rng(0))
    assert matching_factor(responses, share * responses.tilt, responses.tilt) == pytest.approx(1 / share, abs=1e-3)


def test_noise_in_the_log_ratios_is_not_amplified_beyond_the_mean_score() -> None:
    """Of log rho = a s + noise the factor restores E[s]: a Gaussian policy of variance one needs alpha a = 1."""
    rng = np.random.default_rng(1)
    responses = draw_responses(rng, n_prompts=800)
    log_ratio = 0.8 * responses.tilt + 0.3 * rng.normal(size=len(responses.tilt))
    assert matching_factor(responses, log_ratio, responses.tilt) == pytest.approx(1 / 0.8, abs=0.03)


@pytest.mark.parametrize(("slope", "factor"), [(0.1, WIDEST), (20.0, 1 / WIDEST)])
def test_the_factor_is_bounded(slope: float, factor: float) -> None:
    responses = draw_responses(np.random.default_rng(2))
    assert matching_factor(responses, slope * responses.tilt, responses.tilt) == factor


def test_equal_scores_ask_for_nothing() -> None:
    responses = draw_responses(np.random.default_rng(3), n_prompts=3)
    equal = replace(responses, tilt=np.zeros(len(responses.tilt)), weight=np.full(len(responses.tilt), 1 / 64))
    assert matching_factor(equal, np.random.default_rng(4).normal(size=len(equal.tilt)), equal.tilt) == 1.0


def pose(column_n: np.ndarray) -> TrainingResponses:
    """Responses whose s is the sum of some columns."""
    responses, tilt = draw_responses(np.random.default_rng(5)), column_n.sum(axis=1)
    return replace(responses, tilt=tilt, weight=segment_softmax(tilt, responses.prompt_p))


def test_a_constraint_that_is_learnt_less_than_the_reward_is_moved_to_its_prediction() -> None:
    column_n = np.random.default_rng(6).normal(size=(200 * 64, 2))
    responses, log_ratio = pose(column_n), column_n @ [1.0, 0.8]
    alpha = matching_factor(responses, log_ratio, values_to_match(responses, column_n, np.ones(2)))
    policy = segment_softmax(alpha * log_ratio, responses.prompt_p)
    means = [
        corrected_means(weight, responses.prompt_p, column_n[:, 1:]).mean() for weight in (policy, responses.weight)
    ]
    assert means[0] == pytest.approx(means[1], abs=1e-3)
    assert matching_factor(responses, log_ratio, responses.tilt) < alpha - 0.1


@pytest.mark.parametrize(
    "pull",
    [
        pytest.param([0.0, 0.3], id="a constraint that gains little"),
        pytest.param([-0.5, 0.5], id="one that holds what the reward would move"),
    ],
)
def test_constraints_that_gain_little_or_nothing_are_matched_with_the_reward(pull: list[float]) -> None:
    """What holds a score where it is has no gain to be matched: every factor meets a mean that nothing moves."""
    drawn = np.random.default_rng(7).normal(size=(200 * 64, 2))
    column_n = np.stack([drawn[:, 0], drawn @ pull], axis=1)
    responses = pose(column_n)
    np.testing.assert_allclose(values_to_match(responses, column_n, np.ones(2)), responses.tilt)


def test_weights_move_along_the_ray(tmp_path: Path) -> None:
    for seed, name in enumerate(("reference", "policy")):
        torch.manual_seed(seed)
        save_tiny_policy(tmp_path / name)
    reference, policy, moved = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("reference", "policy", "policy")
    )
    Change(moved, reference).stretch(1.2)
    for start, end, found in zip(reference.parameters(), policy.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(found, start + 1.2 * (end - start))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_stretched_run_keeps_the_same_training_and_moves_its_policy(
    stage_one: Any, tmp_path: Path, adapter: Any
) -> None:
    settings = changed(SETTINGS, adapter=adapter)
    plain = train_policy(
        **vars(stage_one),
        output=tmp_path / "plain",
        settings=changed(settings, match_prediction=False),
        seed=0,
        show_progress=False,
    )
    found = train_policy(
        **vars(stage_one), output=tmp_path / "stretched", settings=settings, seed=0, show_progress=False
    )
    assert plain.stretch == 1.0
    assert found.held_out == plain.held_out
    assert found.stretch != 1.0
    models = {
        name: AutoModelForCausalLM.from_pretrained(path)
        for name, path in (
            ("reference", stage_one.reference),
            ("plain", tmp_path / "plain"),
            ("stretched", tmp_path / "stretched"),
        )
    }
    sequences = [(np.array([5, 6, 7]), np.array([8, 9, 10, 11]))]
    ref, one, other = (
        score_sequences(m, sequences, token_budget=100, show_progress=False)[0] for m in models.values()
    )
    # Nearly linear along the ray: the policies are close to the reference.
    assert other - ref == pytest.approx(found.stretch * (one - ref), rel=0.1, abs=1e-3)
    assert f"{found.stretch:.3f}" in (tmp_path / "stretched" / "README.md").read_text()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_are_refused(
    stage_one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(InputError, match="`match_prediction` is true"):
        train_policy(**vars(stage_one), output=tmp_path, settings=SETTINGS, seed=0, show_progress=False)
