"""Scores by a rule, for own_models.yaml: a function of rows that returns a number for each."""

from collections.abc import Sequence

from stage1_dual.scoring.protocol import ScoreRequest


def words(rows: Sequence[ScoreRequest]) -> list[float]:
    """How many words each response has."""
    return [float(len(row.completion.split())) for row in rows]
