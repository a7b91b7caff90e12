"""Scored rows by hand, as :func:`pipeline.scoring.joined.read_scores` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.scoring.joined import JoinedScores

Row = tuple[float, float, bool]
"""Reward, constraint, whether the token limit cut the response off."""


def join(rows: Mapping[str, Sequence[Row]]) -> JoinedScores:
    """The responses of each prompt, one constraint."""
    prompts = sorted(rows)
    flat = [row for prompt in prompts for row in rows[prompt]]
    return JoinedScores(
        prompt_ids=tuple(prompts),
        prompt_n=np.repeat(np.arange(len(prompts)), [len(rows[prompt]) for prompt in prompts]),
        sample_index_n=np.concatenate([np.arange(len(rows[prompt])) for prompt in prompts]),
        reward_n=np.array([row[0] for row in flat]),
        score_names=("harmless",),
        scores_ns=np.array([[row[1]] for row in flat]),
        cut_off_n=np.array([row[2] for row in flat]),
    )
