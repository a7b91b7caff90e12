import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.messages import plain_messages

USER = {"role": "user", "content": "why?"}


def test_keys_that_hold_nothing_and_parts_of_text_are_plain() -> None:
    given = [
        {**USER, "name": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]},
    ]
    assert plain_messages(given, place="p") == [USER, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**USER, "tool_calls": [{"id": 1}]}, r"a message has `tool_calls` \(\[\{'id': 1\}\]\), which would be lost"),
        ({"role": "tool", "content": "5", "tool_call_id": "x"}, "a message has `tool_call_id` \\('x'\\)"),
        ({**USER, "name": "Ann"}, "a message has `name`"),
        ({"from": "human", "value": "why?"}, "write its `from` as `role` \\(human is user, gpt is assistant\\)"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "holds the part .*image_url.*; parts must be texts",
        ),
        ({"role": "user", "content": ["a"]}, "parts must be texts"),
        ({"role": "user"}, "`role` and `content` must be strings"),
        ({"role": None, "content": "a"}, "`role` and `content` must be strings"),
        ("why?", "a message is 'why\\?'; it must have a `role` and a `content`"),
    ],
)
def test_what_would_be_lost_is_refused_by_place(message: object, said: str) -> None:
    with pytest.raises(InputError, match=f"prompts.jsonl, row 3: .*{said}"):
        plain_messages([USER, message], place="prompts.jsonl, row 3")
