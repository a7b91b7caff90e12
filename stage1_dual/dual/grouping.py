"""Rows in any order, brought together by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.samples import PassRunner, SampleScores
from stage1_dual.dual.segments import FloatArray

# Ids are spread by this odd multiplier (Knuth's multiplicative hashing).
SPREAD = np.uint64(0x9E3779B97F4A7C15)
_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class UngroupedScores:
    """Some rows, one a response.

    Attributes:
        prompt_n: id of the prompt, shape (n,).
        reward_n: reward units, shape (n,).
        scores_nm: score units, higher better, shape (n, m).
        sample_index_n: which response of its prompt a row is, shape (n,), or None where that is not known.
    """

    prompt_n: NDArray[np.uint64]
    reward_n: FloatArray
    scores_nm: FloatArray
    sample_index_n: NDArray[np.int64] | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[UngroupedScores]) -> UngroupedScores:
        """The rows of all parts, in order; a sample index is known where every part has it."""
        indices = [part.sample_index_n for part in parts if part.sample_index_n is not None]
        return cls(
            np.concatenate([part.prompt_n for part in parts]),
            np.concatenate([part.reward_n for part in parts]),
            np.concatenate([part.scores_nm for part in parts]),
            np.concatenate(indices) if len(indices) == len(parts) else None,
        )


@dataclass(frozen=True, eq=False)
class RepeatedRows:
    """Rows that say again what an earlier row says: its prompt and sample index or, without one, prompt and scores.

    Attributes:
        n_rows: how many; the first of equal rows is not one of them.
        prompt_e: prompts of the first few, shape (e,).
        sample_index_e: their sample indices, shape (e,), or None where there are none.
    """

    n_rows: int
    prompt_e: NDArray[np.uint64]
    sample_index_e: NDArray[np.int64] | None

    @classmethod
    def combine(cls, parts: Sequence[RepeatedRows]) -> RepeatedRows:
        """Of rows none of which is repeated in another part."""
        indices = [part.sample_index_e for part in parts if part.sample_index_e is not None]
        return cls(
            sum(part.n_rows for part in parts),
            np.concatenate([part.prompt_e for part in parts])[:_EXAMPLES],
            np.concatenate(indices)[:_EXAMPLES] if len(indices) == len(parts) else None,
        )


@dataclass(frozen=True, eq=False)
class GroupedSamples:
    """Scores grouped by prompt.

    Attributes:
        scores: the scores.
        prompt_p: id of each prompt in the order of the scores, shape (p,).
        repeated: rows that say again what an earlier one says; they are among the scores.
    """

    scores: SampleScores
    prompt_p: NDArray[np.uint64]
    repeated: RepeatedRows


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
    return GroupedSamples(scores, prompt_p, find_repeated(rows, order_n))


def find_repeated(rows: UngroupedScores, order_n: NDArray[np.int64]) -> RepeatedRows:
    """The repeated rows among some whole prompts.

    Args:
        rows: the rows.
        order_n: brings the rows of a prompt together and leaves them in their order, shape (n,).
    """
    index_n = rows.sample_index_n
    if index_n is None:
        # Adding zero makes one number of its two signs.
        values = [value_n + 0.0 for value_n in (rows.reward_n, *rows.scores_nm.T)]
        hash_n = np.sort(_hash([rows.prompt_n, *(value_n.view(np.uint64) for value_n in values)]))
        return RepeatedRows(int(np.sum(hash_n[1:] == hash_n[:-1])), np.empty(0, np.uint64), None)
    # Nearly every table has the responses of a prompt in ascending order: one look is then enough.
    prompt_n, ordered_n = rows.prompt_n[order_n], index_n[order_n]
    if np.all((ordered_n[1:] > ordered_n[:-1]) | (prompt_n[1:] != prompt_n[:-1])):
        return RepeatedRows(0, np.empty(0, np.uint64), np.empty(0, np.int64))
    # Rows of equal hashes are few, unless much is repeated; which of them are equal is looked at.
    hash_n = _hash([rows.prompt_n, index_n.view(np.uint64)])
    sorted_n = np.sort(hash_n)
    suspect = np.flatnonzero(np.isin(hash_n, sorted_n[1:][sorted_n[1:] == sorted_n[:-1]]))
    prompt_n, index_n = rows.prompt_n[suspect], index_n[suspect]
    order = np.lexsort([suspect, index_n, prompt_n])
    same = (np.diff(prompt_n[order]) == 0) & (np.diff(index_n[order]) == 0)
    repeated = np.sort(order[1:][same])
    return RepeatedRows(len(repeated), prompt_n[repeated[:_EXAMPLES]], index_n[repeated[:_EXAMPLES]])


def _hash(words: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """A 64-bit hash of each row of words: two of a million rows are taken for equal with a probability of 3e-8."""
    hash_n = np.zeros(len(words[0]), np.uint64)
    for word_n in words:
        hash_n = (hash_n ^ word_n) * SPREAD
        hash_n ^= hash_n >> np.uint64(32)
    return hash_n
