from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.train_settings import changed
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.contracts.artifacts import checkpoint_sha256
from pipeline.contracts.errors import InputError
from stage2_policy.adapters import (
    AdapterSettings,
    attach_adapter,
    check_target_modules,
    continue_adapter,
    validate_reference,
)
from stage2_policy.data import read_training_data
from stage2_policy.held_out import estimate_held_out
from stage2_policy.logprobs import score_sequences
from stage2_policy.settings import TrainSettings
from stage2_policy.tilted_trainer import TiltedTrainer
from stage2_policy.trainer import TrainResult, train_policy

pytestmark = pytest.mark.slow

LORA = TrainSettings(
    learning_rate=3e-3,
    epochs=6,
    tokens_per_step=300,
    tokens_per_microbatch=160,
    responses_per_group=2,
    held_out_fraction=0.25,
    evaluations=4,
    patience=9,
    adapter="lora",
    lora_r=4,
    lora_alpha=8,
)


@pytest.fixture(scope="module")
def trained(stage_one: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    output = tmp_path_factory.mktemp("policy")
    before = checkpoint_sha256(stage_one.reference)
    result = train_policy(**vars(stage_one), output=output, settings=LORA, seed=0, show_progress=False)
    assert checkpoint_sha256(stage_one.reference) == before
    return result, output


def logp(model: torch.nn.Module, stage_one: Any) -> np.ndarray:
    held_out = read_training_data(**vars(stage_one), held_out_fraction=0.25).held_out
    return score_sequences(model, held_out.sequences, token_budget=1000, show_progress=False)


def test_merged_weights_are_the_adapter_on_its_base(stage_one: Any, trained: tuple[TrainResult, Path]) -> None:
    result, output = trained
    reference = AutoModelForCausalLM.from_pretrained(stage_one.reference, dtype=torch.float32)
    ref_logp = logp(reference, stage_one)
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(reference, output / "adapter")

    assert not hasattr(merged, "peft_config")
    np.testing.assert_allclose(logp(merged, stage_one), logp(adapted, stage_one), atol=1e-3)
    with adapted.disable_adapter():
        np.testing.assert_array_equal(logp(adapted, stage_one), ref_logp)
    assert np.abs(logp(merged, stage_one) - ref_logp).max() > 0.1
    held_out = read_training_data(**vars(stage_one), held_out_fraction=0.25).held_out
    kept = estimate_held_out(held_out, logp=logp(merged, stage_one), ref_logp=ref_logp, beta=0.5)
    assert kept.loss == pytest.approx(result.held_out.loss, abs=1e-3)
    assert sorted(path.name for path in (output / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "| adapter | lora |" in (output / "README.md").read_text()


def test_the_curve_begins_at_the_reference(trained: tuple[TrainResult, Path]) -> None:
    result, output = trained
    assert result.held_out_reference.kl == pytest.approx(0, abs=1e-9)
    curve = json.loads((output / "training_log.json").read_text())
    assert curve[0]["eval_closed_fraction"] == pytest.approx(0, abs=1e-9)


def test_an_interrupted_run_continues_to_the_same_curve(
    stage_one: Any, trained: tuple[TrainResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(60))
    original = TiltedTrainer.compute_loss

    def interrupted(self: TiltedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TiltedTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_policy(**vars(stage_one), output=tmp_path, settings=LORA, seed=0, show_progress=False)
    monkeypatch.undo()
    assert list(tmp_path.glob("checkpoints/checkpoint-*"))
    continued = train_policy(**vars(stage_one), output=tmp_path, settings=LORA, seed=0, show_progress=False)

    curves = [
        [
            entry[name]
            for entry in json.loads((folder / "training_log.json").read_text())
            for name in entry
            if "loss" in name
        ]
        for folder in (trained[1], tmp_path)
    ]
    assert continued.best_step == trained[0].best_step
    assert curves[1][:-1] == pytest.approx(curves[0][:-1], rel=1e-4, abs=1e-5)  # the last is a mean since the restart


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_activations_computed_anew_change_nothing(adapter: str, stage_one: Any, tmp_path: Path) -> None:
    losses = []
    for again in (False, True):
        settings = changed(LORA, adapter=adapter, learning_rate=5e-4, epochs=1, gradient_checkpointing=again)
        train_policy(**vars(stage_one), output=tmp_path / str(again), settings=settings, seed=0, show_progress=False)
        log = json.loads((tmp_path / str(again) / "training_log.json").read_text())
        losses.append([entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry])

    assert len(losses[0]) > 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)


def test_four_bits_train_and_merge_into_the_exact_weights(stage_one: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="not in the locks, for it may reach out to the Hub when imported")
    settings = changed(LORA, adapter="qlora")
    result = train_policy(**vars(stage_one), output=tmp_path, settings=settings, seed=0, show_progress=False)

    # The reference of the log-ratios is the quantised model, which is another one than was sampled ...
    assert result.held_out_reference.kl == pytest.approx(0, abs=1e-9)
    assert result.sampler_gap > 1e-3
    # ... training brings it nearer to the tilted policy ...
    assert result.held_out.loss < result.held_out_reference.loss - 0.01
    assert result.held_out.kl > 0.01
    # ... and the updates are added to the weights that were sampled.
    reference = AutoModelForCausalLM.from_pretrained(stage_one.reference, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    np.testing.assert_allclose(logp(merged, stage_one), logp(adapted, stage_one), atol=1e-3)
    assert "| adapter | qlora |" in (tmp_path / "README.md").read_text()


def test_four_bits_need_their_package(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package `bitsandbytes`.*pip install 'dualign\[qlora\]'"):
        validate_reference(reference, adapter="qlora")


def test_an_adapter_is_no_reference(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter; merge it into its base first"):
        validate_reference(tmp_path, adapter="none")


def test_layers_that_are_not_there_are_named(reference: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    settings = AdapterSettings(r=2, alpha=4, target_modules=["q_projection"], seed=0)
    with pytest.raises(InputError, match=r"`lora_target_modules` is \['q_projection'\]"):
        attach_adapter(model, settings)


def test_a_misspelt_layer_beside_right_ones_is_named(reference: Path) -> None:
    # peft would train the others and say nothing.
    message = r"`lora_target_modules` is \['q_proj', 'v_porj'\]: the model has no layer v_porj"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        attach_adapter(model, AdapterSettings(r=2, alpha=4, target_modules=["q_proj", "v_porj"], seed=0))
    config = AutoConfig.from_pretrained(reference)
    with pytest.raises(InputError, match=message):
        check_target_modules(config, ("q_proj", "v_porj"))
    with pytest.raises(InputError, match="`lora_target_modules` is 'q_porj'"):
        check_target_modules(config, "q_porj")
    for right in ("all-linear", ("q_proj", "self_attn.v_proj"), r".*\.[qv]_proj"):
        check_target_modules(config, right)


def test_dropout_disturbs_training_and_no_evaluation(reference: Path, stage_one: Any) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    policy = attach_adapter(model, AdapterSettings(r=2, alpha=4, target_modules="all-linear", seed=0, dropout=0.5))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    np.testing.assert_array_equal(logp(policy, stage_one), logp(policy, stage_one))
    ids = torch.arange(5, 15)[None]
    policy.train()
    assert not torch.equal(policy(input_ids=ids).logits, policy(input_ids=ids).logits)


def test_training_goes_on_from_an_adapter(stage_one: Any, trained: tuple[TrainResult, Path], tmp_path: Path) -> None:
    settings = changed(LORA, learning_rate=1e-9, epochs=1, evaluations=1)
    result = train_policy(
        **vars(stage_one), output=tmp_path, settings=settings, seed=0, show_progress=False, initial=trained[1]
    )
    # Log-ratios are still against the reference, not against where training began.
    assert result.held_out.kl == pytest.approx(trained[0].held_out.kl, rel=1e-3)
    assert result.held_out.kl > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, r"`lora_r` is 2, and the adapter in .* has 4"),
        ({"alpha": 16}, r"`lora_alpha` is 16, and the adapter in .* has 8"),
        ({"target_modules": ["q_proj"]}, r"is on other layers than `lora_target_modules` says"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    changes: dict[str, Any], message: str, reference: Path, trained: tuple[TrainResult, Path]
) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    settings = AdapterSettings(**{"r": 4, "alpha": 8, "target_modules": "all-linear", "seed": 0, **changes})
    with pytest.raises(InputError, match=message):
        continue_adapter(attach_adapter(model, settings), trained[1] / "adapter")


def test_an_adapter_of_another_reference_is_refused(
    stage_one: Any, trained: tuple[TrainResult, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained[1], other)
    record = json.loads((other / "provenance.json").read_text())
    record["identities"]["reference"] = "0" * 64
    (other / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"adapter was trained on another reference \(000000000000\)"):
        train_policy(
            **vars(stage_one), output=tmp_path / "new", settings=LORA, seed=0, show_progress=False, initial=other
        )
