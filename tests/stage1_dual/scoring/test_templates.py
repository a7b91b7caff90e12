from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import BOS, Bos, build_tokenizer

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.protocol import ScoreRequest
from stage1_dual.scoring.templates import ScorerTemplate

ROW = ScoreRequest("a", 0, [{"role": "user", "content": " why?"}], " because \n")
BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}<eos>"


def test_the_tokenizers_own_template_is_followed_to_the_letter() -> None:
    template = ScorerTemplate(build_tokenizer(bos="template"), None)
    assert template.render(ROW) == "<bos><user> why?<assistant> because \n<eos>"


def test_a_template_file_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}")
    template = ScorerTemplate(build_tokenizer(), str(path))
    assert template.render(ROW) == "[user] why?[assistant] because \n"
    assert template.sha256 != ScorerTemplate(build_tokenizer(), None).sha256


def test_a_text_template_is_filled_in_once() -> None:
    template = ScorerTemplate(build_tokenizer(), BEAVER)
    assert template.render(ROW) == "BEGINNING OF CONVERSATION: USER:  why? ASSISTANT: because \n<eos>"
    tricky = ScoreRequest("a", 0, [{"role": "user", "content": "{completion} {0} {"}], "{prompt}")
    assert template.render(tricky) == "BEGINNING OF CONVERSATION: USER: {completion} {0} { ASSISTANT:{prompt}<eos>"


@pytest.mark.parametrize("bos", ["tokenizer", "template", "both", "neither"])
@pytest.mark.parametrize("text", [None, BEAVER, BOS + BEAVER])
def test_exactly_one_bos_whoever_adds_it(bos: Bos, text: str | None) -> None:
    tokenizer = build_tokenizer(bos=bos)
    template = ScorerTemplate(tokenizer, text)
    (ids,) = template.encode([template.render(ROW)])
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = build_tokenizer(bos="none")
    template = ScorerTemplate(tokenizer, BEAVER)
    assert tokenizer.decode(template.encode(["hello"])[0]) == "hello"


def test_a_text_template_takes_one_message_only() -> None:
    row = ScoreRequest("a17", 0, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "c")
    with pytest.raises(InputError, match="prompt a17 has 2 messages"):
        ScorerTemplate(build_tokenizer(), BEAVER).render(row)
    assert ScorerTemplate(build_tokenizer(), None).render(row) == "<user>s<user>u<assistant>c<eos>"


def test_a_text_without_a_prompt_reads_the_completion_alone() -> None:
    two = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    template = ScorerTemplate(build_tokenizer(), "{completion}")
    assert template.render(ScoreRequest("a", 0, two, "c {prompt}")) == "c {prompt}"
    assert template.render(ROW) == " because \n"
    assert template.encode(["c"]) == ScorerTemplate(build_tokenizer(), BEAVER).encode(["c"])


def test_a_template_that_refuses_a_prompt_names_it(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ raise_exception('no system message') }}")
    with pytest.raises(InputError, match="refuses prompt a: no system message"):
        ScorerTemplate(build_tokenizer(), str(path)).render(ROW)


@pytest.mark.parametrize("template", ["{prompt} only", "missing.jinja", ""])
def test_what_is_neither_text_nor_file_is_refused(template: str) -> None:
    with pytest.raises(InputError, match="`template` is "):
        ScorerTemplate(build_tokenizer(), template)


def test_no_template_at_all_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        ScorerTemplate(tokenizer, None)
