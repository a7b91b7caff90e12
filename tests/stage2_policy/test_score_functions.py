from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.contracts.errors import InputError
from stage2_policy import score_functions
from stage2_policy.adapters import AdapterSettings, attach_adapter
from stage2_policy.data import TrainingResponses, read_training_data
from stage2_policy.logprobs import score_sequences
from stage2_policy.score_functions import AdapterWeights, as_floats, write_score_functions

pytestmark = pytest.mark.slow


@pytest.fixture
def policy(stage_one: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(stage_one.reference, dtype=torch.float32)
    return attach_adapter(model, AdapterSettings(r=2, alpha=6, target_modules="all-linear", seed=0))


@pytest.fixture
def responses(stage_one: Any) -> TrainingResponses:
    return read_training_data(**vars(stage_one), held_out_fraction=0.25).train


def written(policy: PeftModel, responses: TrainingResponses, folder: Path, **changes: Any) -> np.ndarray:
    given: dict[str, Any] = {"key": {"seed": 0}, "token_budget": 200, "show_progress": False, **changes}
    return write_score_functions(policy, responses, folder=folder, **given)


def test_a_small_change_moves_each_log_probability_by_its_inner_product(
    policy: PeftModel, responses: TrainingResponses, tmp_path: Path
) -> None:
    functions = as_floats(written(policy, responses, tmp_path)).numpy()
    weights = AdapterWeights(policy)
    change = np.random.default_rng(0).standard_normal(weights.size).astype(np.float32) * 1e-3

    def logp(values: np.ndarray) -> np.ndarray:
        weights.set(values)
        return score_sequences(policy, responses.sequences, token_budget=500, show_progress=False)

    measured = (logp(change) - logp(-change)) / 2
    foretold = functions @ change
    assert np.abs(measured).max() > 1e-2
    np.testing.assert_allclose(foretold, measured, atol=0.02 * np.abs(measured).max())


def test_a_killed_pass_goes_on_and_ends_as_an_undisturbed_one(
    policy: PeftModel, responses: TrainingResponses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_functions, "_ROWS_AT_ONCE", 8)
    undisturbed = np.array(written(policy, responses, tmp_path / "whole"))
    computed: list[int] = []
    inner = score_functions._score_functions

    def stops(model: PeftModel, weights: AdapterWeights, sequences: Any) -> np.ndarray:
        computed.append(len(sequences))
        if sum(computed) > 20:
            raise KeyboardInterrupt
        return inner(model, weights, sequences)

    with monkeypatch.context() as patch:
        patch.setattr(score_functions, "_score_functions", stops)
        with pytest.raises(KeyboardInterrupt):
            written(policy, responses, tmp_path / "killed")
    done = json.loads((tmp_path / "killed" / "done.json").read_text())["done"]
    assert 0 < done < len(responses)
    computed.clear()

    def counts(model: PeftModel, weights: AdapterWeights, sequences: Any) -> np.ndarray:
        computed.append(len(sequences))
        return inner(model, weights, sequences)

    monkeypatch.setattr(score_functions, "_score_functions", counts)
    np.testing.assert_array_equal(written(policy, responses, tmp_path / "killed"), undisturbed)
    assert sum(computed) == len(responses) - done

    computed.clear()
    written(policy, responses, tmp_path / "killed", key={"seed": 1})
    assert sum(computed) == len(responses)


def test_a_disk_without_room_is_named_before_the_pass(
    policy: PeftModel, responses: TrainingResponses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_functions.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match=r"takes .* GB, and 0.0 GB are free there; make room, or take a smaller"):
        written(policy, responses, tmp_path)
