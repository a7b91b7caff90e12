"""Rubrics are filled in once, whatever a row holds; answers become numbers by their probabilities."""

from __future__ import annotations

import math
import re

import pytest

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.protocol import ScoreRequest
from stage1_dual.scoring.rubrics import AnswerScale, Question, Rubric

SCALE = AnswerScale((("1", 1.0), ("2", 2.0), ("two", 2.0), ("5", 5.0)))
YES_NO = AnswerScale((("yes", 1.0), ("Yes", 1.0), ("no", 0.0)), "log_odds", 0.0)
HOSTILE = "{prompt} {info.answer} {0} {completion.__class__} \\1 %s {{rating}} $x"


def _row(completion: str = "so", *, messages: int = 1, **info: object) -> ScoreRequest:
    turns = [{"role": ("user", "assistant")[k % 2], "content": f"turn {k}"} for k in range(messages)]
    return ScoreRequest("p", 0, turns, completion, info=info)


def test_what_a_row_holds_is_never_a_place() -> None:
    rubric = Rubric('{prompt} | {completion} | {info.answer} | {"rating": 1} {} {{')
    row = ScoreRequest("p", 0, [{"role": "user", "content": HOSTILE}], HOSTILE, info={"answer": HOSTILE})
    assert rubric.fill(row) == f'{HOSTILE} | {HOSTILE} | {HOSTILE} | {{"rating": 1}} {{}} {{{{'


def test_places_of_a_rubric() -> None:
    assert Rubric("{prompt}{completion}").fill(_row(messages=3)) == (
        "user: turn 0\n\nassistant: turn 1\n\nuser: turn 2so"
    )
    both = Rubric("{completion}{info}")
    assert both.fill(_row(answer="x")) == "sox"
    assert both.fill(_row(answer=[1, "ü"], topic="t")) == 'soanswer: [1, "ü"]\ntopic: t'
    assert (both.info_columns, Rubric("{completion}").info_columns) == (None, ())
    assert Rubric("{info.b} {info.a} {info.b} {completion}").info_columns == ("b", "a")
    with pytest.raises(InputError, match=r"no column .b. in `info`"):
        Rubric("{completion}{info.b}").fill(_row(a=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt}", r"no {completion}"),
        ("{completion} {promt}", "has {promt}; its places are"),
        ("{completion} {prompt.x}", "has {prompt.x}"),
    ],
)
def test_a_rubric_that_is_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Rubric(text)


def test_ratings_and_log_odds() -> None:
    logp = {1.0: math.log(0.5), 2.0: math.log(0.1), 5.0: math.log(0.2)}
    assert SCALE.value_of(logp) == pytest.approx((0.5 + 0.2 + 1.0) / 0.8, abs=1e-12)
    with pytest.raises(InputError, match=r"a probability of 0\.3 together, less than"):
        SCALE.value_of({1.0: math.log(0.3)})
    assert YES_NO.value_of({1.0: -1.0, 0.0: -3.5}) == 2.5
    # Where the odds are beyond what a probability can show, their log is not.
    assert YES_NO.value_of({1.0: -1e-300, 0.0: -800.0}) == pytest.approx(800.0)
    with pytest.raises(InputError, match="no probability to the answers of value 0"):
        YES_NO.value_of({1.0: -0.1})


def test_draws_and_their_texts() -> None:
    read = {"1": 1.0, " 2\n\nAs it": 2.0, "two.": 2.0, "5/5": 5.0, "15": None, "12": None, "I": None, "": None}
    assert {text: SCALE.read_text(text) for text in read} == read
    assert SCALE.mean_of_draws([1.0, 2.0, None, 5.0]) == pytest.approx(8 / 3)
    with pytest.raises(InputError, match="1 of 3 draws"):
        SCALE.mean_of_draws([1.0, None, None])
    with pytest.raises(InputError, match="0 of 1 draws"):
        AnswerScale(SCALE.answers, min_mass=0.0).mean_of_draws([None])


def test_tokens_by_their_texts() -> None:
    logp = {"ye": math.log(0.2), "yes": math.log(0.1), "n": math.log(0.3), "Y": math.log(0.1), "x": -0.1, "": -0.1}
    found = YES_NO.first_tokens(logp)
    assert found == pytest.approx({1.0: math.log(0.4), 0.0: math.log(0.3)})
    AnswerScale((("10", 1.0), ("1", 1.0), ("2", 0.0))).require_distinct_beginnings()
    with pytest.raises(InputError, match="one begins the other"):
        AnswerScale((("1", 1.0), ("10", 10.0))).require_distinct_beginnings()


@pytest.mark.parametrize(
    ("answers", "output", "message"),
    [
        ((("a", 1.0),), "rating", "at least two values"),
        ((("a", 1.0), ("b", 2.0), ("c", 3.0)), "log_odds", "two values"),
        (((" ", 1.0), ("b", 2.0)), "rating", "empty text"),
    ],
)
def test_a_scale_that_is_none(answers: tuple[tuple[str, float], ...], output: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AnswerScale(answers, output)  # type: ignore[arg-type]


def test_a_question_without_rubric_is_the_conversation() -> None:
    question = Question(None, YES_NO)
    assert question.conversation(_row(messages=1)) == [
        {"role": "user", "content": "turn 0"},
        {"role": "assistant", "content": "so"},
    ]
    assert question.info_columns == ()
