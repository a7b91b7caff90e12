"""What a judge is asked: a rubric filled in with a row, or the conversation itself, and the answers it may give."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.protocol import ScoreRequest

JudgeOutput = Literal["rating", "log_odds"]

_PLACE = re.compile(r"\{([A-Za-z_]\w*(?:\.[\w-]+)?)\}")
"""What looks like a place of a rubric: a name in braces. Other braces, as of JSON, are text."""
_PROMPT, _COMPLETION, _INFO = "prompt", "completion", "info"


@dataclass(frozen=True)
class Rubric:
    """The text that a judge reads, with places for a row.

    ``{completion}`` is the response, ``{prompt}`` the prompt (of several messages: each with its role, a blank line
    between two), ``{info.NAME}`` a column of the prompt's table and ``{info}`` its only column, or all of them as
    ``name: value``, one a line. Places are looked for in the rubric alone and filled in at once: what a row holds is
    never read as a place.

    Attributes:
        text: of the rubric.

    Raises:
        InputError: it has no ``{completion}``, or a name in braces that is no place.
    """

    text: str

    def __post_init__(self) -> None:
        if not any(place == _COMPLETION for place in self._places):
            raise InputError("the rubric has no {completion}, so that every response would be rated alike")
        for place in self._places:
            if place not in (_PROMPT, _COMPLETION, _INFO) and not place.startswith(f"{_INFO}."):
                raise InputError(
                    f"the rubric has {{{place}}}; its places are {{prompt}}, {{completion}}, {{info}} and "
                    "{info.NAME}"
                )

    @cached_property
    def _places(self) -> tuple[str, ...]:
        return tuple(_PLACE.findall(self.text))

    @property
    def info_columns(self) -> tuple[str, ...] | None:
        """The columns of the prompts that it has places for; None where it reads all of them."""
        if _INFO in self._places:
            return None
        return tuple(dict.fromkeys(p.removeprefix(f"{_INFO}.") for p in self._places if p.startswith(f"{_INFO}.")))

    def fill(self, row: ScoreRequest) -> str:
        """The text for one row.

        Raises:
            InputError: the row has no such column of ``info``.
        """
        return _PLACE.sub(lambda match: self._value(match[1], row), self.text)

    def _value(self, place: str, row: ScoreRequest) -> str:
        if place == _COMPLETION:
            return row.completion
        if place == _PROMPT:
            return _prompt_text(row.messages)
        if place == _INFO:
            if not row.info:
                raise InputError(
                    "the rubric reads {info}, and the prompt has none; name columns in `prompts.info_columns`"
                )
            if len(row.info) == 1:
                return _info_text(next(iter(row.info.values())))
            return "\n".join(f"{name}: {_info_text(value)}" for name, value in row.info.items())
        name = place.removeprefix(f"{_INFO}.")
        if name not in row.info:
            raise InputError(f"the rubric reads {{{place}}}, and the prompt has no column {name!r} in `info`")
        return _info_text(row.info[name])


def _prompt_text(messages: Sequence[Mapping[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _info_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class AnswerScale:
    """The answers a judge may give, and how its probabilities of them become a number.

    Attributes:
        answers: text of each answer and its value; several texts may have one value.
        output: ``rating`` for the mean of the values under the judge's probabilities of the answers, or ``log_odds``
            for the log-probability of the higher of two values minus that of the lower, nats.
        min_mass: the least probability of all answers together at which their judge is taken to have answered.

    Raises:
        InputError: fewer than two values, or for log-odds more.
    """

    answers: tuple[tuple[str, float], ...]
    output: JudgeOutput = "rating"
    min_mass: float = 0.5

    def __post_init__(self) -> None:
        values = sorted({value for _, value in self.answers})
        if any(not text.strip() for text, _ in self.answers):
            raise InputError("`answers` has an empty text; an answer is a text with its value")
        if len(values) < 2 or (self.output == "log_odds" and len(values) != 2):
            wanted = "two values for `output: log_odds`" if self.output == "log_odds" else "at least two values"
            raise InputError(f"`answers` has the values {values}; it needs {wanted}")

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each answer, in their order."""
        return tuple(value for _, value in self.answers)

    def value_of(self, logp_by_value: Mapping[float, float]) -> float:
        """The judge's number, from the log-probability of each value, nats; a value that is not there has none.

        Raises:
            InputError: the answers have less than ``min_mass`` together, or a side of the log-odds has nothing.
        """
        mass = math.fsum(math.exp(logp) for logp in logp_by_value.values())
        if not mass >= self.min_mass:
            raise InputError(
                f"the judge gives the answers a probability of {mass:.3g} together, less than `min_answer_mass`, "
                f"{self.min_mass:g}: it says something else"
            )
        if self.output == "rating":
            return math.fsum(value * math.exp(logp) for value, logp in logp_by_value.items()) / mass
        low, high = sorted(set(self.values))
        for side in (low, high):
            if not math.isfinite(logp_by_value.get(side, -math.inf)):
                raise InputError(f"the judge gives no probability to the answers of value {side:g}; no log-odds")
        return logp_by_value[high] - logp_by_value[low]

    def mean_of_draws(self, values: Sequence[float | None]) -> float:
        """The mean of the values that were read off draws; None stands for a draw that is no answer.

        Raises:
            InputError: a smaller share than ``min_mass`` are answers.
        """
        found = [value for value in values if value is not None]
        if not found or len(found) < self.min_mass * len(values):
            raise InputError(
                f"{len(found)} of {len(values)} draws of the judge are answers, less than `min_answer_mass`, "
                f"{self.min_mass:g}"
            )
        return math.fsum(found) / len(found)

    def read_text(self, text: str) -> float | None:
        """The value of the answer that a drawn text begins with; None where it begins with none.

        What follows the answer must not go on with a letter or digit: ``4.`` and ``4/5`` are a 4, ``42`` is none.
        """
        begun = text.strip()
        found = [
            (len(answer.strip()), value)
            for answer, value in self.answers
            if begun.startswith(answer.strip()) and not begun[len(answer.strip()) :][:1].isalnum()
        ]
        return max(found)[1] if found else None

    def first_tokens(self, logp_of_text: Mapping[str, float]) -> dict[float, float]:
        """The log-probability of each value, from those of some tokens by their texts: the first of the answer.

        A token counts for the answers that it is, or that begin with it where they have one value.
        """
        total: dict[float, float] = {}
        for token, logp in logp_of_text.items():
            exact = {value for answer, value in self.answers if answer == token}
            begun = {value for answer, value in self.answers if token and answer.startswith(token)}
            values = exact or begun
            if len(values) == 1:
                (value,) = values
                total[value] = total.get(value, 0.0) + math.exp(logp)
        return {value: math.log(mass) for value, mass in total.items() if mass > 0}

    def require_distinct_beginnings(self) -> None:
        """Raise InputError where an answer begins another of another value: by text, a first token is of either."""
        for answer, value in self.answers:
            for other, its in self.answers:
                if other != answer and other.startswith(answer) and its != value:
                    raise InputError(
                        f"`answers` has {answer!r} and {other!r}, of which one begins the other: the first token of "
                        "an endpoint's answer would be of either. Use letters, or ratings of one digit"
                    )


