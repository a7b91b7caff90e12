"""How trainers elsewhere read a sampled answer: as an assistant's message, by a chat template, after the same prompt.

A response was sampled after the prompt's rendering with the generation prompt, which may end in text that the template
puts into the model's mouth (``<think>``). A trainer renders the whole conversation instead. Where that is not what was
sampled, the answer may begin with that text; where the template changes what an assistant says (cuts its reasoning,
trims it, takes no such message), only another template helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from pipeline.contracts.errors import InputError
from stage1_dual.chat_templates import RenderingError, reads_clock, render_chat
from stage1_dual.sampling.rendering import served_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "dualign-answer"
# Newlines and the empty expression keep the template's own first and last characters: Jinja strips them at blocks.
_BEFORE = (
    "{%- if messages[-1]['role'] == 'assistant' and not add_generation_prompt -%}"
    "{%- set answer, messages, add_generation_prompt = messages[-1]['content'], messages[:-1], true -%}"
    "{%- else -%}{%- set answer = none -%}{%- endif -%}\n"
)
_AFTER = "{{ '' }}{% if answer is not none %}{{ answer + eos_token }}{% endif %}"


@dataclass(frozen=True)
class WholeTurns:
    """What makes a trainer read the responses after the texts they were sampled after.

    Attributes:
        prefill: what each answer is to begin with.
        chat_template: to be given to the trainer; None where the tokenizer's own does it.
        n_otherwise: responses that the tokenizer's own template would render otherwise.
        reason: why, of the first of them; empty where there is none.
        reads_clock: whether the template asks for the date, which it was given.
        first_rendering: the text that the first of the responses was sampled after; empty where there is none.
    """

    prefill: str
    chat_template: str | None
    n_otherwise: int
    reason: str
    reads_clock: bool
    first_rendering: str


def fit_turns(
    tokenizer: PreTrainedTokenizerBase,
    responses: Iterable[tuple[Sequence[Mapping[str, str]], Sequence[str]]],
    *,
    template: str | None,
    day: date | None = None,
) -> WholeTurns:
    """Render every response as a trainer would, and find what is to be changed where it is not what was sampled.

    Args:
        tokenizer: of the reference.
        responses: the messages of each prompt, and the texts that were sampled after them.
        template: of the recipe (:func:`stage1_dual.sampling.rendering.resolve_chat_template`).
        day: the date that a template which reads the clock is given.

    Raises:
        InputError: no chat template renders a response after the text it was sampled after.
    """
    rows = list(responses)
    served = served_template(tokenizer, (messages for messages, _ in rows), template=template, day=day)
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    sampled_after = [
        render_chat(tokenizer, messages, chat_template=served, add_generation_prompt=True, day=day)
        for messages, _ in rows
    ]
    first = next(iter(sampled_after), "")
    prefill, n_otherwise, reason = "", sum(len(texts) for _, texts in rows), "the tokenizer has no chat template"
    if own is not None and rows:
        prefill = _prefill(tokenizer, own, rows[0][0], sampled_after[0], day)
        n_otherwise, reason = _count(tokenizer, own, rows, sampled_after, prefill, day)
    if n_otherwise == 0:
        return WholeTurns(prefill, None, 0, "", reads_clock(served), first)
    whole = _BEFORE + served.removesuffix("\n") + _AFTER  # Jinja itself reads no newline at the very end
    n_wrong, why = _count(tokenizer, whole, rows, sampled_after, "", day)
    if n_wrong:
        raise InputError(f"no chat template renders {n_wrong} responses after the text they were sampled after: {why}")
    return WholeTurns("", whole, n_otherwise, reason, reads_clock(served), first)


def _prefill(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Mapping[str, str]],
    sampled_after: str,
    day: date | None,
) -> str:
    """The end of the generation prompt that an assistant's message does not have before its content."""
    try:
        before, found, _ = _turn(tokenizer, template, messages, _MARK, day).partition(_MARK)
    except RenderingError:
        return ""
    return sampled_after.removeprefix(before) if found and sampled_after.startswith(before) else ""


def _count(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    rows: Sequence[tuple[Sequence[Mapping[str, str]], Sequence[str]]],
    sampled_after: Sequence[str],
    prefill: str,
    day: date | None,
) -> tuple[int, str]:
    """Responses that are rendered otherwise than they were sampled, and how the first of them is."""
    count, reason = 0, ""
    for (messages, texts), before in zip(rows, sampled_after, strict=True):
        for text in texts:
            try:
                rendered = _turn(tokenizer, template, messages, prefill + text, day)
            except RenderingError as error:
                fault = str(error)
            else:
                if rendered.startswith(before + text):
                    continue
                fault = f"{_around(rendered, before + text)!r} where {_around(before + text, rendered)!r} was sampled"
            count, reason = count + 1, reason or fault
    return count, reason


def _turn(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Mapping[str, str]],
    text: str,
    day: date | None,
) -> str:
    answer = {"role": "assistant", "content": text}
    return render_chat(tokenizer, [*messages, answer], chat_template=template, add_generation_prompt=False, day=day)


def _around(text: str, other: str) -> str:
    """Where a text begins to differ from another one."""
    place = next((at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), len(other))
    return text[max(0, place - 20) : place + 20]
