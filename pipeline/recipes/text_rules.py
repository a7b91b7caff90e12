"""Scores of a text by published rules: sentiment, reading ease, words. Nothing is downloaded; installed by the extra
`smollm2`, from requirements/smollm2.txt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from readability import FleschReadingEase
from readability.langdata import LANGDATA
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

if TYPE_CHECKING:
    from stage1_dual.scoring.protocol import ScoreRequest

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")


def warmth(rows: Sequence[ScoreRequest]) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 (most negative) to 1 (most positive), shape (n,).

    Source: Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text"
    (ICWSM 2014), by the package vaderSentiment.
    """
    analyser = _analyser()
    return [analyser.polarity_scores(row.completion)["compound"] for row in rows]


def reading_ease(rows: Sequence[ScoreRequest]) -> list[float | None]:
    """Flesch's reading ease of each completion, within its scale of 0 (hardest) to 100 (easiest), shape (n,).

    None where there is no word. Formula and syllables by the package readability, whose rules (of the Perl module
    Lingua::EN::Syllable) miss some: "people" has one, "likes" two. A sentence ends at a full stop, an exclamation or
    question mark, or a line break.

    Source: Flesch, "A new readability yardstick" (1948), doi:10.1037/h0057532.
    """
    return [_reading_ease(row.completion) for row in rows]


def words(rows: Sequence[ScoreRequest]) -> list[float]:
    """Words of each completion, shape (n,)."""
    return [float(len(_WORD.findall(row.completion))) for row in rows]


def _reading_ease(text: str) -> float | None:
    found = _WORD.findall(text)
    if not found:
        return None
    count = LANGDATA["en"]["syllables"]
    sentences = sum(_WORD.search(part) is not None for part in _SENTENCE_END.split(text))
    # In lower case, as the package's rules are written: it finds no vowel in capitals, and words of no syllable would
    # read easier than any.
    syllables = sum(max(1, count(word.lower())) for word in found)
    ease = FleschReadingEase(syllables, len(found), sentences)
    return float(min(100.0, max(0.0, ease)))


@lru_cache(maxsize=1)
def _analyser() -> Any:
    return SentimentIntensityAnalyzer()
