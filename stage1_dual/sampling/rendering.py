"""From chat messages to the exact token ids that sampler, scorer and trainer read: one template, one BOS."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from stage1_dual.chat_templates import RenderingError, read_template, render_chat, require_repeatable, template_file
from stage1_dual.checkpoints import check_prompt_template, is_local, is_prompt_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class RenderedPrompt:
    """A prompt as the policy reads it.

    Attributes:
        prompt_id: of the prompt.
        text: the rendered chat template, before tokenisation.
        has_control_tokens: whether a message itself writes one of the tokenizer's special tokens.
        token_ids: its tokens, with exactly one BOS in front where the tokenizer has a BOS; shape (n,), int32.
    """

    prompt_id: str
    text: str
    token_ids: np.ndarray
    has_control_tokens: bool = False


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
        raise import_failure(error, package="transformers", extra="sample", purpose="reading a tokenizer") from error
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
        raise import_failure(error, package="transformers", extra="sample", purpose="reading a model") from error
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
        path = template_file(template)
        assert path is not None  # it was checked
        return read_template(path, setting="reference.template")
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
    day: date | None = None,
    refuses_control_tokens: bool = False,
) -> tuple[list[RenderedPrompt], list[UnusablePrompt]]:
    """Apply the policy's chat template and tokenise, once for the whole run.

    Args:
        tokenizer: of the policy.
        prompts: (prompt_id, messages) of each prompt.
        template: see :func:`resolve_chat_template`.
        max_new_tokens: length limit of a completion, tokens.
        max_positions: length limit of prompt and completion together, tokens.
        day: the date that a template which reads the clock is given.
        refuses_control_tokens: whether a prompt whose messages write special tokens of the tokenizer is unusable.

    Returns:
        The prompts as the policy reads them, and those that it cannot read, each with the reason.

    Raises:
        InputError: there is no chat template, or its rendering depends on anything but the messages.
    """
    chat_template = resolve_chat_template(tokenizer, template)
    require_repeatable(chat_template, setting="reference.template", clock=day is not None)
    control_tokens = special_tokens(tokenizer)
    rendered: list[RenderedPrompt] = []
    unusable: list[UnusablePrompt] = []
    for prompt_id, messages in prompts:
        try:
            prompt = _render(tokenizer, prompt_id, messages, chat_template, day, control_tokens)
        except RenderingError as error:
            unusable.append(UnusablePrompt(prompt_id, str(error)))
            continue
        if prompt.has_control_tokens and refuses_control_tokens:
            unusable.append(UnusablePrompt(prompt_id, "a message writes special tokens of the tokenizer"))
        elif len(prompt.token_ids) + max_new_tokens > max_positions:
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
    tokenizer: PreTrainedTokenizerBase,
    prompt_id: str,
    messages: Sequence[Mapping[str, str]],
    chat_template: str,
    day: date | None,
    control_tokens: frozenset[str],
) -> RenderedPrompt:
    text = render_chat(tokenizer, messages, chat_template=chat_template, add_generation_prompt=True, day=day)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return RenderedPrompt(
        prompt_id,
        text,
        np.array(with_one_bos(ids, tokenizer.bos_token_id), dtype=np.int32),
        any(token in str(message["content"]) for message in messages for token in control_tokens),
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The texts that a tokenizer reads as one control token wherever they stand."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens)) - {""}


def served_template(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Sequence[Mapping[str, str]]],
    *,
    template: str | None,
    day: date | None = None,
) -> str:
    """The chat template to save with a policy: whoever applies it gets the token ids the policy was trained on.

    Training reads exactly one BOS in front where the tokenizer has one, whether the template writes it or not; whoever
    serves the policy has only what the template writes.

    Args:
        tokenizer: of the policy.
        prompts: some conversations of the run.
        template: of the recipe.
        day: the date that a template which reads the clock is given.

    Raises:
        InputError: no template gives the token ids of the prompts.
    """
    own = resolve_chat_template(tokenizer, template)
    usable = []
    for messages in prompts:
        try:
            usable.append((messages, _render(tokenizer, "", messages, own, day, frozenset()).token_ids.tolist()))
        except RenderingError:  # it was not sampled from
            continue
    for candidate in (own, "{{ bos_token }}" + own):
        if all(_served_ids(tokenizer, messages, candidate, day) == ids for messages, ids in usable):
            return candidate
    raise InputError(
        "the chat template of `reference.template` writes no or several BOS tokens, where the policy is trained with "
        "one; as it stands it cannot be saved with the policy. Give a template that writes {{ bos_token }} once, first"
    )


def _served_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], template: str, day: date | None
) -> list[int]:
    text = render_chat(tokenizer, messages, chat_template=template, add_generation_prompt=True, day=day)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
