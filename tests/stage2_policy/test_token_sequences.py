from __future__ import annotations

import numpy as np

from stage2_policy.token_sequences import TokenSequences

PAIRS = [([1, 2], [3]), ([1, 2], [4, 5, 6]), ([7], []), ([8, 9, 10], [11])]


def as_lists(pairs: object) -> list[tuple[list[int], list[int]]]:
    return [(prompt.tolist(), done.tolist()) for prompt, done in pairs]  # type: ignore[attr-defined]


def test_rows_are_read_by_number_in_slices_and_one_after_the_other() -> None:
    sequences = TokenSequences.of(PAIRS)
    assert len(sequences) == 4
    assert as_lists(sequences) == PAIRS
    assert as_lists([sequences[np.int64(3)]]) == PAIRS[3:]
    assert as_lists(sequences[1:3]) == PAIRS[1:3]
    assert sequences.lengths.tolist() == [3, 5, 1, 4]


def test_a_selection_reads_the_same_lists() -> None:
    sequences = TokenSequences.of(PAIRS).select(np.array([3, 1]))
    assert as_lists(sequences) == [PAIRS[3], PAIRS[1]]
    assert sequences.lengths.tolist() == [4, 5]
    assert as_lists(sequences.select(np.array([True, False]))) == [PAIRS[3]]