@dataclass(frozen=True)
class Question:
    """What a judge is asked of each row.

    Attributes:
        rubric: filled in, and given to the judge as the user's message; None gives the judge the conversation itself,
            whose last message, of role ``assistant``, is the response: so do the chat templates of guard models.
        scale: the answers.
        as_message: whether the filled rubric is put into the judge's chat template, as opposed to being read as a
            text that the answer continues.
        prefix: what the judge is taken to have begun its answer with; the answer's first token follows.
    """

    rubric: Rubric | None
    scale: AnswerScale
    as_message: bool = True
    prefix: str = ""

    @property
    def info_columns(self) -> tuple[str, ...] | None:
        """The columns of the prompts that it reads; None for all of them."""
        return () if self.rubric is None else self.rubric.info_columns

    def conversation(self, row: ScoreRequest) -> list[dict[str, str]]:
        """The messages that the judge is given.

        Raises:
            InputError: the rubric reads what the row does not have.
        """
        if self.rubric is not None:
            return [{"role": "user", "content": self.rubric.fill(row)}]
        messages = [{"role": message["role"], "content": message["content"]} for message in row.messages]
        return [*messages, {"role": "assistant", "content": row.completion}]

    def describe(self) -> dict[str, object]:
        """What is asked, JSON-serialisable."""
        return {
            "rubric_sha256": None if self.rubric is None else hashlib.sha256(self.rubric.text.encode()).hexdigest(),
            "answers": dict(self.scale.answers),
            "output": self.scale.output,
            "min_answer_mass": self.scale.min_mass,
            "as_message": self.as_message,
            "answer_prefix": self.prefix,
        }
