"""What both samplers agree on: which tokens end a completion, and how tokens become text."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.contracts.errors import InputError
from stage1_dual.checkpoints import is_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_eos_token_ids(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase, *, revision: str | None = None
) -> tuple[int, ...]:
    """Every token that the model's configuration, its generation configuration or its tokenizer calls EOS, ascending.

    Chat models often end a turn with another token than the tokenizer's EOS and say so in one of the other two only.

    Raises:
        InputError: none of them names one.
    """
    from transformers import AutoConfig, GenerationConfig

    where: dict[str, Any] = {"revision": revision, "local_files_only": is_local(checkpoint)}
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **where).get_text_config()
    named = [config.eos_token_id, tokenizer.eos_token_id]
    with contextlib.suppress(OSError):  # the file is optional
        named.append(GenerationConfig.from_pretrained(checkpoint, **where).eos_token_id)
    found: set[int] = set()
    for value in named:
        found.update([value] if isinstance(value, int) else value or [])
    if not found:
        raise InputError(f"{checkpoint} names no EOS token, so that no completion would ever end")
    return tuple(sorted(found))


def decode_completions(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Sequence[int]]) -> list[str]:
    """The texts of completions, special tokens left out and white space untouched."""
    if not completions:  # transformers decodes an empty batch to one empty text
        return []
    texts: list[str] = tokenizer.batch_decode(
        [list(ids) for ids in completions], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts
