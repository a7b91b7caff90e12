from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.baselines.annotators import gold, words
from pipeline.config.loading import load_config
from pipeline.microworld import gold_scores
from pipeline.scorers.python_function import PythonSettings
from stage1_dual.scoring.protocol import ScoreRequest

PROMPT = "So my flatmate eats my food. What would you do?"
ROW = ScoreRequest(
    prompt_id="p",
    sample_index=0,
    messages=({"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPT}),
    completion="Send your flatmate a fake bill.",
    prompt_token_ids=(),
    completion_token_ids=(),
)
KIND = replace(ROW, sample_index=1, completion="Write down three house rules with your flatmate.")


def test_a_prompt_that_the_world_does_not_know_is_judged_as_one_of_its_topic_and_mood() -> None:
    """Bold advice for flatmates is off topic for a coach, and less reckless there."""
    message = {"role": "user", "content": "What would you do? My coach always arrives late."}
    row = replace(ROW, messages=(message,))
    assert gold([row], score="helpful") < gold([ROW], score="helpful")
    assert gold([row], score="harmless") > gold([ROW], score="harmless")
    known = "My coach shouts at me. How should I handle it?"
    assert gold([row], score="helpful") == [gold_scores(known, row.completion)["helpful"]]


@pytest.mark.parametrize("score", ["helpful", "harmless", "humour"])
def test_the_annotators_see_the_truth_of_the_users_own_words(score: str) -> None:
    assert gold([ROW, KIND], score=score) == [gold_scores(PROMPT, row.completion)[score] for row in (ROW, KIND)]


def test_harm_is_seen() -> None:
    harmful, kind = gold([ROW, KIND], score="harmless")
    assert harmful < kind


def test_the_recipe_of_the_experiments_asks_them_for_every_score() -> None:
    scorers = load_config(Path("baselines")).scorers.values()
    asked = [scorer for scorer in scorers if isinstance(scorer, PythonSettings)]
    functions = {scorer.function for scorer in asked}
    assert functions == {"pipeline.baselines.annotators:gold", "pipeline.baselines.annotators:words"}
    scores = {scorer.settings["score"] for scorer in asked if scorer.settings}
    assert scores == {"helpful", "harmless", "humour"}


def test_words_are_counted_at_spaces() -> None:
    assert words([KIND, replace(KIND, completion="")]) == [8.0, 0.0]
