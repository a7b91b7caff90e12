"""Rows in any order, brought together by prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.samples import PassRunner, SampleScores
from stage1_dual.dual.segments import FloatArray


@dataclass(frozen=True, eq=False)
class UngroupedScores:
    """Some rows, one a response.

    Attributes:
        prompt_n: id of the prompt, shape (n,).
        reward_n: reward units, shape (n,).
        scores_nm: score units, higher better, shape (n, m).
    """

    prompt_n: NDArray[np.uint64]
    reward_n: FloatArray
    scores_nm: FloatArray


@dataclass(frozen=True, eq=False)
class GroupedSamples:
    """Scores grouped by prompt.

    Attributes:
        scores: the scores.
        prompt_p: id of each prompt in the order of the scores, shape (p,).
    """

    scores: SampleScores
    prompt_p: NDArray[np.uint64]


def order_by_prompt(rows: UngroupedScores) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """The order that brings the rows of a prompt together, and counts and ids of the prompts in it."""
    prompt_p, counts_p = np.unique(rows.prompt_n, return_counts=True)
    return np.argsort(rows.prompt_n, kind="stable"), counts_p.astype(np.int64), prompt_p


def group_in_memory(rows: UngroupedScores, *, executor: PassRunner | None = None) -> GroupedSamples:
    """Group rows that fit in memory; by default a pass uses all cores.

    Raises:
        InputError: scores that differ within a prompt by more than float64 can hold.
    """
    order_n, counts_p, prompt_p = order_by_prompt(rows)
    scores = SampleScores.in_memory(rows.reward_n[order_n], rows.scores_nm[order_n], counts_p, executor=executor)
    return GroupedSamples(scores, prompt_p)
