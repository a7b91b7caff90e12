"""More prompts than the embedded world has, in its own manner: further wordings and situations beside its own.

They lie outside of :mod:`pipeline.microworld`, whose files are the identity of every world: no model of a world was
trained on them, so that they change none.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import prompt_id
from pipeline.microworld.grammar import (
    DATA_DIRECTORY,
    Grammar,
    GrammarPrompt,
    Mood,
    Situation,
    Text,
    read_grammar,
)

FILE = "wider.yaml"
TEST_SHARE = 1 / 3
"""Of the prompts of each topic and mood."""


class _Additions(BaseModel):
    """The content of ``wider.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wordings: dict[Mood, Annotated[list[Text], Field(min_length=1)]]
    situations: dict[str, Annotated[list[Situation], Field(min_length=1)]]


@lru_cache(maxsize=1)
def wider_prompts() -> tuple[GrammarPrompt, ...]:
    """Every prompt of the world's grammar with the additions, those of the world among them; each once.

    Raises:
        InputError: the file of additions is missing, breaks a rule of the grammar, or repeats what is there.
    """
    grammar = read_grammar()
    prompts = _widened(grammar, _read_additions(DATA_DIRECTORY / FILE, grammar)).build_prompts()
    if len({prompt.text for prompt in prompts}) < len(prompts):
        raise InputError(f"{DATA_DIRECTORY / FILE} repeats a wording or a situation; each must be new")
    return prompts


def known_prompt(text: str) -> str:
    """A prompt that the world's gold scores know and that is like ``text`` in all they ask of it: topic and mood.

    A prompt of the world is its own, and so is a text that no grammar spells.
    """
    return _known_prompts().get(text, text)


@lru_cache(maxsize=1)
def split_wider_prompts() -> Mapping[str, Literal["train", "test"]]:
    """The split of each of :func:`wider_prompts`, by its text.

    Of each topic and mood the same share is ``test``: those whose ``prompt_id``, a hash, comes first. What a
    constraint gains at a prompt depends on these two, and hardly on the situation or the wording besides: of its
    variance over the prompts of the world at lambda* (a margin of 0.6 for both scores, 40 responses) the mood is 62%
    for humour and the topic 23% for harmlessness, finitely many responses are 28% and 53%. A split that left them to
    chance would have the test prompts promise another gain than the train prompts do. That of the world plays no
    part: in both there are prompts that its models were trained on.
    """
    strata: dict[tuple[str, str], list[str]] = {}
    for prompt in wider_prompts():
        strata.setdefault((prompt.topic, prompt.mood), []).append(prompt.text)
    split: dict[str, Literal["train", "test"]] = {}
    for texts in strata.values():
        ordered = sorted(texts, key=lambda text: prompt_id([{"role": "user", "content": text}]))
        n_test = round(TEST_SHARE * len(ordered))
        split |= {text: "test" if place < n_test else "train" for place, text in enumerate(ordered)}
    return split


@lru_cache(maxsize=1)
def _known_prompts() -> Mapping[str, str]:
    own = read_grammar().build_prompts()
    first = {(prompt.topic, prompt.mood): prompt.text for prompt in reversed(own)}
    known = {prompt.text for prompt in own}
    return {prompt.text: first[prompt.topic, prompt.mood] for prompt in wider_prompts() if prompt.text not in known}


def _read_additions(path: Path, grammar: Grammar) -> _Additions:
    try:
        additions = _Additions.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing: the prompts are spelt from the data files of the repository, so install dualign from "
            "a checkout (pip install -e)"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise InputError(f"{path} breaks the rules of the grammar: {error}") from error
    unknown = additions.situations.keys() - grammar.topics.keys()
    if unknown:
        raise InputError(f"{path} has situations of {min(unknown)!r}; the topics are {', '.join(grammar.topics)}")
    return additions


def _widened(grammar: Grammar, additions: _Additions) -> Grammar:
    return Grammar(
        topics={
            name: topic.model_copy(update={"situations": topic.situations + additions.situations.get(name, [])})
            for name, topic in grammar.topics.items()
        },
        prompt_frames={
            mood: (*frames, *additions.wordings.get(mood, [])) for mood, frames in grammar.prompt_frames.items()
        },
        responses=grammar.responses,
        gold=grammar.gold,
    )
