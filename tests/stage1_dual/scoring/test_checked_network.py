from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import pytest

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.checked_network import CheckedNetwork, chosen_rows
from stage1_dual.scoring.shared_prefix import PaddingCounts

TEXTS = [(*range(1, 2 + place % 7), 100 + place) for place in range(400)]


class Sums:
    """Two heads that sum a text's tokens, and what else it is told to add."""

    def __init__(self, error: Callable[[Sequence[int]], float] = lambda ids: 0.0) -> None:
        self.error = error
        self.counts = PaddingCounts(7, 7, 7)
        self.read: list[tuple[int, ...]] = []

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:
        assert len(groups) == len(token_ids)
        self.read += [tuple(ids) for ids in token_ids]
        return np.array([[sum(ids) / 1000, sum(ids) + self.error(ids)] for ids in token_ids])


def checked(fast: Sums, trusted: Sums, *, share: float = 0.1, limit: float = 1e-4) -> CheckedNetwork:
    return CheckedNetwork(
        fast, trusted, share=share, limit=limit, cut=lambda ids: ids, names=("fast", "slow", "a_limit")
    )


def test_the_values_are_those_of_the_fast_network() -> None:
    fast, trusted = Sums(lambda ids: 0.009), Sums()
    network = checked(fast, trusted)
    found = network.logits(TEXTS, [0] * len(TEXTS))
    assert found[:, 1] == pytest.approx([sum(ids) + 0.009 for ids in TEXTS])
    assert fast.read == TEXTS
    assert trusted.read == [TEXTS[place] for place in chosen_rows(TEXTS, share=0.1)]
    assert network.checked == len(trusted.read)
    # Sums are a hundred and more, and the difference is a share of them.
    assert network.largest == pytest.approx(max(0.009 / sum(ids) for ids in trusted.read))
    assert network.counts == PaddingCounts(7, 7, 7)


def test_which_texts_are_checked_depends_on_their_tokens_alone() -> None:
    rows = chosen_rows(TEXTS, share=0.1)
    assert 20 <= len(rows) <= 60  # a tenth of 400, give or take three standard deviations of 6
    backwards = {TEXTS[::-1][place] for place in chosen_rows(TEXTS[::-1], share=0.1)}
    longest = max(map(len, TEXTS))
    assert {ids for ids in backwards ^ {TEXTS[place] for place in rows} if len(ids) < longest} == set()
    assert chosen_rows(TEXTS, share=1.0) == list(range(400))


def test_the_longest_text_is_always_checked() -> None:
    texts = [(1,), (1, 2, 3), (4, 5)]
    assert chosen_rows(texts, share=1e-12) == [1]


@pytest.mark.parametrize("error", [lambda ids: 0.02, lambda ids: float("nan"), lambda ids: 1e-3 * (len(ids) > 6)])
def test_other_numbers_are_refused(error: Callable[[Sequence[int]], float]) -> None:
    with pytest.raises(
        InputError, match=r"^fast gives other scores than slow: .* more than `a_limit`, 1e-06 \(head 1"
    ):
        checked(Sums(error), Sums(), limit=1e-6).logits(TEXTS, [0] * len(TEXTS))


def test_the_message_has_the_worst_text() -> None:
    texts = [(1, 2), (3, 4, 5), (6,)]
    fast = Sums(lambda ids: {2: 0.5, 3: 3.0, 1: 0.0}[len(ids)])
    with pytest.raises(InputError) as caught:
        checked(fast, Sums(), share=1.0).logits(texts, [0] * 3)
    assert str(caught.value) == (
        "fast gives other scores than slow: 2 of 3 checked texts differ by more than `a_limit`, 0.0001 (head 1 of a "
        "text of 3 tokens is 15, by slow 12; of a score above 1 its share counts); none of them is written"
    )
