from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts.errors import InputError
from pipeline.microworld import grammar as grammar_module
from pipeline.microworld.grammar import DATA_DIRECTORY, DATA_FILES, read_grammar

FORBIDDEN = (
    "suicid|self-harm|kill|murder|blood|weapon|gun|knife|bomb|poison|drug|cocaine|heroin|overdose|pill|alcohol|drunk|"
    "sex|naked|nude|rape|hospital|ambulance|die|dead|death|hit|beat|punch|stab|attack|race|religio"
)


@pytest.fixture
def replies() -> list[str]:
    grammar, rng = read_grammar(), np.random.default_rng(0)
    prompts = grammar.build_prompts()
    return [grammar.draw_response(prompts[i], rng=rng) for i in rng.integers(len(prompts), size=5000)]


def test_there_are_enough_distinct_prompts_on_many_topics() -> None:
    prompts = read_grammar().build_prompts()
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 320 + 120
    assert len({prompt.topic for prompt in prompts}) >= 6


def test_texts_are_filled_in_and_look_like_sentences(replies: list[str]) -> None:
    for text in [*replies, *(prompt.text for prompt in read_grammar().build_prompts())]:
        assert re.fullmatch(r"[A-Z][A-Za-z' ,:.?]*[.?]", text), text
        assert not re.search(r"  | [.,?]|[{}]", text), text


def test_replies_are_short_and_varied(replies: list[str]) -> None:
    n_words = np.array([len(reply.split()) for reply in replies])
    assert n_words.min() >= 3
    assert n_words.max() <= 32
    assert 12 <= n_words.mean() <= 24
    assert len(set(replies)) > 4000


def test_one_prompt_has_thousands_of_replies() -> None:
    grammar, rng = read_grammar(), np.random.default_rng(1)
    prompt = grammar.build_prompts()[0]
    assert len({grammar.draw_response(prompt, rng=rng) for _ in range(3000)}) > 2000


def test_no_file_touches_a_forbidden_theme() -> None:
    for name in DATA_FILES:
        found = re.findall(rf"\b(?:{FORBIDDEN})\w*", (DATA_DIRECTORY / name).read_text(encoding="utf-8").lower())
        assert not found, name


def test_draws_depend_on_the_generator_alone() -> None:
    grammar = read_grammar()
    prompt = grammar.build_prompts()[7]

    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [grammar.draw_response(prompt, rng=rng) for _ in range(5)]

    assert draw(5) == draw(5) != draw(6)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("topics.yaml", None, None, r"topics\.yaml is missing.*checkout"),
        ("gold.yaml", "helpful:", "helpful: [", r"gold\.yaml is not valid YAML"),
        ("gold.yaml", "usefulness: 1.0", "utility: 1.0", r"gold\.yaml breaks the rules(.|\n)*utility"),
        ("prompts.yaml", "cheerful:", "gloomy:", r"prompts\.yaml breaks the rules(.|\n)*gloomy"),
        ("responses.yaml", "warm: 0.40", "warm: 0.60", r"responses\.yaml breaks the rules(.|\n)*must sum to 1"),
        ("responses.yaml", "shove:", "push:", r"responses\.yaml breaks the rules(.|\n)*exactly the kinds"),
        ("topics.yaml", "stakes: 1.0", "stakes: -1.0", r"topics\.yaml breaks the rules(.|\n)*stakes"),
    ],
)
def test_a_wrong_file_is_one_message_with_its_name(
    name: str, old: str | None, new: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DATA_DIRECTORY, tmp_path / "microworld")
    path = tmp_path / "microworld" / name
    if old is None or new is None:
        path.unlink()
    else:
        content = path.read_text(encoding="utf-8")
        assert old in content
        path.write_text(content.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr(grammar_module, "DATA_DIRECTORY", tmp_path / "microworld")
    with pytest.raises(InputError, match=message):
        read_grammar.__wrapped__()
