"""Score models from their checkpoints: every weight accounted for, heads in float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pipeline.contracts.section import Dtype
from pipeline.networks import load_network


def load_model(
    model_class: Any,
    checkpoint: str,
    *,
    revision: str | None,
    dtype: Dtype,
    config: Any | None = None,
    left_over: Collection[str] = (),
) -> Any:
    """A model in evaluation mode, from safetensors only.

    Args:
        model_class: a class of transformers, or an auto class.
        checkpoint: folder, or id on the Hub.
        revision: of a Hub model.
        dtype: of weights and arithmetic.
        config: of the model, for a class that cannot read it; the checkpoint's own where not given.
        left_over: as :func:`pipeline.networks.load_network` takes it.

    Raises:
        InputError: the checkpoint cannot be loaded, or a weight is missing, unexpected or of another shape.
    """
    import torch

    return load_network(
        model_class,
        checkpoint,
        dtype=getattr(torch, dtype),
        what="the scorer",
        revision=revision,
        left_over=left_over,
        **({} if config is None else {"config": config}),
    )


def resolve_device(device: str) -> Any:
    """The torch device of a name; ``auto`` is the accelerator this process sees, or else its CPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
