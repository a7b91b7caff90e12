"""Chat templates of strangers: read, checked to depend on nothing but their messages, and rendered within a limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes

from pipeline.contracts.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = "strftime_now"
"""The clock that transformers gives to templates."""
_RANDOM = frozenset({"random", "lipsum"})
"""What Jinja itself has at random: a filter and a function."""
_SECONDS = 10
"""A rendering takes well under a millisecond; one that takes this long has loops that do not end."""


class RenderingError(InputError):
    """A chat template cannot render a conversation."""


def template_file(template: str) -> Path | None:
    """The file that a template's text names, None where it names none."""
    try:
        return Path(template) if Path(template).is_file() else None
    except (OSError, ValueError):  # too long for a name, or not one
        return None


def read_template(path: Path, *, setting: str) -> str:
    """The text of a template file.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`{setting}` is the file {path}, which cannot be read as UTF-8 text: {error}") from error


def require_repeatable(template: str, *, setting: str, clock: bool = False) -> None:
    """Refuse a chat template whose rendering depends on anything but its messages.

    Args:
        template: the template's text.
        setting: of the recipe that names it, for messages.
        clock: whether it may ask for the date, because it is given one.

    Raises:
        InputError: it is no template, draws at random, or reads the clock; says what to do.
    """
    try:
        tree = _syntax().parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        raise InputError(f"the chat template of `{setting}` is not valid: {error}") from error
    named = _names(tree)
    if _RANDOM & named:
        raise InputError(
            f"the chat template of `{setting}` draws at random (`{min(_RANDOM & named)}`); a prompt must be rendered "
            "alike whenever it is sampled, scored or trained on"
        )
    if _CLOCK in named and not clock:
        raise InputError(
            f"the chat template of `{setting}` reads the clock (`{_CLOCK}`), so that prompts sampled tomorrow would "
            "be other ones. "
            + (
                "Give `reference.template_date`, such as 2026-01-31, which is then the date of every rendering"
                if setting == "reference.template"
                else "Give the scorer a `template` without it"
            )
        )


def reads_clock(template: str) -> bool:
    """Whether a chat template asks for the date."""
    return _CLOCK in _names(_syntax().parse(template))


def _names(tree: nodes.Template) -> set[str]:
    return {node.name for node in tree.find_all(nodes.Name)} | {node.name for node in tree.find_all(nodes.Filter)}


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    chat_template: str | None,
    add_generation_prompt: bool,
    day: date | None = None,
    template_name: str = "the chat template",
    prompt_name: str = "the prompt",
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: whose special tokens the template may name.
        messages: the conversation.
        chat_template: the template's text; the tokenizer's own where not given.
        add_generation_prompt: whether the text ends where the assistant's turn begins.
        day: what the template is told of the date.
        template_name: for messages.
        prompt_name: likewise.

    Raises:
        RenderingError: the template refuses the conversation, fails on it, or does not end within ten seconds.
    """
    clock: dict[str, Any] = {} if day is None else {_CLOCK: day.strftime}
    try:
        with _time_limit():
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **clock,
            )
    except TemplateError as error:
        raise RenderingError(f"{template_name} refuses {prompt_name}: {error}") from error
    except TimeoutError as error:
        raise RenderingError(f"{template_name} did not end within {_SECONDS} seconds on {prompt_name}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        raise RenderingError(
            f"{template_name} fails on {prompt_name}: {type(error).__name__}: {str(error) or 'no more is said'}"
        ) from error
    assert isinstance(text, str)
    return text


def _syntax() -> Environment:
    """Of templates as transformers compiles them; nothing is rendered with it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Environment = _compile_jinja_template("").environment
    return environment


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError after a while, in the main thread; others have no alarm, and render without a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
