"""What is trained, sampled, saved and served is one model: weights accounted for, merges proved, no dropout."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_tokenizer, save_tiny_policy
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.contracts.errors import InputError
from pipeline.networks import (
    check_weights,
    load_network,
    quiet,
    require_determined,
    require_safe_adapter,
    without_dropout,
    write_merged,
    write_scaled,
)
from stage1_dual.checkpoints import check_causal_checkpoint, check_policy_checkpoint
from stage1_dual.merging import write_merged_checkpoint
from stage2_policy.adapters import load_reference


def load(folder: Path) -> Any:
    return load_network(AutoModelForCausalLM, folder, dtype=torch.float32, what="the policy")


def tied_policy(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, **more: Any) -> Path:
    """An adapter whose updates are as large as they are after training: its second factors are drawn, not zero."""
    with quiet():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, **more))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with quiet():
        model.save_pretrained(folder)
    return folder


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name, value in changes.items():
            key = name.replace("__", ".")
            weights.pop(key, None)
            if value is not None:
                weights[key] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(model__norm__weight=None), r"has 1 missing weights \(model\.norm\.weight\)"),
        (edit(v_head=torch.zeros(3)), r"has 1 unexpected weights \(v_head\)"),
        (edit(model__norm__weight=torch.zeros(3)), r"has 1 mismatched weights \(model\.norm\.weight\)"),
    ],
)
@pytest.mark.parametrize("reader", [load, partial(check_weights, AutoModelForCausalLM, what="the policy")])
def test_every_weight_of_a_policy_is_accounted_for(change: Any, message: str, reader: Any, tmp_path: Path) -> None:
    folder = save_tiny_policy(tmp_path / "policy")
    reader(folder)
    change(folder)
    with pytest.raises(InputError, match=message):
        reader(folder)


def test_a_weight_that_is_not_there_is_found_before_anything_is_read(tmp_path: Path) -> None:
    folder = tied_policy(tmp_path / "policy")
    check_weights(AutoModelForCausalLM, folder, what="the policy")  # a tied head is not missing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "all-linear", "embedding", "whole head"],
)
def test_a_merged_model_is_the_model_with_its_adapter(more: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    base = tied_policy(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **more)
    write_merged_checkpoint(str(base), str(adapter), tmp_path / "merged")

    ids = torch.arange(8, 40)[None]
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(network, adapter).eval()
    merged = load(tmp_path / "merged")
    with torch.no_grad():
        difference = (tuned(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == dtype


def test_a_merge_that_is_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tied_policy(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    monkeypatch.setattr("pipeline.networks._separate_tied_head", lambda tuned: None)
    with pytest.raises(InputError, match=r"`x` is .*adapter: merged into .* gives other log-probabilities"):
        write_merged(base, adapter, tmp_path / "merged", what="`x`")


def test_logits_at_a_temperature_are_those_of_the_model_divided(tmp_path: Path) -> None:
    tied = tied_policy(tmp_path / "tied")
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    neox = GPTNeoXForCausalLM(config)  # its last norm has another name: the head is multiplied
    neox.save_pretrained(tmp_path / "neox")
    for name, key in (("tied", "model.norm.weight"), ("neox", "lm_head.weight")):
        write_scaled(tmp_path / name, tmp_path / f"{name}-scaled", factor=2.0, what="`reference.temperature`")
        before, after = load(tmp_path / name), load(tmp_path / f"{name}-scaled")
        ids = torch.arange(8, 40)[None]
        with torch.no_grad():
            torch.testing.assert_close(after(input_ids=ids).logits, 2 * before(input_ids=ids).logits)
        changed = [name for name, weight in before.state_dict().items() if not weight.equal(after.state_dict()[name])]
        assert changed == [key]
    assert tied.is_dir()


def test_a_model_whose_logits_no_weight_multiplies_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.05,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "capped")
    with pytest.raises(
        InputError, match=r"`reference\.temperature`: the logits of .*capped .* cannot be multiplied by 2"
    ):
        write_scaled(tmp_path / "capped", tmp_path / "scaled", factor=2.0, what="`reference.temperature`")


def test_weights_of_an_adapter_are_safetensors(tmp_path: Path) -> None:
    base = tied_policy(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors, only adapter_model\.bin"):
        require_safe_adapter(adapter, what="`reference.adapter`")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors, only adapter_model\.bin"):
        write_merged_checkpoint(str(base), str(adapter), tmp_path / "merged")


def test_an_adapter_brings_its_own_chat_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tied_policy(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "TUNED {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    with caplog.at_level("INFO", logger="dualign"):
        write_merged_checkpoint(str(base), str(adapter), tmp_path / "merged")
    assert "the chat template is that of the adapter" in caplog.text
    assert (tmp_path / "merged" / "chat_template.jinja").read_text().startswith("TUNED")

    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(InputError, match=r"whose tokenizer has other tokens .*1 differ, such as '<new>'"):
        write_merged_checkpoint(str(base), str(adapter), tmp_path / "other")


def test_a_generation_configuration_that_contradicts_itself_stops_nothing(tmp_path: Path) -> None:
    folder = save_tiny_policy(tmp_path / "policy")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.9}))
    model = load_reference(folder, adapter="none", dtype="float32", device=torch.device("cpu"))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()).get("temperature", 1.0) == 1.0


def dropping() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout=0.3,
        attention_dropout=0.3,
    )
    return GPTNeoXForCausalLM(config)


def test_training_computes_what_scoring_computed(tmp_path: Path) -> None:
    model = dropping()
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        trained = load_reference(tmp_path, adapter="none", dtype="float32", device=torch.device("cpu")).train()
        torch.testing.assert_close(trained(input_ids=ids).logits, expected)


def test_what_is_random_in_training_is_refused() -> None:
    with pytest.raises(InputError, match="the model computes otherwise in training than in evaluation"):
        require_determined(dropping(), what="the model")


def test_dropout_of_every_name_is_zero() -> None:
    config = without_dropout(GPT2Config(resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3))
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)


def test_gpt2_is_a_causal_language_model(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    check_causal_checkpoint(str(tmp_path))
    check_policy_checkpoint(str(tmp_path))
    check_weights(AutoModelForCausalLM, tmp_path, what="the policy")
    load_reference(tmp_path, adapter="none", dtype="float32", device=torch.device("cpu"))


def test_weights_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_policy(tmp_path / "policy")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weights = load_file(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, folder / "decoy.safetensors")
    with pytest.raises(InputError, match=r"names weights outside of the folder \(\.\./elsewhere\.safetensors\)"):
        check_policy_checkpoint(str(folder))


def test_others_can_read_merged_weights(tmp_path: Path) -> None:
    base = tied_policy(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    write_merged(base, adapter, tmp_path / "merged", what="`x`")
    for path in (tmp_path / "merged").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
