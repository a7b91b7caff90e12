"""Chat messages of strangers' files as this project has them: ``role`` and ``content``, both texts, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.contracts.errors import InputError

_ROLE_OF = "human is user, gpt is assistant"


def plain_messages(messages: Sequence[Any], *, place: str) -> list[dict[str, str]]:
    """The messages, their content parts joined where all of them are text.

    A key that holds nothing (null, or an empty text, list or object) is as if it were not there: files of columns
    give every message every key.

    Args:
        messages: as they were read.
        place: file and row, for messages.

    Raises:
        InputError: a message of another form, or one with keys that would be lost.
    """
    return [_plain_message(message, place=place) for message in messages]


def _plain_message(message: Any, *, place: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InputError(f"{place}: a message is {_shown(message)}; it must have a `role` and a `content`")
    held = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    if "role" not in held and {"from", "value"} & held.keys():
        raise InputError(
            f"{place}: a message has the keys {sorted(held)}; write its `from` as `role` ({_ROLE_OF}) and its `value` "
            "as `content`"
        )
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = _text_of(content, place=place)
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(f"{place}: a message is {_shown(dict(message))}; `role` and `content` must be strings")
    lost = sorted(held.keys() - {"role", "content"})
    if lost:
        raise InputError(
            f"{place}: a message has `{lost[0]}` ({_shown(held[lost[0]])}), which would be lost: a prompt is made of "
            "`role` and `content` alone; write what the model shall read into the content, or remove the key"
        )
    return {"role": role, "content": content}


def _text_of(parts: Sequence[Any], *, place: str) -> str:
    texts = []
    for part in parts:
        held = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
        if held.get("type") != "text" or not isinstance(held.get("text"), str) or len(held) > 2:
            raise InputError(
                f"{place}: the content of a message holds the part {_shown(part)}; parts must be texts, "
                '{"type": "text", "text": ...}'
            )
        texts.append(held["text"])
    return "".join(texts)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
