"""A fast network that is held to the numbers of another one on a share of the texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.shared_prefix import PaddingCounts
from stage1_dual.scoring.text_scores import TextNetwork

Cut = Callable[[Sequence[int]], Sequence[int]]


class CheckedNetwork:
    """Computes all texts with one network and a share of them with another, and stops where the two differ.

    Which texts are checked depends on their tokens alone: each with the probability ``share``, and the longest of each
    call, where positions and lengths go wrong first.

    Args:
        fast: computes all texts.
        trusted: computes those that are checked.
        share: of the texts, above 0 and at most 1.
        limit: largest difference of an output that is let pass, score units; of an output above 1, a share of it.
        cut: what of a text's tokens the fast network reads.
        names: of the two, and of the setting that holds the limit, for messages.
    """

    def __init__(
        self,
        fast: TextNetwork,
        trusted: TextNetwork,
        *,
        share: float,
        limit: float,
        cut: Cut,
        names: tuple[str, str, str],
    ) -> None:
        self._fast, self._trusted = fast, trusted
        self._share, self._limit = share, limit
        self._cut = cut
        self._names = names
        self.checked = 0
        self.largest = 0.0

    @property
    def counts(self) -> PaddingCounts:
        """The tokens that went through the fast network so far."""
        return self._fast.counts

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:
        """Raw outputs of all heads for each text, float64, shape (n, heads), by the fast network.

        Raises:
            InputError: the two networks differ by more than the limit on a text that was checked.
        """
        found = self._fast.logits([self._cut(ids) for ids in token_ids], groups)
        rows = chosen_rows(token_ids, share=self._share)
        expected = self._trusted.logits([token_ids[row] for row in rows], [groups[row] for row in rows])
        difference = np.abs(found[rows] - expected) / np.maximum(1.0, np.abs(expected))
        self.checked += len(rows)
        self.largest = float(np.fmax(self.largest, difference.max()))
        if not difference.max() <= self._limit:  # a number that is none is a difference too
            fast, trusted, setting = self._names
            beyond = int((~(difference <= self._limit)).any(axis=1).sum())
            row, head = np.unravel_index(int(np.argmax(np.nan_to_num(difference, nan=np.inf))), difference.shape)
            raise InputError(
                f"{fast} gives other scores than {trusted}: {beyond} of {len(rows)} checked texts differ by more than "
                f"`{setting}`, {self._limit:g} (head {head} of a text of {len(token_ids[rows[row]])} tokens is "
                f"{found[rows][row, head]:.6g}, by {trusted} {expected[row, head]:.6g}; of a score above 1 its share "
                "counts); none of them is written"
            )
        return found


def chosen_rows(token_ids: Sequence[Sequence[int]], *, share: float) -> list[int]:
    """The places of the texts that are checked, ascending: a share by the hash of their tokens, the longest."""
    chosen = {place for place, ids in enumerate(token_ids) if _uniform(ids) < share} | {
        max(range(len(token_ids)), key=lambda place: len(token_ids[place]))
    }
    return sorted(chosen)


def _uniform(token_ids: Sequence[int]) -> float:
    """A number in [0, 1) that depends on the tokens alone."""
    digest = hashlib.sha256(np.asarray(token_ids, dtype=np.int64).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
