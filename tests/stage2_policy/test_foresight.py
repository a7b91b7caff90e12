"""The forecast finds what is linear in the hidden states, and nothing where there is nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import save_tiny_policy
from helpers.training_responses import responses_of
from transformers import AutoModelForCausalLM

from stage2_policy.data import read_training_data
from stage2_policy.foresight import Rows, forecast, judge_reading, read_states, some_rows, whole_prompts
from stage2_policy.held_out import estimate_held_out

ONE = np.ones(1)


def rows(rng: np.random.Generator, *, n_prompts: int, weights: np.ndarray, noise: float) -> Any:
    """States with a large part that all responses of a prompt share, and scores linear in the rest."""
    prompt_n = np.repeat(np.arange(n_prompts), 12)
    own = rng.normal(size=(len(prompt_n), len(weights)))
    shared = 10 * rng.normal(size=(n_prompts, len(weights)))[prompt_n]
    offset = 5 * rng.normal(size=n_prompts)[prompt_n]
    return own + shared, (own @ weights + offset + noise * rng.normal(size=len(prompt_n)))[:, None], prompt_n


@pytest.mark.parametrize("seed", range(3))
def test_what_is_linear_within_prompts_is_foreseen(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = 0.3 * rng.normal(size=20) / np.sqrt(20)
    train = rows(rng, n_prompts=60, weights=weights, noise=0.0)
    # A prompt's own states are an offset of its prediction, which no comparison within it sees.
    exact = judge_reading(train, rows(rng, n_prompts=30, weights=weights, noise=0.0), nats=ONE)
    assert exact.closed_fraction > 0.99
    assert exact.explained > 0.99
    # As much noise as signal: half of the gain, to second order in s.
    spread = float(np.linalg.norm(weights))
    noisy = judge_reading(train, rows(rng, n_prompts=300, weights=weights, noise=spread), nats=ONE)
    assert noisy.closed_fraction_error is not None
    assert abs(noisy.closed_fraction - 0.5) < 4 * noisy.closed_fraction_error < 0.3
    nothing = judge_reading(rows(rng, n_prompts=60, weights=0 * weights, noise=1.0), train, nats=ONE)
    assert abs(nothing.closed_fraction) < 0.1


def test_a_reading_is_judged_as_a_policy_is() -> None:
    """On scores that it foresees exactly, the estimate is that of a policy with these log-ratios: 1."""
    rng = np.random.default_rng(3)
    held_out = responses_of([8] * 6)
    states = np.column_stack([held_out.tilt, rng.normal(size=len(held_out))])
    both = (states, held_out.tilt[:, None], held_out.prompt_p)
    found = judge_reading(both, both, nats=ONE)
    optimum = estimate_held_out(held_out, logp=held_out.tilt, ref_logp=np.zeros(len(held_out)), beta=1.0)
    assert found.closed_fraction == pytest.approx(optimum.closed_fraction, abs=0.01)


def test_each_score_is_foreseen_apart() -> None:
    """A reward of which half is noise and a constraint without any: the constraint is kept, the reward is not."""
    rng = np.random.default_rng(5)
    weights = 0.3 * rng.normal(size=(20, 2)) / np.sqrt(20)
    noise = np.array([float(np.linalg.norm(weights[:, 0])), 0.0])

    def drawn(n_prompts: int) -> Rows:
        prompt_n = np.repeat(np.arange(n_prompts), 12)
        own = rng.normal(size=(len(prompt_n), 20))
        return own, own @ weights + noise * rng.normal(size=(len(prompt_n), 2)), prompt_n

    nats = np.array([1.0, 2.0])
    reward, constraint = judge_reading(drawn(100), drawn(300), nats=nats).gains
    # To second order the gain of a column is its covariance with the log-ratio: of the reward without its noise.
    own, own_noise = weights.T @ weights @ nats, noise**2 * nats
    for gain, foreseen, tilted in zip((reward, constraint), own, own + own_noise, strict=True):
        assert gain.shortfall_error is not None
        assert gain.foreseen == pytest.approx(foreseen * 11 / 12, abs=0.02)
        assert gain.tilted == pytest.approx(tilted * 11 / 12, abs=0.02)
    assert reward.tilted - reward.foreseen > 4 * reward.shortfall_error
    assert abs(constraint.tilted - constraint.foreseen) < 4 * constraint.shortfall_error


def test_states_are_those_of_each_response_whatever_stands_beside_it(tmp_path: Path) -> None:
    responses = responses_of([4] * 5)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_policy(tmp_path / "policy"))
    chosen = np.array([7, 2, 19])
    states = read_states(model, responses, chosen, shares=(0.5, 1.0), token_budget=200, show_progress=False)
    for place, row in enumerate(chosen):
        prompt, done = responses.sequences[int(row)]
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *done]])
            layers = model(input_ids=ids, output_hidden_states=True).hidden_states
        for share, found in zip((0.5, 1.0), states, strict=True):
            read = [
                layers[depth][0, len(prompt) : len(prompt) + max(1, round(share * len(done)))].numpy()
                for depth in (1, 2)
            ]
            expected = np.concatenate([value for part in read for value in (part.mean(0), part[-1])])
            np.testing.assert_allclose(found[place], expected, atol=1e-5)


def test_few_rows_are_of_many_prompts() -> None:
    prompt_n = np.repeat(np.arange(100), 32)
    kept = some_rows(prompt_n, most=160, of_a_prompt=8)
    assert np.bincount(prompt_n[kept]).tolist() == [8] * 20
    kept = some_rows(prompt_n[:64], most=48, of_a_prompt=8)
    assert np.bincount(prompt_n[kept]).tolist() == [24] * 2
    assert len(whole_prompts(prompt_n, most=100)) == 96
    assert len(whole_prompts(prompt_n, most=5)) == 64


def test_there_is_no_forecast_of_nothing(stage_one: Any) -> None:
    data = read_training_data(**vars(stage_one), held_out_fraction=0.25)
    model = AutoModelForCausalLM.from_pretrained(stage_one.reference)
    few = replace(data, train=data.train.select([0, 1, 2]))
    assert forecast(model, few, token_budget=500, show_progress=False) is None
    found = forecast(model, data, token_budget=500, show_progress=False)
    assert found is not None
    assert f"{found.reading.n_responses} of the responses to 6 prompts" in found.sentence
    assert "it gains helpful" in found.sentence
    # Less harm is better, and what is said of it is in its own direction.
    assert f"harm {-found.reading.gains[1].foreseen:+.3g} where" in found.sentence
