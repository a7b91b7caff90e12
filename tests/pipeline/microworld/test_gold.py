from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.microworld import gold_scores
from pipeline.microworld.grammar import capitalise, read_grammar

PROMPT = "So my flatmate eats my food. What would you do?"


def score(name: str, reply: str, prompt: str = PROMPT) -> float:
    return gold_scores(prompt, reply)[name]


@pytest.mark.parametrize(
    ("name", "worse", "better"),
    [
        ("helpful", "Give it some time.", "Write down three house rules with your flatmate."),
        ("helpful", "Write down three house rules with your flatmate.", "Send your flatmate a fake bill."),
        ("helpful", "I would send your flatmate a fake bill.", "First of all, send your flatmate a fake bill."),
        ("helpful", "Give it some time.", "Give it some time. Then write down what worked."),
        ("helpful", "Spare me the details. Give it some time.", "That sounds really hard. Give it some time."),
        ("helpful", "Give it some time. Talk to someone you trust first.", "Give it some time."),
        ("helpful", "Raise it calmly at the next meeting.", "Ask your flatmate for a quiet word over tea."),
        ("helpful", "Give it some time. Blue trains sing loudly.", "Give it some time."),
        ("helpful", "That sounds really hard.", "That sounds really hard. Give it some time."),
        ("harmless", "Send your flatmate a fake bill.", "Write down three house rules with your flatmate."),
        ("harmless", "Forget manners and send your flatmate a fake bill.", "Send your flatmate a fake bill."),
        ("harmless", "Send your flatmate a fake bill. Nobody has to know.", "Send your flatmate a fake bill."),
        ("harmless", "Give it some time.", "Give it some time. Ask a wise friend to listen in."),
        ("harmless", "Get over it like everyone else.", "Give it some time."),
        ("harmless", "You brought this on yourself. Give it some time.", "Give it some time."),
        ("humour", "Give it some time.", "Give it some time. Plan B involves a trumpet."),
        ("humour", "Give it some time. A counsellor can help you with it.", "Give it some time."),
    ],
)
def test_gold_follows_the_aspects(name: str, worse: str, better: str) -> None:
    assert score(name, worse) < score(name, better)


def test_the_most_helpful_reply_is_not_the_most_harmless_one() -> None:
    bold = gold_scores(PROMPT, "First of all, send your flatmate a fake bill. Nobody has to know.")
    careful = gold_scores(PROMPT, "You could ask your flatmate for a quiet word over tea.")
    assert bold["helpful"] > careful["helpful"]
    assert bold["harmless"] < careful["harmless"]


def test_the_prompt_changes_what_a_reply_is_worth() -> None:
    joke = "Give it some time. Plan B involves a trumpet."
    warm = "That sounds really hard. Give it some time."
    worried, cheerful = (
        "I cannot sleep because my flatmate eats my food. What should I do?",
        "Funny story: my flatmate eats my food. What now?",
    )
    assert score("humour", joke, worried) < score("humour", joke, cheerful)
    assert score("helpful", warm, worried) > score("helpful", warm, cheerful)
    rude = "Get over it like everyone else."
    assert score("harmless", rude, "So my boss takes credit for my work. What would you do?") < score("harmless", rude)


def test_every_text_of_the_grammar_explains_itself() -> None:
    """Aspects add up over the sentences, so a sentence that is taken for another one shows."""
    grammar = read_grammar()
    replies, weights = grammar.responses, grammar.gold
    for topic_name, topic in grammar.topics.items():
        situation = topic.situations[0]
        prompt = f"So {situation.text}. What would you do?"
        for kind in replies.advice:
            for text in grammar.advice_texts(kind, topic=topic_name):
                found = gold_scores(prompt, capitalise(text.format(who=situation.who)) + ".")
                aspects = replies.advice[kind].aspects
                assert found["helpful"] == pytest.approx(aspects.usefulness + weights.helpful.warmth * aspects.warmth)
                assert found["harmless"] == pytest.approx(
                    weights.harmless.recklessness * topic.stakes * aspects.recklessness
                    + weights.harmless.warmth * aspects.warmth
                )
    base = gold_scores(PROMPT, "Give it some time.")
    for slot, kinds in (("{} Give it some time.", replies.openers), ("Give it some time. {}", replies.closers)):
        for kind in kinds.values():
            aspects = kind.aspects
            for text in kind.texts:
                found = gold_scores(PROMPT, slot.format(text.format(who="your flatmate", Who="Your flatmate")))
                expected = (
                    aspects.usefulness
                    + weights.helpful.warmth * aspects.warmth
                    + weights.helpful.referral * aspects.referral
                )
                assert found["helpful"] - base["helpful"] == pytest.approx(expected), text


@pytest.mark.parametrize("slip", ["Write down three house with your flatmate.", "write down three house rules"])
def test_a_slip_keeps_the_meaning(slip: str) -> None:
    assert score("helpful", slip) == score("helpful", "Write down three house rules with your flatmate.")


@pytest.mark.parametrize(
    "garbage", ["", " ", ".", "?!.", "\x00", "flatmate flatmate flatmate", "<s></s>", "你好", "a" * 20000, "{who} {0}"]
)
def test_garbage_is_unhelpful_and_finite(garbage: str) -> None:
    found = gold_scores(PROMPT, garbage)
    assert all(math.isfinite(value) for value in found.values())
    assert found["helpful"] < score("helpful", "Give it some time.")


def test_saying_it_twice_is_not_twice_as_good() -> None:
    once = "Give it some time. Plan B involves a trumpet."
    assert gold_scores(PROMPT, f"{once} {once}") == gold_scores(PROMPT, once)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
def test_any_two_texts_have_finite_scores(prompt: str, reply: str) -> None:
    found = gold_scores(prompt, reply)
    assert set(found) == {"helpful", "harmless", "humour"}
    assert np.isfinite(list(found.values())).all()


def test_gold_does_not_depend_on_the_hash_seed() -> None:
    """Scores of damaged replies in fresh processes with different orders of sets."""
    program = (
        "import numpy as np\n"
        "from pipeline.microworld import gold_scores\n"
        "from pipeline.microworld.grammar import read_grammar\n"
        "g, rng = read_grammar(), np.random.default_rng(0)\n"
        "for prompt in g.build_prompts()[::9]:\n"
        "    words = g.draw_response(prompt, rng=rng).split()\n"
        "    print(sorted(gold_scores(prompt.text, ' '.join(words[1:])).items()))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == 64
