"""Score models from their checkpoints: every weight accounted for, heads in float32."""

from __future__ import annotations

from typing import Any

from pipeline.contracts.errors import InputError
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import is_local


def load_model(
    model_class: Any, checkpoint: str, *, revision: str | None, dtype: Dtype, config: Any | None = None
) -> Any:
    """A model in evaluation mode, from safetensors only.

    Args:
        model_class: a class of transformers, or an auto class.
        checkpoint: folder, or id on the Hub.
        revision: of a Hub model.
        dtype: of weights and arithmetic.
        config: of the model, for a class that cannot read it; the checkpoint's own where not given.

    Raises:
        InputError: the checkpoint cannot be loaded, or a weight is missing, unexpected or of another shape.
    """
    import torch
    from safetensors import SafetensorError

    try:
        model, loading = model_class.from_pretrained(
            checkpoint,
            **({} if config is None else {"config": config}),
            revision=revision,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=is_local(checkpoint),
            ignore_mismatched_sizes=True,  # reported below, with the others
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"transformers cannot load the scorer {checkpoint}: {error}") from error
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in loading[f"{kind}_keys"])
        if keys:
            raise InputError(
                f"the scorer {checkpoint} has {len(keys)} {kind} weights ({', '.join(keys[:3])}): "
                f"{type(model).__name__} would not be the trained model"
            )
    return model.eval()


def resolve_device(device: str) -> Any:
    """The torch device of a name; ``auto`` is the accelerator this process sees, or else its CPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
