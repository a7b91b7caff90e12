"""Scored rows by hand, as a demand is posed on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.statistics import Statistic, StatisticColumns, statistic_columns


@dataclass(frozen=True)
class Rows:
    """Rows by hand."""

    prompt_n: np.ndarray
    reward_n: FloatArray
    scores: dict[str, FloatArray]
    columns: dict[str, np.ndarray]

    def score_n(self, name: str) -> FloatArray:
        return self.scores[name]

    def statistic_columns(self, statistic: Statistic, *, at: float | None = None) -> StatisticColumns:
        return statistic_columns(statistic, self.scores, self.columns, at=at)
