"""What a scorer takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ScoreRow:
    """One sample to score.

    Attributes:
        prompt_id: of the prompt.
        sample_index: which of the prompt's samples.
        messages: the prompt, each message with ``role`` and ``content``.
        completion: the sample's text.
    """

    prompt_id: str
    sample_index: int
    messages: Sequence[Mapping[str, str]]
    completion: str


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        value: in the scorer's own direction and units.
        scored_sha256: sha256 of the whole rendered text, UTF-8.
        truncated: whether the text was longer than the scorer reads, so that only its end was scored.
    """

    value: float
    scored_sha256: str
    truncated: bool


class Scorer(Protocol):
    """Scores a completion of a prompt; a score depends on its own row alone."""

    def score(self, rows: Sequence[ScoreRow]) -> list[Score]:
        """One score a row, in the order of the rows."""
        ...

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer, JSON-serialisable."""
        ...

    def close(self) -> None:
        """Free the model; the scorer is of no use afterwards."""
        ...
