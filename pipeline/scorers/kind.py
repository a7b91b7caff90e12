"""What a kind of scorer is: its settings, its check before sampling, its identity and how it starts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.contracts.section import Section
from pipeline.scorers.models import Models, ModelSettings
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import Scorer


class ScorerBase(Section):
    """What every scorer has. The value is ``sign * raw + offset``."""

    sign: Literal[1, -1] = 1
    """-1 turns the direction of a score round, as of a cost. A bound from above needs none: see ``direction``."""
    offset: float = 0.0

    def checkpoints(self) -> dict[str, ModelSettings]:
        """The models this scorer loads, by the name of the setting within it; empty for the scorer itself."""
        return {}


TOKEN_IDS = ("prompt_token_ids", "completion_token_ids")

Check = Callable[[], object]


@dataclass(frozen=True)
class ScorerKind:
    """One kind of scorer.

    Attributes:
        check: what can be checked before anything expensive, from the scorer's settings and models, as calls that
            raise InputError.
        share: scorers of the kind with equal values share one pass; None where a scorer always has its own.
        identity: sha256 of what the scorers of one pass read, from the settings of any of them and its models.
        start: starts their scorer, from the settings of all of them and the models.
        reads: as in :class:`ScorerGroup`.
        uses_device: the same.
    """

    check: Callable[[Any, Models], Iterator[Check]]
    share: Callable[[Any, Models], Hashable] | None
    identity: Callable[[Any, Models], str]
    start: Callable[[Sequence[Any], Models], Callable[..., Scorer]]
    reads: Callable[[Any], tuple[str, ...]] = lambda _: ()
    uses_device: bool = True


def affine_of(settings: Any) -> Affine:
    return Affine(sign=settings.sign, offset=settings.offset)
