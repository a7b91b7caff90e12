from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.tiny_models import Bos, build_tokenizer, save_tiny_policy

from pipeline.contracts.errors import InputError
from stage1_dual.sampling.rendering import load_tokenizer, read_max_positions, render_prompts, with_one_bos

PROMPT = [{"role": "user", "content": "what could I do?"}]


@pytest.mark.parametrize("bos", ["tokenizer", "template", "both", "neither"])
def test_exactly_one_bos_whoever_adds_it(bos: Bos, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(bos=bos)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    (prompt,), _ = render_prompts(loaded, [("a", PROMPT)], max_new_tokens=8, max_positions=128)
    assert prompt.token_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert prompt.token_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.token_ids[1:]) == "<user>what could I do?<assistant>"


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = build_tokenizer(bos="none")
    (prompt,), _ = render_prompts(tokenizer, [("a", PROMPT)], max_new_tokens=8, max_positions=128)
    assert tokenizer.decode(prompt.token_ids) == prompt.text == "<user>what could I do?<assistant>"


@pytest.mark.parametrize(
    ("given", "bos", "expected"),
    [((5, 6), 1, (1, 5, 6)), ((1, 5), 1, (1, 5)), ((1, 1, 1, 5, 1), 1, (1, 5, 1)), ((5,), None, (5,)), ((), 1, (1,))],
)
def test_with_one_bos(given: tuple[int, ...], bos: int | None, expected: tuple[int, ...]) -> None:
    assert with_one_bos(given, bos) == expected


def test_a_prompt_without_room_is_named_with_its_numbers(tmp_path: Path) -> None:
    folder = str(save_tiny_policy(tmp_path, max_positions=64))
    tokenizer, positions = load_tokenizer(folder), read_max_positions(folder)
    assert positions == 64
    long = [{"role": "user", "content": "why " * 20}]
    (fits,), _ = render_prompts(tokenizer, [("short", PROMPT)], max_new_tokens=8, max_positions=positions)
    limit = len(fits.token_ids) + 8
    assert not render_prompts(tokenizer, [("short", PROMPT)], max_new_tokens=8, max_positions=limit)[1]
    rendered, (failure,) = render_prompts(
        tokenizer, [("short", PROMPT), ("long", long)], max_new_tokens=8, max_positions=limit
    )
    assert [prompt.prompt_id for prompt in rendered] == ["short"]
    assert failure.prompt_id == "long"
    assert re.search(rf"has \d+ tokens.*8 new tokens.*{limit} positions", failure.reason)
    assert not render_prompts(tokenizer, [("short", PROMPT)], max_new_tokens=8, max_positions=limit - 1)[0]


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render_prompts(tokenizer, [("a", PROMPT)], max_new_tokens=8, max_positions=128)


def test_a_prompt_that_the_template_refuses_harms_no_other() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}<user>"
    rendered, (failure,) = render_prompts(
        tokenizer, [("a", PROMPT), ("b", [*PROMPT, *PROMPT])], max_new_tokens=8, max_positions=128
    )
    assert [prompt.prompt_id for prompt in rendered] == ["a"]
    assert (failure.prompt_id, failure.reason) == ("b", "the chat template refuses the prompt: one turn only")


def test_a_text_template_is_taken_to_the_letter(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    text = 'BEGINNING OF "CONVERSATION"\n: USER: {prompt} ASSISTANT:'
    tricky = [{"role": "user", "content": "{{ 7 }} {prompt} \\ é"}]
    (prompt,), _ = render_prompts(tokenizer, [("a", tricky)], template=text, max_new_tokens=8, max_positions=512)
    assert prompt.text == text.replace("{prompt}", tricky[0]["content"])
    assert prompt.token_ids.tolist().count(tokenizer.bos_token_id) == 1
    _, (failure,) = render_prompts(tokenizer, [("b", tricky * 2)], template=text, max_new_tokens=8, max_positions=512)
    assert "takes one message" in failure.reason
    file = tmp_path / "chat.jinja"
    file.write_text("<user>{{ messages[0]['content'] }}<assistant>")
    (prompt,), _ = render_prompts(tokenizer, [("a", PROMPT)], template=str(file), max_new_tokens=8, max_positions=512)
    assert prompt.text == "<user>what could I do?<assistant>"
    with pytest.raises(InputError, match=r"`reference.template` is 'nowhere.jinja'"):
        render_prompts(tokenizer, [("a", PROMPT)], template="nowhere.jinja", max_new_tokens=8, max_positions=512)


@pytest.mark.parametrize("read", [load_tokenizer, read_max_positions])
def test_a_folder_that_is_not_there_is_refused(read: object, tmp_path: Path) -> None:
    assert callable(read)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty cannot be"):
        read(str(tmp_path / "empty"))
