"""References that are a checkpoint and a LoRA adapter, or at a temperature: written as one ordinary checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.contracts.errors import InputError, import_failure
from pipeline.networks import write_merged, write_scaled
from stage1_dual.sampling.rendering import load_tokenizer

log = logging.getLogger("dualign")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_CHAT_TEMPLATE = "chat_template.jinja"


def write_merged_checkpoint(checkpoint: str, adapter: str, output: Path) -> None:
    """Write a causal language model with an adapter's weights added to its own, as an ordinary checkpoint.

    Whoever samples, scores or trains it then loads one and the same set of weights. A tokenizer or a chat template
    that comes with the adapter is the one it was tuned with, and goes before the base model's.

    Args:
        checkpoint: folder of the base model.
        adapter: folder of the adapter.
        output: folder to write.

    Raises:
        MissingExtraError: a package is not installed.
        InputError: the model or the adapter cannot be loaded, they do not fit, the adapter's tokenizer has other
            tokens than the base model's, or the merged model is not the model with its adapter.
    """
    tokenizer = load_tokenizer(checkpoint)
    own = load_tokenizer(adapter) if any((Path(adapter) / name).is_file() for name in _TOKENIZER_FILES) else None
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        differing = own.get_vocab().items() ^ tokenizer.get_vocab().items()
        raise InputError(
            f"`reference.adapter` is {adapter!r}, whose tokenizer has other tokens than that of {checkpoint} "
            f"({len(dict(differing))} differ, such as {min(differing)[0]!r}): the base model has no weights for them"
        )
    template = tokenizer.chat_template
    if own is not None:
        tokenizer, template = own, own.chat_template or template
    if (Path(adapter) / _CHAT_TEMPLATE).is_file():
        template = (Path(adapter) / _CHAT_TEMPLATE).read_text(encoding="utf-8")
    if template != load_tokenizer(checkpoint).chat_template:
        log.info("prepare: the chat template is that of the adapter %s, not of %s", adapter, checkpoint)
    tokenizer.chat_template = template
    try:
        write_merged(checkpoint, adapter, output, what="`reference.adapter`")
    except ImportError as error:
        raise import_failure(error, package="transformers", extra="train", purpose="merging an adapter") from error
    tokenizer.save_pretrained(output)


def write_at_temperature(checkpoint: str, temperature: float, output: Path) -> None:
    """Write a causal language model whose logits are those of another one divided by a temperature.

    Args:
        checkpoint: folder of the model.
        temperature: the divisor.
        output: folder to write.

    Raises:
        InputError: the model cannot be loaded, or no weight of it multiplies its logits.
    """
    tokenizer = load_tokenizer(checkpoint)
    write_scaled(checkpoint, output, factor=1 / temperature, what="`reference.temperature`")
    tokenizer.save_pretrained(output)
