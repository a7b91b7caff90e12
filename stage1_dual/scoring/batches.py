"""Batches of similar length, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_tokens(lengths: Sequence[int], *, token_budget: int) -> Iterator[list[int]]:
    """Places of rows, longest first, in batches whose padded size stays within a budget.

    Args:
        lengths: tokens of each row.
        token_budget: rows times longest row of a batch, at most; a longer row is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows
