"""Ratings by a model behind an endpoint: probabilities of its answers, or where it gives none the mean of k draws."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.contracts.artifacts import content_sha256
from pipeline.contracts.errors import InputError
from stage1_dual.scoring.answer_cache import AnswerCache
from stage1_dual.scoring.endpoint import Endpoint, EndpointClient, RequestFailedError
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.rubrics import Question

_log = logging.getLogger("dualign")
_Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """What is asked of the endpoint, and what is read of its answers.

    Attributes:
        draws: None reads the log-probabilities of one answer's first token; a number draws so many answers and takes
            the mean of what they say.
        top_logprobs: most probable tokens whose log-probability is asked for; what is not among them counts as 0.
        max_tokens: of a drawn answer.
        request: further fields of every request, which win over those set here; a null leaves the field out.
    """

    draws: int | None = None
    top_logprobs: int = 20
    max_tokens: int = 16
    request: Mapping[str, Any] = field(default_factory=dict)


class EndpointJudge:
    """Rates responses with a model behind an OpenAI-compatible endpoint, at temperature 1.

    Every answer is kept in ``cache`` before it is used, by the request, and none that is there is asked for again, not
    even one that is no rating. Equal rows are asked once.

    ``scored_sha256`` is that of the messages sent: compact JSON, keys sorted, UTF-8.

    Args:
        endpoint: where requests go.
        model: as the endpoint calls it.
        question: what it is asked.
        reading: of its answers.
        affine: from the judge's number to the user's units.
        cache: folder of the answers; None keeps them in memory alone.

    Raises:
        MissingExtraError: httpx is not installed.
        InputError: the key is not set, or the cache cannot be read.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str,
        question: Question,
        reading: Reading = Reading(),  # frozen
        affine: Affine = Affine(),  # noqa: B008  # frozen
        cache: Path | None = None,
    ) -> None:
        self._endpoint, self._model, self._question, self._reading = endpoint, model, question, reading
        self._affine = affine
        self._client = EndpointClient(endpoint)
        self._cache = AnswerCache(cache)
        self._served: set[str] = set()

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows.

        Raises:
            InputError: the endpoint cannot be reached, refuses every request, or gives no log-probabilities; what was
                answered is kept.
        """
        return self._score(rows, time=0)

    def score_again(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """The scores of another, independent call, as :meth:`score` gives them."""
        return self._score(rows, time=1)

    def describe(self) -> Mapping[str, object]:
        """The resolved settings, JSON-serialisable."""
        return {
            "scorer": "judge",
            "model": self._model,
            "base_url": self._endpoint.base_url,
            "reading": asdict(self._reading),
            "outputs": [{**self._question.describe(), "affine": asdict(self._affine)}],
        }

    def close(self) -> None:
        """Close connections and cache."""
        self._client.close()
        self._cache.close()

    def _score(self, rows: Sequence[ScoreRequest], *, time: int) -> list[Score | RowFailure]:
        asked = [self._ask(row) for row in rows]
        conversations = {one.sha256: one for one in asked if isinstance(one, _Asked)}
        count = 1 if self._reading.draws is None else self._reading.draws
        numbers = range(time * count, (time + 1) * count)
        answers = self._answers([(one, number) for one in conversations.values() for number in numbers])
        values = {sha256: self._value([answers[sha256, number] for number in numbers]) for sha256 in conversations}
        return [one if isinstance(one, RowFailure) else _result(values[one.sha256], one.sha256) for one in asked]

    def _ask(self, row: ScoreRequest) -> _Asked | RowFailure:
        try:
            messages = self._question.conversation(row)
            text = json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            return _Asked(messages, hashlib.sha256(text.encode()).hexdigest())
        except InputError as error:
            return RowFailure(str(error))
        except UnicodeEncodeError as error:
            return RowFailure(f"the text is not Unicode: {error}")

    def _answers(self, jobs: Sequence[tuple[_Asked, int]]) -> dict[tuple[str, int], _Answer | RowFailure]:
        """The answer to each request, of the cache or of the endpoint, by conversation and number of the draw."""
        found: dict[tuple[str, int], _Answer | RowFailure] = {}
        waiting: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
        for asked, number in jobs:
            body = self._body(asked, number)
            request = content_sha256({"body": body, "number": number})
            kept = self._cache.get(request)
            if kept is None:
                waiting[asked.sha256, number] = (request, body)
            else:
                found[asked.sha256, number] = kept
        if waiting:
            found |= self._send(waiting)
        return found

    def _send(
        self, waiting: Mapping[tuple[str, int], tuple[str, dict[str, Any]]]
    ) -> dict[tuple[str, int], _Answer | RowFailure]:
        pool = ThreadPoolExecutor(max_workers=self._endpoint.concurrency)
        try:
            futures: dict[Future[_Answer | RowFailure], tuple[str, int]] = {
                pool.submit(self._one, *job): key for key, job in waiting.items()
            }
            wait(futures, return_when=FIRST_EXCEPTION)
            return {key: future.result() for future, key in _first_faults_first(futures)}
        except BaseException:
            self._client.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, request: str, body: dict[str, Any]) -> _Answer | RowFailure:
        try:
            whole = self._client.complete(body)
        except RequestFailedError as error:
            return RowFailure(str(error))
        answer = self._read(whole)
        self._cache.add(request, answer)
        self._notice(whole.get("model"))
        return answer

    def _body(self, asked: _Asked, number: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": asked.messages, "temperature": 1}
        if self._reading.draws is None:
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": self._reading.top_logprobs}
        else:
            # Draws of one text differ by their seeds, whatever keeps answers on the way.
            body |= {"max_tokens": self._reading.max_tokens, "seed": int(asked.sha256[:6], 16) * 128 + number}
        body |= self._reading.request
        return {name: value for name, value in body.items() if value is not None}

    def _read(self, whole: Mapping[str, Any]) -> _Answer:
        """What is kept of an answer: the text, or the most probable first tokens with their log-probabilities."""
        choice = whole["choices"][0]
        if self._reading.draws is not None:
            message = choice.get("message") if isinstance(choice, Mapping) else None
            content = message.get("content") if isinstance(message, Mapping) else None
            return {"text": self._client.redact(content) if isinstance(content, str) else ""}
        logprobs = choice.get("logprobs") if isinstance(choice, Mapping) else None
        content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
        if logprobs is None:
            raise InputError(
                f"the endpoint {self._endpoint.base_url} gives no log-probabilities of {self._model}; set "
                "`endpoint.draws` to take the mean of so many answers instead"
            )
        tops = content[0].get("top_logprobs") if isinstance(content, list) and content else None
        return {
            "top": {
                str(top["token"]): float(top["logprob"])
                for top in (tops if isinstance(tops, list) else ())
                if isinstance(top, Mapping) and isinstance(top.get("logprob"), int | float)
            }
        }

    def _value(self, answers: Sequence[_Answer | RowFailure]) -> float | RowFailure:
        read: list[_Answer] = []
        for answer in answers:
            if isinstance(answer, RowFailure):
                return answer
            read.append(answer)
        scale = self._question.scale
        try:
            if self._reading.draws is None:
                raw = scale.value_of(scale.first_tokens(read[0]["top"]))
            else:
                raw = scale.mean_of_draws([scale.read_text(answer["text"]) for answer in read])
        except InputError as error:
            return RowFailure(str(error))
        return self._affine.apply(raw)

    def _notice(self, served: object) -> None:
        """Say when the endpoint answers by another model than before: a name may stand for several."""
        if isinstance(served, str) and served not in self._served:
            if self._served:
                _log.warning(
                    "the endpoint %s answers for %s as %r, and before as %r: ratings of two models are no one score",
                    self._endpoint.base_url,
                    self._model,
                    served[:100],
                    min(self._served)[:100],
                )
            self._served.add(served)


@dataclass(frozen=True)
class _Asked:
    """A conversation, and its sha256."""

    messages: list[dict[str, str]]
    sha256: str


def _first_faults_first(
    futures: Mapping[Future[_Answer | RowFailure], tuple[str, int]],
) -> list[tuple[Future[_Answer | RowFailure], tuple[str, int]]]:
    """Futures with their keys, those that raised first: waiting ended with them, and others may not be done."""
    return sorted(futures.items(), key=lambda item: not (item[0].done() and item[0].exception() is not None))


def _result(value: float | RowFailure, sha256: str) -> Score | RowFailure:
    return value if isinstance(value, RowFailure) else Score((value,), sha256, truncated=False)
