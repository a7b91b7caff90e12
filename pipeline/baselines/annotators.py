"""The annotators of the embedded world: its ground truth as a scorer, and who counts the words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.microworld import gold_scores
from pipeline.sources.wider_prompts import known_prompt
from stage1_dual.scoring.protocol import ScoreRequest


def gold(rows: Sequence[ScoreRequest], *, score: Literal["helpful", "harmless", "humour"]) -> list[float]:
    """The world's true score of each response, in the nats of preference that its annotators choose by."""
    return [gold_scores(known_prompt(row.messages[-1]["content"]), row.completion)[score] for row in rows]


def words(rows: Sequence[ScoreRequest]) -> list[float]:
    """Words of each response, split at spaces."""
    return [float(len(row.completion.split())) for row in rows]
