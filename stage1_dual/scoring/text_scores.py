"""What all scorers do that read a rendered text with one model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np

from stage1_dual.scoring.outputs import HeadOutput, activate
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.shared_prefix import PaddingCounts
from stage1_dual.scoring.texts import ReadText


class TextNetwork(Protocol):
    """A network with heads on the text it reads."""

    @property
    def counts(self) -> PaddingCounts:
        """Tokens computed so far."""
        ...

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:
        """Raw outputs of all heads for each text, float64, shape (n, heads); texts of a group begin alike."""
        ...


class Reader(Protocol):
    """From rows to the tokens that a network reads."""

    def read(self, rows: Sequence[ScoreRequest]) -> list[ReadText | RowFailure]:
        """One text a row, in the order of the rows; equal texts of a prompt are one object."""
        ...

    def describe(self) -> Mapping[str, object]:
        """How texts are read, JSON-serialisable."""
        ...


class TextScorer:
    """Scores rendered texts with some heads of one network; the scorers of each architecture derive from it.

    Args:
        network: what computes the heads.
        reader: from rows to tokens.
        outputs: what the values are.
        heads: index of the head of each output.
        independent: as :func:`stage1_dual.scoring.outputs.activate` takes it.
        description: the resolved settings, JSON-serialisable; those of the reader are added.
    """

    def __init__(
        self,
        network: TextNetwork,
        *,
        reader: Reader,
        outputs: Sequence[HeadOutput],
        heads: Sequence[int],
        independent: bool,
        description: Mapping[str, object],
    ) -> None:
        self._network: TextNetwork | None = network
        self._reader = reader
        self._outputs, self._heads, self._independent = tuple(outputs), tuple(heads), independent
        self._description = {**description, **reader.describe()}

    @property
    def padding(self) -> PaddingCounts:
        """Tokens computed so far."""
        assert self._network is not None
        return self._network.counts

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows; equal texts are computed once."""
        assert self._network is not None
        texts = self._reader.read(rows)
        distinct = list(dict.fromkeys(text for text in texts if isinstance(text, ReadText)))
        scores: dict[ReadText, Score] = {}
        if distinct:
            raw = self._network.logits([text.token_ids for text in distinct], [text.prompt_id for text in distinct])
            columns = [
                output.affine.sign * activate(raw, output.output, independent=self._independent)[:, head]
                + output.affine.offset
                for output, head in zip(self._outputs, self._heads, strict=True)
            ]
            for text, values in zip(distinct, np.column_stack(columns).tolist(), strict=True):
                scores[text] = Score(tuple(values), text.sha256, text.truncated)
        return [scores[text] if isinstance(text, ReadText) else text for text in texts]

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer, JSON-serialisable."""
        return self._description

    def close(self) -> None:
        """Free the model."""
        self._network = None
