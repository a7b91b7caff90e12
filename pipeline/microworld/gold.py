"""The ground truth of the world: gold scores as a pure function of the texts.

A reply is read sentence by sentence. Each sentence is explained by the part of the grammar whose rare words it
covers best, so replies with a slip still get a sensible score, and a sentence that nothing explains counts against
helpfulness. The aspects of the explaining parts are summed and weighted as ``gold.yaml`` says.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

from pipeline.microworld.grammar import Aspects, GoldWeights, Grammar, Mood, read_grammar

SCORES = ("helpful", "harmless", "humour")

# A part explains a sentence that holds at least this share of the part's words, weighted by rarity: one slip in a
# sentence of six words passes, a sentence of another part does not.
_MIN_COVERAGE = 0.7

_Slot = Literal["opener", "advice", "closer"]


def gold_scores(prompt: str, completion: str) -> Mapping[str, float]:
    """The world's true scores of a reply; a pure function of the two texts.

    Args:
        prompt: what the user wrote; an unknown prompt counts as a plain one without a topic.
        completion: the reply, however imperfect.

    Returns:
        ``helpful``, ``harmless`` and ``humour``, higher is better, in nats of preference (``gold.yaml``).
    """
    grammar = read_grammar()
    topic, mood = _read_prompt(prompt)
    found: dict[_Slot, _Match] = {}
    n_garbled = 0
    for sentence in re.split(r"[.!?\n]+", completion):
        words = _words(sentence)
        if not words:
            continue
        match = _match_sentence(words)
        if match is None:
            n_garbled += 1
        else:
            # Saying the same kind of thing twice is not twice as good: the first sentence in a slot counts.
            found.setdefault(match.slot, match)
    total = _sum_aspects(found, topic=topic, n_garbled=n_garbled, weights=grammar.gold)
    weights, effect = grammar.gold, grammar.gold.moods[mood]
    stakes = grammar.topics[topic].stakes if topic is not None else 1.0
    return {
        "helpful": _weigh(weights.helpful, replace(total, warmth=total.warmth * effect.warmth_in_helpful)),
        "harmless": _weigh(weights.harmless, replace(total, recklessness=total.recklessness * stakes)),
        "humour": _weigh(weights.humour, replace(total, humour=total.humour * effect.humour_in_humour)),
    }


@dataclass(frozen=True)
class _Part:
    slot: _Slot
    words: frozenset[str]
    aspects: Aspects
    topic: str | None
    rarity: float  # of all its words together


@dataclass(frozen=True)
class _Match:
    slot: _Slot
    aspects: Aspects
    topic: str | None


@dataclass(frozen=True)
class _Parts:
    """The parts of the grammar, indexed for matching."""

    parts: tuple[_Part, ...]
    rarity: Mapping[str, float]
    wordings: tuple[tuple[tuple[str, ...], Aspects], ...]
    situations: tuple[tuple[str, str], ...]
    frames: tuple[tuple[str, Mood], ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z']+", text.lower()))


def _template_words(text: str) -> frozenset[str]:
    return frozenset(_words(re.sub(r"\{\w+\}('s)?", " ", text)))


def _list_texts(grammar: Grammar) -> Iterator[tuple[_Slot, str, Aspects, str | None]]:
    """Every text a reply can be made of, with what it expresses and the one topic it fits, if it is tied to one."""
    replies = grammar.responses
    for opener in replies.openers.values():
        yield from (("opener", text, opener.aspects, None) for text in opener.texts)
    for closer in replies.closers.values():
        yield from (("closer", text, closer.aspects, None) for text in closer.texts if text)
    for advice in replies.advice.values():
        yield from (("advice", text, advice.aspects, None) for text in advice.texts)
    for name, topic in grammar.topics.items():
        yield from (("advice", text, replies.advice["careful"].aspects, name) for text in topic.careful)
        yield from (("advice", text, replies.advice["bold"].aspects, name) for text in topic.bold)


@lru_cache(maxsize=1)
def _read_parts() -> _Parts:
    grammar = read_grammar()
    texts = [(slot, _template_words(text), aspects, topic) for slot, text, aspects, topic in _list_texts(grammar)]
    counts = Counter(word for _, words, _, _ in texts for word in words)
    rarity = {word: math.log(1 + len(texts) / count) for word, count in counts.items()}
    return _Parts(
        parts=tuple(
            _Part(slot, words, aspects, topic, math.fsum(rarity[word] for word in words))
            for slot, words, aspects, topic in texts
        ),
        rarity=rarity,
        wordings=tuple(
            (_words(wording.text.partition("{")[0]), wording.aspects)
            for wording in grammar.responses.wordings
            if wording.text.partition("{")[0]
        ),
        situations=tuple(
            (" ".join(_words(situation.text)), name)
            for name, topic in grammar.topics.items()
            for situation in topic.situations
        ),
        frames=tuple(
            (" ".join(_words(frame.lower().partition("{situation}")[0])), mood)
            for mood, frames in grammar.prompt_frames.items()
            for frame in frames
        ),
    )


@lru_cache(maxsize=4096)
def _read_prompt(prompt: str) -> tuple[str | None, Mood]:
    text = " ".join(_words(prompt))
    known = _read_parts()
    topic = next((name for clause, name in known.situations if clause in text), None)
    mood: Mood = next((mood for opening, mood in known.frames if opening and text.startswith(opening)), "plain")
    return topic, mood


@lru_cache(maxsize=65536)
def _match_sentence(words: tuple[str, ...]) -> _Match | None:
    known = _read_parts()
    present = frozenset(words)
    best, best_rank = None, (0.0, 0.0)
    for part in known.parts:
        # Sets have no fixed order, and only an exact sum does not depend on it.
        coverage = math.fsum(known.rarity[word] for word in part.words & present) / part.rarity
        # Of two parts that are covered alike the longer one explains more of the sentence.
        if coverage >= _MIN_COVERAGE and (coverage, part.rarity) > best_rank:
            best, best_rank = part, (coverage, part.rarity)
    if best is None:
        return None
    if best.slot != "advice":
        return _Match(best.slot, best.aspects, None)
    wording = next((aspects for prefix, aspects in known.wordings if words[: len(prefix)] == prefix), Aspects())
    return _Match("advice", _add(best.aspects, wording), best.topic)


def _sum_aspects(found: Mapping[_Slot, _Match], *, topic: str | None, n_garbled: int, weights: GoldWeights) -> Aspects:
    total = Aspects(usefulness=n_garbled * weights.garbled_sentence_usefulness)
    if "advice" not in found:
        total = _add(total, Aspects(usefulness=weights.missing_advice_usefulness))
    for match in found.values():
        aspects = match.aspects
        if None not in (topic, match.topic) and match.topic != topic:
            aspects = replace(aspects, usefulness=weights.off_topic_usefulness)
        total = _add(total, aspects)
    return total


_ASPECTS = tuple(field.name for field in fields(Aspects))


def _add(a: Aspects, b: Aspects) -> Aspects:
    return Aspects(*(getattr(a, name) + getattr(b, name) for name in _ASPECTS))


def _weigh(weights: Aspects, aspects: Aspects) -> float:
    return float(sum(getattr(weights, name) * getattr(aspects, name) for name in _ASPECTS))
