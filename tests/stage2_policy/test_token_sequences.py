from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.contracts.tables import TOKEN_IDS
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


def test_a_table_is_read_where_it_lies_however_it_is_cut() -> None:
    columns = {
        name: pa.array([pair[place] for pair in PAIRS], pa.list_(pa.int32())) for place, name in enumerate(TOKEN_IDS)
    }
    table = pa.table(columns)
    cut = pa.concat_tables([table.slice(1, 2), table.slice(4), table.slice(0, 1), table.slice(3)])
    sequences = TokenSequences.of_table(cut)
    assert as_lists(sequences) == [*PAIRS[1:3], PAIRS[0], PAIRS[3]]
    assert sequences.lengths.tolist() == [5, 1, 3, 4]


def test_a_selection_reads_the_same_lists() -> None:
    sequences = TokenSequences.of(PAIRS).select(np.array([3, 1]))
    assert as_lists(sequences) == [PAIRS[3], PAIRS[1]]
    assert sequences.lengths.tolist() == [4, 5]
    assert as_lists(sequences.select(np.array([True, False]))) == [PAIRS[3]]
