"""What a sampler takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SampleRequest:
    """One sample to draw.

    Attributes:
        prompt_id: of the prompt.
        prompt_token_ids: the prompt as the model reads it, BOS included.
        sample_index: which of the prompt's samples.
        seed: of this sample's own random stream, in [1, 2**63).
    """

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    sample_index: int
    seed: int


@dataclass(frozen=True)
class SampledCompletion:
    """One sample drawn.

    Attributes:
        text: the decoded tokens, special tokens left out.
        token_ids: the tokens drawn; the last one is the EOS where ``finish_reason`` is ``stop``.
        finish_reason: ``stop`` for a drawn EOS, ``length`` where the token limit came first.
        logp: sum over the tokens drawn of log pi(token | prefix), nats, as this sampler computes it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logp: float


class Sampler(Protocol):
    """Draws from a policy at temperature 1 over its whole vocabulary.

    What :meth:`sample` returns depends on its requests alone, not on earlier calls.
    """

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, ascending."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampledCompletion]:
        """One completion a request, in the order of the requests."""
        ...

    def describe(self) -> Mapping[str, object]:
        """The resolved sampling parameters, JSON-serialisable."""
        ...

    def close(self) -> None:
        """Free the model; the sampler is of no use afterwards."""
        ...
