"""More prompts in the manner of the embedded world, which they leave as it is."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.config.sections import WIDER, PromptSettings
from pipeline.contracts.errors import InputError
from pipeline.microworld import gold_scores
from pipeline.microworld.grammar import DATA_DIRECTORY, DATA_FILES, read_grammar
from pipeline.sources import wider_prompts as module
from pipeline.sources.prompts import read_prompts
from pipeline.sources.wider_prompts import FILE, known_prompt, split_wider_prompts, wider_prompts


def test_those_of_the_world_are_among_them_each_once() -> None:
    texts = [prompt.text for prompt in wider_prompts()]
    own = [prompt.text for prompt in read_grammar().build_prompts()]
    assert len(texts) == len(set(texts)) == 1920
    assert set(own) < set(texts)


def test_moods_and_topics_have_the_shares_that_they_have_in_the_world() -> None:
    own, wider = read_grammar().build_prompts(), wider_prompts()
    for of in ("mood", "topic"):
        few, many = (Counter(getattr(prompt, of) for prompt in prompts) for prompts in (own, wider))
        assert {name: count / len(own) for name, count in few.items()} == {
            name: count / len(wider) for name, count in many.items()
        }


def test_the_world_knows_nothing_of_them() -> None:
    assert (DATA_DIRECTORY / FILE).is_file()
    assert FILE not in DATA_FILES


def test_each_topic_and_mood_is_in_test_by_the_same_share() -> None:
    split = split_wider_prompts()
    assert Counter(split.values()) == {"train": 1280, "test": 640}
    strata: dict[tuple[str, str], Counter[str]] = {}
    for prompt in wider_prompts():
        strata.setdefault((prompt.topic, prompt.mood), Counter())[split[prompt.text]] += 1
    assert len(strata) == 24
    assert all(counts["train"] == 2 * counts["test"] for counts in strata.values())


def test_prompts_that_the_world_was_trained_on_are_on_both_sides() -> None:
    split = split_wider_prompts()
    assert {split[prompt.text] for prompt in read_grammar().build_prompts()} == {"train", "test"}


def test_they_are_a_source_with_columns() -> None:
    settings = PromptSettings(
        source=WIDER, split_column="split", category_column="category", info_columns=("mood",), system="Be brief."
    )
    table, repeated = read_prompts(settings)
    split = split_wider_prompts()
    assert (table.num_rows, repeated) == (1920, 0)
    for row, prompt in zip(table.to_pylist(), wider_prompts(), strict=True):
        system, asked = row["prompt"]
        assert (system["content"], asked["content"]) == ("Be brief.", prompt.text)
        assert (row["category"], row["split"], row["source"]) == (prompt.topic, split[prompt.text], WIDER)
        assert row["info"] == f'{{"mood": "{prompt.mood}"}}'


def test_a_wider_prompt_is_judged_as_a_known_one_of_its_topic_and_mood() -> None:
    known = {prompt.text: prompt for prompt in read_grammar().build_prompts()}
    for prompt in wider_prompts():
        like = known[known_prompt(prompt.text)]
        assert (like.topic, like.mood) == (prompt.topic, prompt.mood)
    assert known_prompt("What is the capital of France?") == "What is the capital of France?"
    mine = next(iter(known))
    assert known_prompt(mine) == mine


def test_gold_scores_depend_on_nothing_else_of_a_prompt() -> None:
    """Which is what lets a known prompt stand for a wider one."""
    replies = ("That sounds really hard. Talk to someone you trust first.", "Send your flatmate a fake bill. Right.")
    seen: dict[tuple[str, str, str], set[tuple[float, ...]]] = {}
    for prompt in read_grammar().build_prompts():
        for reply in replies:
            scores = tuple(gold_scores(prompt.text, reply).values())
            seen.setdefault((prompt.topic, prompt.mood, reply), set()).add(scores)
    assert all(len(scores) == 1 for scores in seen.values())


GOOD = "wordings: {plain: ['Hm. {Situation}.']}\nsituations: {club: [{text: my coach sulks, who: your coach}]}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "wider.yaml is missing"),
        ("wordings: [", "is not valid YAML"),
        (GOOD.replace("plain", "angry"), "breaks the rules of the grammar.*\n.*angry"),
        (GOOD.replace("club", "garden"), "has situations of 'garden'; the topics are flatmates, "),
        (GOOD.replace("my coach sulks", "my coach shouts at me"), "repeats a wording or a situation"),
        (GOOD.replace("Hm. {Situation}.", "{Situation}. How should I handle it?"), "repeats a wording or a situation"),
    ],
)
def test_a_wrong_file_is_one_message(tmp_path, monkeypatch, content, message) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    read_grammar()
    monkeypatch.setattr(module, "DATA_DIRECTORY", tmp_path)
    wider_prompts.cache_clear()
    try:
        with pytest.raises(InputError, match=message):
            wider_prompts()
    finally:
        wider_prompts.cache_clear()


def test_there_is_no_other_source_in_the_world() -> None:
    with pytest.raises(ValueError, match=r"there is no source 'embedded:wide' in the embedded world; there are"):
        PromptSettings(source="embedded:wide")
