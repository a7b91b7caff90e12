"""The grammar of the world: reads the data files, spells out all prompts and draws replies.

The files lie in ``data/microworld`` of the repository (an editable install or a checkout; they are not part of a
wheel). Each is read once per process and checked as a whole, so that a typing error in one of them is one message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pipeline.contracts.errors import InputError

DATA_DIRECTORY = Path(__file__).resolve().parents[2] / "data" / "microworld"
DATA_FILES = ("topics.yaml", "prompts.yaml", "responses.yaml", "gold.yaml")

Mood = Literal["worried", "plain", "cheerful"]
AdviceKind = Literal["careful", "bold", "vague", "brush_off"]
Text = Annotated[str, Field(min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]

_Key = TypeVar("_Key", bound=str)
_Schema = TypeVar("_Schema")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Aspects:
    """What a part of a reply expresses; dimensionless, 0 where the part says nothing about it."""

    # Read by pydantic: an unknown aspect in a file is an error. A plain dataclass because the gold scores add
    # millions of these.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    warmth: float = 0.0
    usefulness: float = 0.0
    recklessness: float = 0.0
    humour: float = 0.0
    referral: float = 0.0


class Situation(_Strict):
    """One thing people ask about: a first-person clause, and how a reply calls the other person."""

    text: Text
    who: Text


class Topic(_Strict):
    """A category of prompts with the advice that fits no other category."""

    stakes: Annotated[float, Field(gt=0)]
    situations: Annotated[list[Situation], Field(min_length=1)]
    careful: Annotated[list[Text], Field(min_length=1)]
    bold: Annotated[list[Text], Field(min_length=1)]


class Kind(_Strict):
    """Interchangeable texts that share their aspects."""

    aspects: Aspects
    texts: list[str]


class Wording(_Strict):
    """A sentence around a piece of advice."""

    text: Annotated[str, Field(pattern=r"\{(advice|Advice)\}")]
    weight: Annotated[float, Field(gt=0)]
    fits: Annotated[list[AdviceKind], Field(min_length=1)]
    aspects: Aspects


class Mix(_Strict):
    """Probabilities of the kinds: openers and advice by mood, closers by kind of advice."""

    openers: dict[Mood, dict[str, Probability]]
    advice: dict[Mood, dict[AdviceKind, Probability]]
    closers: dict[AdviceKind, dict[str, Probability]]


class Responses(_Strict):
    """The parts of a reply and how they are mixed."""

    openers: dict[str, Kind]
    advice: dict[AdviceKind, Kind]
    wordings: list[Wording]
    closers: dict[str, Kind]
    mix: Mix

    @model_validator(mode="after")
    def _mix_names_known_kinds(self) -> Responses:
        rows: list[tuple[str, Mapping[Any, float], set[Any]]] = [
            *((f"openers.{mood}", row, set(self.openers)) for mood, row in self.mix.openers.items()),
            *((f"advice.{mood}", row, set(self.advice)) for mood, row in self.mix.advice.items()),
            *((f"closers.{kind}", row, set(self.closers)) for kind, row in self.mix.closers.items()),
        ]
        for name, row, kinds in rows:
            if set(row) != kinds:
                raise ValueError(f"mix.{name} must name exactly the kinds {sorted(kinds)}, but names {sorted(row)}")
            if abs(sum(row.values()) - 1) > 1e-9:
                raise ValueError(f"mix.{name} must sum to 1, but sums to {sum(row.values())}")
        return self


class MoodEffect(_Strict):
    """What the mood of a prompt multiplies in the gold scores."""

    warmth_in_helpful: float
    humour_in_humour: float


class GoldWeights(_Strict):
    """Weights of the gold scores, in nats of preference per unit of aspect."""

    helpful: Aspects
    harmless: Aspects
    humour: Aspects
    moods: dict[Mood, MoodEffect]
    off_topic_usefulness: float
    missing_advice_usefulness: float
    garbled_sentence_usefulness: float


@dataclass(frozen=True)
class GrammarPrompt:
    """A prompt with all that the grammar knows about it."""

    text: str
    topic: str
    mood: Mood
    situation: Situation


@dataclass(frozen=True)
class Grammar:
    """The validated content of the data files."""

    topics: Mapping[str, Topic]
    prompt_frames: Mapping[Mood, tuple[str, ...]]
    responses: Responses
    gold: GoldWeights

    def build_prompts(self) -> tuple[GrammarPrompt, ...]:
        """All prompts the grammar can ask, each once, in the order of the files."""
        return tuple(
            GrammarPrompt(
                text=frame.format(situation=situation.text, Situation=capitalise(situation.text)),
                topic=name,
                mood=mood,
                situation=situation,
            )
            for name, topic in self.topics.items()
            for situation in topic.situations
            for mood, frames in self.prompt_frames.items()
            for frame in frames
        )

    def draw_response(self, prompt: GrammarPrompt, *, rng: np.random.Generator) -> str:
        """One reply to ``prompt`` drawn from the grammar."""
        parts, mix = self.responses, self.responses.mix
        opener = _draw_text(parts.openers[_draw_key(mix.openers[prompt.mood], rng=rng)].texts, rng=rng)
        kind = _draw_key(mix.advice[prompt.mood], rng=rng)
        wordings = [wording for wording in parts.wordings if kind in wording.fits]
        weights = np.array([wording.weight for wording in wordings])
        wording = wordings[int(rng.choice(len(wordings), p=weights / weights.sum()))]
        advice = _draw_text(self.advice_texts(kind, topic=prompt.topic), rng=rng)
        closer = _draw_text(parts.closers[_draw_key(mix.closers[kind], rng=rng)].texts, rng=rng)
        sentences = (opener, wording.text.format(advice=advice, Advice=capitalise(advice)), closer)
        who = prompt.situation.who
        return " ".join(sentence.format(who=who, Who=capitalise(who)) for sentence in sentences if sentence)

    def advice_texts(self, kind: AdviceKind, *, topic: str) -> list[str]:
        """The advice of one kind that fits a topic, with ``{who}`` left open."""
        own: dict[AdviceKind, list[str]] = {"careful": self.topics[topic].careful, "bold": self.topics[topic].bold}
        return own.get(kind, []) + self.responses.advice[kind].texts


@lru_cache(maxsize=1)
def read_grammar() -> Grammar:
    """Read and check the data files of the world.

    Raises:
        InputError: a file is missing, is not YAML, or breaks a rule; the message names the file and the rule.
    """
    return Grammar(
        topics=_read_data("topics.yaml", dict[str, Topic]),
        prompt_frames=_read_data("prompts.yaml", dict[Mood, tuple[Text, ...]]),
        responses=_read_data("responses.yaml", Responses),
        gold=_read_data("gold.yaml", GoldWeights),
    )


def capitalise(text: str) -> str:
    """``text`` with a capital first letter and the rest as it was (``str.capitalize`` would lower an `I`)."""
    return text[:1].upper() + text[1:]


def _read_data(name: str, schema: type[_Schema]) -> _Schema:
    path = DATA_DIRECTORY / name
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing: the embedded world is built from the data files of the repository, "
            "so install dualign from a checkout (pip install -e)"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        raise InputError(f"{path} breaks the rules of the grammar: {error}") from error


def _draw_key(probabilities: Mapping[_Key, float], *, rng: np.random.Generator) -> _Key:
    names = list(probabilities)
    return names[int(rng.choice(len(names), p=list(probabilities.values())))]


def _draw_text(texts: list[str], *, rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
