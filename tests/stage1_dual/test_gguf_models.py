"""A GGUF reference: the checkpoint that is written computes what the file holds, and files that cannot be are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stage1_dual.gguf_models as module
from pipeline.contracts.errors import InputError
from stage1_dual.gguf_models import check_gguf_file, write_dequantised_checkpoint

HEADS, KV_HEADS = 4, 2
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def network() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of query and key heads as llama.cpp stores them: pairs of a rotation side by side, not half a head apart."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    architecture: str = "llama",
    template: bool = True,
    more: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file as llama.cpp writes one, apart from any code of the project."""
    config, tokenizer = model.config, build_tokenizer(bos="none")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (more or {}).items():
        writer.add_string(name, value)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token, _ in vocabulary])
    merges = __import__("json").loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        tensors[gguf_name(name)] = values if heads is None else rotated(values, heads)
    change(tensors)
    for name, values in tensors.items():
        stored = kind if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(8, 40)[None]).logits
    return found


def test_the_checkpoint_computes_what_the_file_was_made_from(tmp_path: Path) -> None:
    original = network()
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
    path = write_gguf(tmp_path / "tiny.gguf", network(), kind=gguf.GGMLQuantizationType.Q8_0)
    write_dequantised_checkpoint(path, tmp_path / "checkpoint")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").state_dict()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.1.ffn_down.weight"]
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(weights["model.layers.1.mlp.down_proj.weight"].numpy(), expected)


def test_other_numbers_than_the_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", network())
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
    path = write_gguf(tmp_path / "tiny.gguf", network(), change=lambda tensors: tensors.update(factors))
    with pytest.raises(InputError, match=r"1 tensors of it are no weights of the network \(rope_freqs\.weight\)"):
        write_dequantised_checkpoint(path, tmp_path / "checkpoint")


def test_files_that_cannot_be_a_reference_are_refused_by_name(tmp_path: Path) -> None:
    model = network()
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
