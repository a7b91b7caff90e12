"""From chat messages to the exact token ids that sampler, scorer and trainer read: one template, one BOS."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

from pipeline.contracts.errors import InputError, MissingExtraError
from stage1_dual.checkpoints import check_prompt_template, is_local, is_prompt_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class RenderedPrompt:
    """A prompt as the policy reads it.

    Attributes:
        prompt_id: of the prompt.
        text: the rendered chat template, before tokenisation.
        token_ids: its tokens, with exactly one BOS in front where the tokenizer has a BOS; shape (n,), int32.
    """

    prompt_id: str
    text: str
    token_ids: np.ndarray


@dataclass(frozen=True)
class UnusablePrompt:
    """A prompt that the policy cannot read, and why."""

    prompt_id: str
    reason: str


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


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The chat template by which a policy reads its prompts.

    Args:
        tokenizer: of the policy.
        template: None for the tokenizer's own, a text with ``{prompt}`` such as ``"USER: {prompt} ASSISTANT:"``, which
            takes prompts of one message, or the path of a chat template file.

    Raises:
        InputError: the template is none of these, or the tokenizer has no chat template.
    """
    check_prompt_template(template)
    if template is None:
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; give `reference.template`: a text "
                "with {prompt}, or the path of a chat template file"
            )
        return str(tokenizer.chat_template)
    if not is_prompt_template(template):
        return Path(template).read_text(encoding="utf-8")
    before, _, after = template.partition("{prompt}")
    # As a chat template it can be saved with the trained policy.
    return (
        "{% if messages | length != 1 or messages[0]['role'] != 'user' %}"
        "{{ raise_exception('the template is a text, which takes one message, of the user') }}{% endif %}"
        f"{{{{ {json.dumps(before, ensure_ascii=False)} + messages[0]['content'] + "
        f"{json.dumps(after, ensure_ascii=False)} }}}}"
    )


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[tuple[str, Sequence[Mapping[str, str]]]],
    *,
    template: str | None = None,
    max_new_tokens: int,
    max_positions: int,
) -> tuple[list[RenderedPrompt], list[UnusablePrompt]]:
    """Apply the policy's chat template and tokenise, once for the whole run.

    Args:
        tokenizer: of the policy.
        prompts: (prompt_id, messages) of each prompt.
        template: see :func:`resolve_chat_template`.
        max_new_tokens: length limit of a completion, tokens.
        max_positions: length limit of prompt and completion together, tokens.

    Returns:
        The prompts as the policy reads them, and those that it cannot read, each with the reason.

    Raises:
        InputError: there is no chat template.
    """
    chat_template = resolve_chat_template(tokenizer, template)
    rendered: list[RenderedPrompt] = []
    unusable: list[UnusablePrompt] = []
    for prompt_id, messages in prompts:
        try:
            prompt = _render(tokenizer, prompt_id, messages, chat_template)
        except TemplateError as error:
            unusable.append(UnusablePrompt(prompt_id, f"the chat template refuses the prompt: {error}"))
            continue
        if len(prompt.token_ids) + max_new_tokens > max_positions:
            unusable.append(
                UnusablePrompt(
                    prompt_id,
                    f"the prompt has {len(prompt.token_ids)} tokens and leaves no room for a completion: with "
                    f"{max_new_tokens} new tokens it must fit the model's {max_positions} positions",
                )
            )
        else:
            rendered.append(prompt)
    return rendered, unusable


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt_id: str, messages: Sequence[Mapping[str, str]], chat_template: str
) -> RenderedPrompt:
    conversation = [dict(message) for message in messages]
    text = tokenizer.apply_chat_template(
        conversation, chat_template=chat_template, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return RenderedPrompt(prompt_id, text, np.array(with_one_bos(ids, tokenizer.bos_token_id), dtype=np.int32))
