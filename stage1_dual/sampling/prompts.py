"""From chat messages to the exact token ids that sampler, scorer and trainer read: one template, one BOS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.contracts.errors import InputError, MissingExtraError
from stage1_dual.checkpoints import is_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the policy reads it.

    Attributes:
        prompt_id: of the prompt.
        text: the rendered chat template, before tokenisation.
        token_ids: its tokens, with exactly one BOS in front where the tokenizer has a BOS.
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]


def load_tokenizer(checkpoint: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        MissingExtraError: transformers is not installed.
        InputError: the tokenizer cannot be loaded.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(package="transformers", extra="sample", purpose="reading a tokenizer") from error
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint, revision=revision, trust_remote_code=False, local_files_only=is_local(checkpoint)
        )
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {checkpoint} cannot be loaded: {error}") from error
    return tokenizer


def read_max_positions(checkpoint: str, *, revision: str | None = None) -> int:
    """The longest sequence a checkpoint's configuration allows, tokens.

    Raises:
        MissingExtraError: transformers is not installed.
        InputError: the configuration cannot be read or names no limit.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingExtraError(package="transformers", extra="sample", purpose="reading a model") from error
    try:
        config = AutoConfig.from_pretrained(
            checkpoint, revision=revision, trust_remote_code=False, local_files_only=is_local(checkpoint)
        )
    except (OSError, ValueError) as error:
        raise InputError(f"the configuration of {checkpoint} cannot be read: {error}") from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise InputError(f"the configuration of {checkpoint} has no `max_position_embeddings`")
    return limit


def with_one_bos(token_ids: Sequence[int], bos_token_id: int | None) -> tuple[int, ...]:
    """The tokens with exactly one BOS in front, whoever wrote none or several; unchanged where there is no BOS."""
    if bos_token_id is None:
        return tuple(token_ids)
    start = 0
    while start < len(token_ids) and token_ids[start] == bos_token_id:
        start += 1
    return (bos_token_id, *token_ids[start:])


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, Sequence[Mapping[str, str]]]],
    *,
    max_new_tokens: int,
    max_positions: int,
) -> list[RenderedPrompt]:
    """Apply the policy's chat template and tokenise, once for the whole run.

    Args:
        tokenizer: of the policy.
        prompts: (prompt_id, messages) of each prompt.
        max_new_tokens: length limit of a completion, tokens.
        max_positions: length limit of prompt and completion together, tokens.

    Raises:
        InputError: there is no chat template, the template refuses a prompt, or a prompt leaves no room for a
            completion of ``max_new_tokens``.
    """
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no chat template")
    rendered = [_render(tokenizer, prompt_id, messages) for prompt_id, messages in prompts]
    long = [prompt for prompt in rendered if len(prompt.token_ids) + max_new_tokens > max_positions]
    if long:
        shown = "; ".join(f"{prompt.prompt_id} has {len(prompt.token_ids)} tokens" for prompt in long[:3])
        raise InputError(
            f"{len(long)} of {len(rendered)} prompts leave no room for a completion (first: {shown}): "
            f"prompt plus {max_new_tokens} new tokens must fit the model's {max_positions} positions"
        )
    return rendered


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt_id: str, messages: Sequence[Mapping[str, str]]
) -> RenderedPrompt:
    from jinja2 import TemplateError

    conversation = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"the chat template refuses prompt {prompt_id}: {error}") from error
    assert isinstance(text, str)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return RenderedPrompt(prompt_id, text, with_one_bos(ids, tokenizer.bos_token_id))
