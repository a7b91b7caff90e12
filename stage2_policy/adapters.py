"""Low-rank adapters through peft: the reference is the base with its adapter off, the policy the merged weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from pipeline.contracts.errors import InputError, MissingExtraError
from pipeline.networks import load_network, quiet, require_determined, require_safe_adapter, without_dropout

Adapter = Literal["none", "lora", "qlora"]
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class AdapterSettings:
    """The low-rank updates that are trained beside fixed weights.

    Attributes:
        r: rank of the update of each weight matrix.
        alpha: the update is scaled by alpha / r.
        dropout: share of what enters an update that is dropped in training, at random.
        target_modules: names of the linear layers that get one, or ``all-linear`` for all but the head.
        seed: of the adapter's first weights.
    """

    r: int
    alpha: int
    target_modules: str | Sequence[str]
    seed: int
    dropout: float = 0.0


def validate_reference(reference: Path, *, adapter: Adapter) -> None:
    """Refuse what cannot be trained, before anything is loaded.

    Raises:
        InputError: the reference is an adapter itself.
        MissingExtraError: 4 bits are asked for without bitsandbytes.
    """
    if (reference / "adapter_config.json").is_file():
        raise InputError(
            f"the reference checkpoint {reference} is an adapter; merge it into its base first, so that the reference "
            "is the model that was sampled"
        )
    if adapter == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(package="bitsandbytes", extra="qlora", purpose="adapter qlora")


def start_from(reference: PreTrainedModel, checkpoint: Path) -> None:
    """Give a loaded reference the weights of another checkpoint of its architecture, in place.

    Raises:
        InputError: the checkpoint has other weights than the reference, by name or shape.
    """
    other = load_network(AutoModelForCausalLM, checkpoint, dtype=reference.dtype, what="the policy")
    try:
        reference.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise InputError(
            f"training setting `initial` is {checkpoint}, whose weights are not those of the reference: {error}"
        ) from error


def load_reference(
    reference: Path, *, adapter: Adapter, dtype: Literal["float32", "bfloat16"], device: torch.device
) -> PreTrainedModel:
    """The reference policy as training starts from it, without dropout, as it was scored and sampled.

    Weights that are trained are in float32; weights that an adapter leaves fixed are in ``dtype``, or in 4 bits.

    Args:
        reference: folder of the checkpoint.
        adapter: what is trained.
        dtype: of the arithmetic.
        device: where to.

    Raises:
        InputError: it cannot be loaded, a weight of it is missing, unexpected or of another shape, or it computes
            otherwise in training than in evaluation.
    """
    fixed = torch.float32 if adapter == "none" else getattr(torch, dtype)
    config = without_dropout(AutoConfig.from_pretrained(reference, trust_remote_code=False, local_files_only=True))
    if adapter == "qlora":
        quantised: PreTrainedModel = load_network(
            AutoModelForCausalLM,
            reference,
            dtype=fixed,
            what="the reference",
            config=config,
            device_map={"": device},
            quantization_config=BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=fixed,
            ),
        )
        for module in quantised.modules():
            # Some CPUs would get a layout for inference at the first scoring, through which no gradient passes.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return quantised
    model: PreTrainedModel = load_network(
        AutoModelForCausalLM, reference, dtype=fixed, what="the reference", config=config
    )
    torch.nn.Module.to(model, device)
    require_determined(model, what=f"the reference {reference}")
    return model


def attach_adapter(model: PreTrainedModel, settings: AdapterSettings) -> PeftModel:
    """A policy that equals the model until it is trained, and of which only the adapter is.

    Raises:
        InputError: a target module is not one of the model.
    """
    modules = settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            with quiet():
                policy = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"training setting `lora_target_modules` is {modules!r}: {error}") from error
    assert isinstance(policy, PeftModel)  # a task type was given
    if not isinstance(modules, str):  # peft asks for one match in all
        found: list[str] = policy.base_model.targeted_module_names  # type: ignore[assignment]
        absent = [name for name in modules if not any(f".{layer}".endswith(f".{name}") for layer in found)]
        if absent:
            raise InputError(
                f"training setting `lora_target_modules` is {list(modules)!r}: the model has no layer "
                f"{', '.join(absent)}"
            )
    return policy


def check_target_modules(config: PreTrainedConfig, modules: str | Sequence[str]) -> None:
    """Check that an adapter finds its layers in a model of some configuration, whose weights need not be there.

    Raises:
        InputError: a target module is not one of the model.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        attach_adapter(model, AdapterSettings(r=1, alpha=1, target_modules=modules, seed=0))


def continue_adapter(policy: PeftModel, folder: Path) -> None:
    """Give an adapter the weights of another one of its shape, in place: training goes on from there.

    Args:
        policy: from :func:`attach_adapter`.
        folder: of the other adapter, as training leaves it.

    Raises:
        InputError: the other adapter is of another rank or scale, or of other layers.
    """
    ours, theirs = policy.peft_config["default"], PeftConfig.from_pretrained(str(folder))
    for name, setting in (("r", "lora_r"), ("lora_alpha", "lora_alpha")):
        if getattr(theirs, name) != getattr(ours, name):
            raise InputError(
                f"training setting `{setting}` is {getattr(ours, name)}, and the adapter in {folder}, from which "
                f"training starts, has {getattr(theirs, name)}; they must be the same"
            )
    require_safe_adapter(folder, what="the adapter from which training starts")
    weights = load_peft_weights(str(folder), device="cpu")
    missing = get_peft_model_state_dict(policy).keys() ^ weights.keys()
    if missing:
        raise InputError(
            f"the adapter in {folder}, from which training starts, is on other layers than "
            f"`lora_target_modules` says: {len(missing)} weights are in one of the two only (first: {min(missing)})"
        )
    try:
        set_peft_model_state_dict(policy, weights)
    except RuntimeError as error:
        raise InputError(f"the adapter in {folder}, from which training starts, has other shapes: {error}") from error
