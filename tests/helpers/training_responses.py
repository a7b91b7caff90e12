"""Scored responses without any run behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stage2_policy.data import TrainingResponses
from stage2_policy.token_sequences import TokenSequences


def responses_of(counts: Sequence[int], *, seed: int = 0) -> TrainingResponses:
    """So many responses to each prompt, of 6 to 34 tokens, with weights from a flat Dirichlet distribution."""
    rng = np.random.default_rng(seed)
    n = sum(counts)
    prompt_p = np.repeat(np.arange(len(counts)), counts)
    weight = np.concatenate([rng.dirichlet(np.ones(count)) for count in counts])
    return TrainingResponses(
        prompt_ids=tuple(f"p{place}" for place in range(len(counts))),
        prompt_p=prompt_p,
        sample_index=np.concatenate([np.arange(count) for count in counts]),
        sequences=TokenSequences.of(([0] * 5, [0] * size) for size in rng.integers(1, 30, size=n)),
        weight=weight,
        tilt=np.log(weight),
        sampler_logp=np.zeros(n),
    )


def keys_of(responses: TrainingResponses) -> list[tuple[str, int]]:
    """Key (prompt_id, sample_index) of each row."""
    places = zip(responses.prompt_p, responses.sample_index, strict=True)
    return [(responses.prompt_ids[place], int(index)) for place, index in places]
