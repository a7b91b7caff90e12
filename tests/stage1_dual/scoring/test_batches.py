from __future__ import annotations

import pytest

from stage1_dual.scoring.batches import batches_by_tokens


@pytest.mark.parametrize("lengths", [[], [3], [5, 1, 9, 2, 9, 4], [7] * 13, list(range(1, 40)), [100, 1, 1]])
@pytest.mark.parametrize("token_budget", [1, 10, 64, 10_000])
def test_every_row_once_and_within_the_budget(lengths: list[int], token_budget: int) -> None:
    batches = list(batches_by_tokens(lengths, token_budget=token_budget))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= token_budget


def test_little_is_padded() -> None:
    lengths = [5 + (37 * place) % 200 for place in range(2000)]
    batches = list(batches_by_tokens(lengths, token_budget=4096))
    padded = sum(len(batch) * max(lengths[place] for place in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
