"""What a scorer takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ScoreRequest:
    """One sample to score.

    Attributes:
        prompt_id: of the prompt.
        sample_index: which of the prompt's samples.
        messages: the prompt, each message with ``role`` and ``content``.
        completion: the sample's text.
        prompt_token_ids: the prompt as the policy read it, BOS included.
        completion_token_ids: as sampled, with the EOS where one was drawn.
        columns: further columns of the samples table, for a scorer that asks for them.
        info: of the prompt, the columns of its table that the recipe names in ``prompts.info_columns``.
    """

    prompt_id: str
    sample_index: int
    messages: Sequence[Mapping[str, str]]
    completion: str
    prompt_token_ids: Sequence[int] = ()
    completion_token_ids: Sequence[int] = ()
    columns: Mapping[str, object] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The scores of one sample.

    Attributes:
        values: one per output of the scorer, in the user's units and direction, in the order of the outputs.
        scored_sha256: sha256 of the whole of what was to be scored: of the rendered text (UTF-8) where a model reads a
            text; otherwise as the scorer says.
        truncated: whether the text was longer than the scorer reads, so that only its end was scored.
    """

    values: tuple[float, ...]
    scored_sha256: str
    truncated: bool


@dataclass(frozen=True)
class RowFailure:
    """This row could not be scored; it is counted, recorded and tried again by the next run.

    Attributes:
        reason: one sentence for the user.
    """

    reason: str


class Scorer(Protocol):
    """Scores completions of prompts; a score depends on its own row alone.

    A scorer is built in the process that uses it, from plain arguments, which may hold a ``device``.
    """

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows."""
        ...

    def describe(self) -> Mapping[str, object]:
        """The resolved settings: one ``model`` and a list ``outputs``, JSON-serialisable."""
        ...

    def close(self) -> None:
        """Free the model; the scorer is of no use afterwards."""
        ...


class RepeatableScorer(Scorer, Protocol):
    """A scorer whose scores have noise that another call does not repeat."""

    def score_again(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """The scores of another, independent call, as :meth:`score` gives them."""
        ...
