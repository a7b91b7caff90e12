"""What a sampler takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Distribution:
    """Which distribution over the next token is drawn from; by default the policy's own, over its whole vocabulary.

    Attributes:
        temperature: the logits are divided by it.
        top_p: the smallest set of tokens with this much probability is kept.
        top_k: this many of the likeliest tokens are kept; 0 for all.
        min_p: tokens with less than this share of the likeliest one's probability are left out.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_the_policy(self) -> bool:
        """Whether samples are draws from the policy itself, as the formulas of both stages assume."""
        return self == Distribution()


THE_POLICY = Distribution()


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


OnTokens = Callable[[int], None]
"""Told of tokens as they are drawn: how many since it was told before."""


class Sampler(Protocol):
    """Draws from a policy, by default at temperature 1 over its whole vocabulary."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, ascending."""
        ...

    @property
    def feeds_on(self) -> bool:
        """Whether it wants its requests in one stream, so that no shard of a table waits for the longest completion of
        the one before.

        A completion then depends, within the rounding of its logits, on what is computed beside it, hence on where the
        stream began; otherwise it depends on the requests of its shard alone.
        """
        ...

    def stream(
        self, requests: Iterable[SampleRequest], *, on_tokens: OnTokens | None = None
    ) -> Iterator[tuple[SampleRequest, SampledCompletion]]:
        """One completion a request, as they are done; they depend on the requests alone, not on earlier calls.

        Args:
            requests: taken as there is room for them.
            on_tokens: told of progress, every now and then.
        """
        ...

    def describe(self) -> Mapping[str, object]:
        """The resolved sampling parameters, JSON-serialisable."""
        ...

    def close(self) -> None:
        """Free the model; the sampler is of no use afterwards."""
        ...


def sample_all(sampler: Sampler, requests: Sequence[SampleRequest]) -> list[SampledCompletion]:
    """One completion a request, in the order of the requests; no two may be of one prompt and index."""
    drawn = {(done.prompt_id, done.sample_index): completion for done, completion in sampler.stream(requests)}
    return [drawn[request.prompt_id, request.sample_index] for request in requests]
