"""A GGUF reference: its checkpoint computes what the file holds, and files that cannot be one are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.gguf_files import tiny_network, write_gguf
from helpers.tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import stage1_dual.gguf_models as module
from pipeline.contracts.errors import InputError
from stage1_dual.gguf_models import check_gguf_file, write_dequantised_checkpoint


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(8, 40)[None]).logits
    return found


def test_the_checkpoint_computes_what_the_file_was_made_from(tmp_path: Path) -> None:
    original = tiny_network()
    path = write_gguf(tmp_path / "tiny.gguf", original)
    check_gguf_file(path, template=None)
    write_dequantised_checkpoint(path, tmp_path / "checkpoint")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype="auto")
    assert written.dtype == torch.float32
    assert (logits(written) - logits(original)).abs().max() < 1e-5  # another order of rows would be off by 0.1
    tokenizer, expected = AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), build_tokenizer(bos="none")
    text = "I feel tired; take 12 small steps."
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.chat_template == expected.chat_template


def test_quantised_blocks_become_the_numbers_of_their_own_reader(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network(), kind=gguf.GGMLQuantizationType.Q8_0)
    write_dequantised_checkpoint(path, tmp_path / "checkpoint")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").state_dict()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.1.ffn_down.weight"]
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(weights["model.layers.1.mlp.down_proj.weight"].numpy(), expected)


def test_other_numbers_than_the_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network())
    load = module.load_network

    def off_by_one_bit(*arguments: Any, **more: Any) -> Any:
        model = load(*arguments, **more)
        weight = model.model.layers[1].self_attn.k_proj.weight.data
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
        return model

    monkeypatch.setattr(module, "load_network", off_by_one_bit)
    with pytest.raises(InputError, match=r"other numbers of its tensor blk\.1\.attn_k\.weight"):
        write_dequantised_checkpoint(path, tmp_path / "checkpoint")


def test_a_tensor_that_is_no_weight_of_the_network_is_refused(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network(), change=lambda tensors: tensors.update(factors))
    with pytest.raises(InputError, match=r"1 tensors of it are no weights of the network \(rope_freqs\.weight\)"):
        write_dequantised_checkpoint(path, tmp_path / "checkpoint")


def test_files_that_cannot_be_a_reference_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_network()
    whole = write_gguf(tmp_path / "whole.gguf", model)
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-2_000])
    (tmp_path / "head.gguf").write_bytes(whole.read_bytes()[:1_000])
    (tmp_path / "text.gguf").write_text("no model")
    write_gguf(tmp_path / "silent.gguf", model, template=False)
    write_gguf(tmp_path / "rwkv.gguf", model, architecture="rwkv7")
    write_gguf(tmp_path / "yarn.gguf", model, more={"llama.rope.scaling.type": "yarn"})
    for name, message in {
        "absent": "cannot be read: No such file",
        "text": "is not a GGUF file: it begins with b'no m'",
        "cut": "is damaged or cut off",
        "head": "is damaged or cut off",
        "silent": "has no chat template .* give `reference.template`",
        "rwkv": "of the architecture 'rwkv7', which transformers does not read",
        "yarn": r"depends on llama\.rope\.scaling\.type",
    }.items():
        with pytest.raises(InputError, match=rf"`reference\.model` is .*{name}\.gguf.*{message}"):
            check_gguf_file(tmp_path / f"{name}.gguf", template=None)
    check_gguf_file(tmp_path / "silent.gguf", template="{prompt}")
