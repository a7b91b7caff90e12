"""A judge behind a real, local endpoint that answers slowly, refuses, breaks off and babbles."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.judge_server import JudgeServer, serving, share_of

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.endpoint import Endpoint
from stage1_dual.scoring.judge_endpoint import EndpointJudge, Reading
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.rubrics import AnswerScale, Question, Rubric

pytestmark = pytest.mark.slow

KEY = "sk-abcdef0123456789"
SCALE = AnswerScale((("1", 1.0), ("2", 2.0), ("3", 3.0)))
QUESTION = Question(Rubric("Rate {completion} as an answer to {prompt}."), SCALE)


def _rows(n: int) -> list[ScoreRequest]:
    return [ScoreRequest(f"p{k}", k, [{"role": "user", "content": f"why {k}?"}], f"so {k}") for k in range(n)]


def _rate(body: Mapping[str, Any]) -> Mapping[str, float]:
    number = int(body["messages"][0]["content"].split()[2])
    return {"3": 0.6, "1": 0.2, "2": 0.1, "Well": 0.1} if number % 2 else {"1": 0.9, "Well": 0.1}


def _judge(server: JudgeServer, cache: Path | None = None, **settings: Any) -> EndpointJudge:
    reading = settings.pop("reading", Reading())
    question = settings.pop("question", QUESTION)
    endpoint = Endpoint(server.url, key_env="TEST_JUDGE_KEY", **settings)
    return EndpointJudge(endpoint, model="judge", question=question, reading=reading, cache=cache)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _values(scores: list[Score | RowFailure]) -> list[float | None]:
    return [score.values[0] if isinstance(score, Score) else None for score in scores]


def test_the_rating_is_the_mean_under_the_probabilities_of_the_answers(tmp_path: Path) -> None:
    with serving(JudgeServer(_rate, key=KEY)) as server:
        judge = _judge(server, tmp_path)
        odd = (3 * 0.6 + 1 * 0.2 + 2 * 0.1) / 0.9
        assert _values(judge.score(_rows(4))) == pytest.approx([1.0, odd, 1.0, odd], abs=1e-12)
        assert sum(server.answered.values()) == 4
        judge.score(_rows(4))
        judge.close()
        again = _judge(server, tmp_path)
        again.score(_rows(6))
        assert server.answered.total() == 6, "what is kept is not asked for again, by no process"
        again.close()


def test_log_odds_are_those_of_the_two_answers() -> None:
    scale = AnswerScale((("unsafe", -1.0), ("safe", 1.0)), "log_odds")
    question = Question(None, scale)
    asked = []

    def rate(body: Mapping[str, Any]) -> Mapping[str, float]:
        asked.append(body["messages"])
        return {"un": 0.25, "safe": 0.5, "x": 0.25}

    with serving(JudgeServer(rate, key=KEY)) as server:
        judge = _judge(server, question=question)
        assert _values(judge.score(_rows(1))) == pytest.approx([math.log(2)], abs=1e-12)
        assert asked == [[{"role": "user", "content": "why 0?"}, {"role": "assistant", "content": "so 0"}]]
        judge.close()


def test_draws_are_independent_and_their_mean_is_the_rating(tmp_path: Path) -> None:
    with serving(JudgeServer(lambda body: {"1": 0.5, "3.": 0.5}, key=KEY)) as server:
        judge = _judge(server, tmp_path, reading=Reading(draws=8))
        rows = _rows(60)
        first = [value for value in _values(judge.score(rows)) if value is not None]
        second = [value for value in _values(judge.score_again(rows)) if value is not None]
        assert server.answered.total() == 2 * 8 * 60
        assert max(server.seen.values()) == 1, "every draw is a request of its own"
        judge.close()
    # Draws of 1 or 3 have variance 1, their mean of eight 1/8: four standard errors of a mean of 60 and of 120.
    assert abs(sum(first) / 60 - 2) < 4 * math.sqrt(1 / 8 / 60)
    squares = [(a - b) ** 2 / 2 for a, b in zip(first, second, strict=True)]
    assert abs(sum(squares) / 60 - 1 / 8) < 4 * (1 / 8) * math.sqrt(2 / 60)


def test_what_passes_is_waited_for_and_what_is_no_rating_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def fault(body: str, times: int) -> str | None:
        kind = int(share_of(body) * 5)
        if times == 1 and kind < 3:
            return ("429", "500", "truncated")[kind]
        return "unreadable" if int(body[8:10], 16) % 2 else None

    with serving(JudgeServer(_rate, fault=fault, key=KEY, delay=0.05)) as server:
        judge = _judge(server, tmp_path, concurrency=16)
        scores = judge.score(_rows(40))
        unreadable = sum(int(body[8:10], 16) % 2 for body in server.answered)
        assert 0 < unreadable < 40
        assert sum(isinstance(score, RowFailure) for score in scores) == unreadable
        assert set(server.answered.values()) == {1}
        assert len(server.answered) == 40
        assert max(server.seen.values()) == 2
        assert 2 <= server.most_at_once <= 16
        before = server.seen.total()
        assert judge.score(_rows(40)) == scores
        assert server.seen.total() == before, "not even what is no rating is paid for again"
        judge.close()
    reasons = {score.reason for score in scores if isinstance(score, RowFailure)}
    (reason,) = reasons
    assert "a probability of 0 together, less than `min_answer_mass`, 0.5" in reason
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "Well" in kept
    assert KEY not in kept + caplog.text + repr(judge.describe()) + repr(scores)


def test_a_request_that_never_passes_is_one_row(tmp_path: Path) -> None:
    def fault(body: str, times: int) -> str | None:
        return "500" if share_of(body) < 0.5 else None

    with serving(JudgeServer(_rate, fault=fault, key=KEY)) as server:
        judge = _judge(server, tmp_path, retries=1)
        scores = judge.score(_rows(10))
        failed = [score for score in scores if isinstance(score, RowFailure)]
        assert 0 < len(failed) < 10
        assert {score.reason for score in failed} == {
            "the endpoint answered with status 500: for [key], after 1 retries"
        }
        server.fault = lambda body, times: None
        assert all(isinstance(score, Score) for score in judge.score(_rows(10)))
        assert server.answered.total() == 10
        judge.close()


def test_retry_after_holds_everybody_back() -> None:
    first: list[float] = []

    def fault(body: str, times: int) -> str | None:
        first.append(time.monotonic())
        return "429" if len(first) == 1 else None

    with serving(JudgeServer(_rate, fault=fault, key=KEY)) as server:
        judge = _judge(server, concurrency=1)
        judge.score(_rows(3))
        judge.close()
    assert first[1] - first[0] >= 0.2


def test_a_pace_is_kept() -> None:
    with serving(JudgeServer(_rate, key=KEY)) as server:
        judge = _judge(server, requests_per_minute=1200)  # one every 50 ms
        started = time.monotonic()
        judge.score(_rows(9))
        assert time.monotonic() - started >= 8 * 0.05
        judge.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": "sk-another"}, r"status 401: wrong key: Bearer \[key\]"),
        ({"fault": lambda body, times: "404"}, r"status 404: for \[key\]"),
    ],
)
def test_what_every_request_would_meet_stops_the_step(settings: dict[str, Any], message: str) -> None:
    with serving(JudgeServer(_rate, **{"key": KEY, **settings})) as server:
        judge = _judge(server, concurrency=2)
        with pytest.raises(InputError, match=message) as caught:
            judge.score(_rows(50))
        assert KEY not in str(caught.value)
        assert server.seen.total() < 50
        judge.close()


def test_nobody_there_and_no_log_probabilities() -> None:
    with serving(JudgeServer(_rate, key=KEY)) as server:
        pass
    judge = _judge(server, retries=1)
    with pytest.raises(InputError, match="cannot be reached"):
        judge.score(_rows(3))
    judge.close()
    with serving(JudgeServer(_rate, key=KEY)) as server:
        judge = _judge(server, reading=Reading(request={"logprobs": None}))
        with pytest.raises(InputError, match=r"set `endpoint\.draws`"):
            judge.score(_rows(1))
        judge.close()


def test_another_model_under_the_same_name_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with serving(JudgeServer(_rate, key=KEY)) as server:
        judge = _judge(server)
        judge.score(_rows(1))
        assert caplog.text == ""
        server.served = "judge-2"
        judge.score(_rows(2))
        assert "answers for judge as 'judge-2', and before as 'judge-1'" in caplog.text
        judge.close()
