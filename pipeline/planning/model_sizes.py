"""How large a checkpoint is, from the files in its folder: nothing is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.contracts.errors import InputError, require_extra
from pipeline.microworld.size import WorldSize
from pipeline.planning.estimates import Size
from stage1_dual.checkpoints import count_weights

_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "dim"),
    "intermediate": ("intermediate_size", "n_inner", "hidden_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
}
"""What architectures call these in config.json."""


def read_size(folder: Path) -> Size:
    """The size of a checkpoint from its configuration and the headers of its weights.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parameters = count_weights(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its size cannot be read: {error}") from error
    found = {key: next((config[name] for name in names if config.get(name)), None) for key, names in _NAMES.items()}
    hidden, heads = found["hidden"], found["heads"]
    kv_width = None
    if hidden and heads:
        kv_width = (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads)
    return Size(
        parameters=parameters,
        layers=found["layers"],
        hidden=hidden,
        kv_width=kv_width,
        intermediate=found["intermediate"],
        decoder=not any(str(name).startswith(_ENCODERS) for name in config.get("architectures") or []),
    )


def read_gguf_size(path: Path) -> Size:
    """The size of the model of a GGUF file, from its metadata.

    Raises:
        MissingExtraError: the package `gguf` is not installed.
    """
    require_extra("gguf", "gguf", purpose="the size of a GGUF file")
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    architecture = value("general.architecture")
    hidden, heads = value(f"{architecture}.embedding_length"), value(f"{architecture}.attention.head_count")
    kv_heads = value(f"{architecture}.attention.head_count_kv") or heads
    return Size(
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        layers=value(f"{architecture}.block_count"),
        hidden=hidden,
        kv_width=kv_heads * (hidden // heads) if hidden and heads else None,
        intermediate=value(f"{architecture}.feed_forward_length"),
    )


def embedded_size(name: str, world: WorldSize) -> Size:
    """The size of an embedded model that is not built yet: a Llama, the reference's embeddings tied to its head.

    Args:
        name: ``reference``, or that of a score model.
        world: how large the world will be.
    """
    if name == "reference":
        vocabulary, layers, width = world.policy_vocabulary, world.policy_layers, world.policy_width
        inner, head = world.policy_ffn_width, 0
    else:
        vocabulary, layers, width = world.scorer_vocabulary, world.scorer_layers, world.scorer_width
        inner, head = world.scorer_ffn_width, world.scorer_width
    parameters = vocabulary * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width + head
    return Size(parameters, layers, width, width, inner)


_ENCODERS = ("Bert", "Roberta", "DistilBert", "Deberta", "Electra", "XLMRoberta", "ModernBert", "Albert")
