"""What the samples are and are not, for whoever relies on a ``dual.json``: truncation, gaps, another distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.scoring.joined import JoinedScores, OnLength
from stage1_dual.sampling.protocol import THE_POLICY


def describe_truncation(rows: JoinedScores, on_length: OnLength, *, names: Sequence[str]) -> dict[str, Any]:
    """How many responses the token limit cut off, and what leaving them out does to each mean.

    Args:
        rows: all scored rows of a split.
        on_length: what became of them.
        names: the reward, then the scores of the constraints.

    Returns:
        ``rule``, ``share`` and ``means``: for each score the mean over prompts with all responses and with the
        finished ones only, null where no response was finished.
    """
    finished = rows.select(~rows.cut_off_n)
    return {
        "rule": on_length,
        "share": float(rows.cut_off_n.mean()),
        "means": [
            {"name": name, "all": with_all, "finished": without}
            for name, with_all, without in zip(names, _means(rows), _means(finished), strict=True)
        ],
    }


def describe_faults(
    *,
    sampling: Mapping[str, Any],
    truncation: Mapping[str, Any],
    n_unscored: int,
    n_prompts_lost: int,
    n_unsampled: int,
    n_prompts_left_out: int,
) -> list[str]:
    """Sentences for ``warnings``; none where the samples are what the dual takes them for.

    Args:
        sampling: settings of the samples' manifest.
        truncation: see :func:`describe_truncation`.
        n_unscored: samples without a score.
        n_prompts_lost: prompts of which no response takes part.
        n_unsampled: responses that were asked for and could not be drawn.
        n_prompts_left_out: prompts of the source beyond the limit of the recipe.
    """
    itself = asdict(THE_POLICY)
    changed = ", ".join(f"{name} {sampling[name]:g}" for name, value in itself.items() if sampling[name] != value)
    faults = []
    if changed:
        faults.append(
            f"the samples are not draws of the reference ({changed}): what is predicted, and the KL, refer to the "
            "changed distribution, and the model that is fine-tuned starts from another one"
        )
    if truncation["rule"] != "keep" and truncation["share"] > 0:
        done = "were left out" if truncation["rule"] == "drop" else "were scored as if they were whole"
        faults.append(f"{truncation['share']:.1%} of the responses were cut off by the token limit and {done}")
    for count, what in (
        (n_unsampled, "responses could not be drawn (samples/failures.json)"),
        (n_unscored, "samples could not be scored (scores/*/failures.json)"),
        (n_prompts_lost, "prompts have no response left and do not take part"),
        (n_prompts_left_out, "prompts of the source are beyond `prompts.limit` and were left out"),
    ):
        if count:
            faults.append(f"{count} {what}")
    return faults


def _means(rows: JoinedScores) -> list[float | None]:
    """Mean over prompts of each score, the reward first."""
    values_nc = np.column_stack([rows.reward_n, rows.scores_ns])
    if len(values_nc) == 0:
        return [None] * values_nc.shape[1]
    counts_p = np.bincount(rows.prompt_n)
    return [float(np.mean(np.bincount(rows.prompt_n, column) / counts_p)) for column in values_nc.T]
