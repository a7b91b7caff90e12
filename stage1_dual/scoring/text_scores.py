"""What all scorers do that read a rendered text with one model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from stage1_dual.scoring.outputs import HeadOutput, activate
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.texts import ReadText, TextReader

Logits = Callable[[Sequence[Sequence[int]], Sequence[Hashable]], np.ndarray]


def score_texts(
    rows: Sequence[ScoreRequest],
    *,
    reader: TextReader,
    logits: Logits,
    outputs: Sequence[HeadOutput],
    heads: Sequence[int],
    independent: bool,
) -> list[Score | RowFailure]:
    """One result a row, in the order of the rows; equal texts are computed once.

    Args:
        rows: to score.
        reader: from rows to tokens.
        logits: from token ids and the prompts they belong to, to the raw outputs of all heads, (n, heads).
        outputs: what the values are.
        heads: index of the head of each output.
        independent: as :func:`stage1_dual.scoring.outputs.activate` takes it.
    """
    texts = reader.read(rows)
    distinct = list(dict.fromkeys(text for text in texts if isinstance(text, ReadText)))
    scores: dict[ReadText, Score] = {}
    if distinct:
        raw = logits([text.token_ids for text in distinct], [text.prompt_id for text in distinct])
        columns = [
            output.affine.sign * activate(raw, output.output, independent=independent)[:, head] + output.affine.offset
            for output, head in zip(outputs, heads, strict=True)
        ]
        for text, values in zip(distinct, np.column_stack(columns).tolist(), strict=True):
            scores[text] = Score(tuple(values), text.sha256, text.truncated)
    return [scores[text] if isinstance(text, ReadText) else text for text in texts]
