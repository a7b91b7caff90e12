"""Sizes read from files against the networks themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import save_tiny_policy
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from pipeline.contracts.errors import InputError
from pipeline.planning.model_sizes import read_size


def test_a_checkpoint_has_the_weights_of_its_network(tmp_path: Path) -> None:
    save_tiny_policy(tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    size, config = read_size(tmp_path), network.config
    assert size.parameters == sum(weight.numel() for weight in network.parameters())
    assert (size.layers, size.hidden) == (config.num_hidden_layers, config.hidden_size)
    key = dict(network.named_parameters())["model.layers.0.self_attn.k_proj.weight"]
    assert size.kv_width == key.shape[0]
    assert size.decoder


def _checkpoint(folder: Path, config: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros((3, 4), np.float32), "scalar": np.zeros((), np.float32)}, folder / "one.safetensors")
    save_file({"b": np.zeros(5, np.float16)}, folder / "two.safetensors")
    return folder


def test_all_files_count_and_other_names_are_known(tmp_path: Path) -> None:
    config = {"n_layer": 2, "n_embd": 8, "n_head": 4, "architectures": ["GPT2LMHeadModel"]}
    size = read_size(_checkpoint(tmp_path, config))
    assert (size.parameters, size.layers, size.hidden, size.kv_width) == (12 + 1 + 5, 2, 8, 8)
    assert size.intermediate is None


def test_heads_of_keys_may_be_fewer_and_an_encoder_keeps_none(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    assert read_size(_checkpoint(tmp_path, config)).kv_width == 2 * 16
    config["architectures"] = ["RobertaForSequenceClassification"]
    assert not read_size(_checkpoint(tmp_path, config)).decoder


@pytest.mark.parametrize("damage", ["no config", "truncated", "not safetensors"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    folder = _checkpoint(tmp_path, {})
    if damage == "no config":
        (folder / "config.json").unlink()
    else:
        data = (folder / "one.safetensors").read_bytes()
        (folder / "one.safetensors").write_bytes(data[:12] if damage == "truncated" else b"\xff" * 64)
    with pytest.raises(InputError, match=f"{folder}: its size cannot be read"):
        read_size(folder)
