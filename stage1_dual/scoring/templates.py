"""From a prompt and a completion to the tokens a scorer reads, by the scorer's own template."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.contracts.errors import InputError
from stage1_dual.chat_templates import read_template, render_chat, require_repeatable, template_file
from stage1_dual.checkpoints import check_template, is_text_template
from stage1_dual.sampling.rendering import with_one_bos
from stage1_dual.scoring.protocol import ScoreRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScorerTemplate:
    """Renders and tokenises rows for one scorer.

    A chat template, the tokenizer's own or a file's, is followed to the letter: the completion is the last message, of
    role ``assistant``, nothing is stripped, and whether the text ends with an end token is the template's affair. A
    text template such as ``"USER: {prompt} ASSISTANT: {completion}</s>"`` is filled in and encoded as the tokenizer
    encodes any text, with the special tokens it adds by itself; without ``{prompt}`` the scorer reads the completion
    alone, whatever the prompt is. Either way there is exactly one BOS where the
    tokenizer has one.

    Args:
        tokenizer: of the scorer.
        template: None for the tokenizer's chat template, a text with ``{completion}`` and mostly ``{prompt}``, or the
            path of a file with a chat template.

    Raises:
        InputError: the template is none of these, or the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        check_template(template)
        self._tokenizer = tokenizer
        self._text = template if template is not None and is_text_template(template) else None
        self._chat: str | None = None
        if self._text is None:
            path = None if template is None else template_file(template)
            self._chat = tokenizer.chat_template if path is None else read_template(path, setting="template")
            if not self._chat:
                raise InputError(
                    f"the tokenizer of {tokenizer.name_or_path} has no chat template; give the scorer a `template`"
                )
            require_repeatable(self._chat, setting="template")

    @property
    def sha256(self) -> str:
        """The SHA-256 of the template in use."""
        source = self._text if self._text is not None else self._chat
        assert source is not None
        return hashlib.sha256(source.encode()).hexdigest()

    def render(self, row: ScoreRequest) -> str:
        """The whole text of one row.

        Raises:
            InputError: the template refuses the row, or a text template meets a prompt of several messages.
        """
        if self._text is not None:
            prompt = _single_message(row) if "{prompt}" in self._text else ""
            return _fill(self._text, prompt=prompt, completion=row.completion)
        conversation = [*row.messages, {"role": "assistant", "content": row.completion}]
        return render_chat(
            self._tokenizer,
            conversation,
            chat_template=self._chat,
            add_generation_prompt=False,
            template_name="the scorer's chat template",
            prompt_name=f"prompt {row.prompt_id}",
        )

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of rendered texts, uncut."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=self._text is not None,
            truncation=False,
            verbose=False,
            return_attention_mask=False,
        )
        return [with_one_bos(ids, self._tokenizer.bos_token_id) for ids in encoded["input_ids"]]


def _fill(template: str, *, prompt: str, completion: str) -> str:
    """Fill in both places at once: a prompt that itself holds ``{completion}`` stays as it is."""
    pieces = template.replace("{prompt}", "\0prompt\0").replace("{completion}", "\0completion\0").split("\0")
    values: Mapping[str, str] = {"prompt": prompt, "completion": completion}
    return "".join(values[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def _single_message(row: ScoreRequest) -> str:
    if len(row.messages) != 1:
        raise InputError(
            f"prompt {row.prompt_id} has {len(row.messages)} messages; a scorer's text template takes prompts of one "
            "message, a chat template takes any"
        )
    return row.messages[0]["content"]
