"""LoRA adapters that are part of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.contracts.errors import InputError, MissingExtraError


def write_merged_checkpoint(checkpoint: str, adapter: str, output: Path) -> None:
    """Write a causal language model with an adapter's weights added to its own, as an ordinary checkpoint.

    Whoever samples, scores or trains it then loads one and the same set of weights.

    Args:
        checkpoint: folder of the base model.
        adapter: folder of the adapter.
        output: folder to write.

    Raises:
        MissingExtraError: a package is not installed.
        InputError: the model or the adapter cannot be loaded, or they do not fit.
    """
    try:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(package=error.name or "peft", extra="train", purpose="merging an adapter") from error
    try:
        base = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", trust_remote_code=False, use_safetensors=True
        )
        merged: Any = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        merged.save_pretrained(output)
        AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False).save_pretrained(output)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the adapter {adapter} cannot be merged into {checkpoint}: {error}") from error
