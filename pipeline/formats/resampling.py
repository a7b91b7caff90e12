"""Responses resampled by their tilted weights, for trainers that read no weights."""

from __future__ import annotations

import numpy as np

from pipeline.formats.export_format import ExportSettings
from pipeline.formats.prompt_rows import PromptRows

RESAMPLED_OPTIMUM = (
    "Responses were resampled by their tilted weight, so a trainer needs no weights: plain likelihood of the last "
    "message has the resampled responses as its optimum, which estimate the tilted policy."
)


def resample(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> list[int]:
    """Places of the responses, resampled systematically: one of weight w comes n w times, rounded up or down."""
    n_lines = settings.lines_per_prompt
    places = np.searchsorted(np.cumsum(rows.weight), (rng.random() + np.arange(n_lines)) / n_lines)
    return [int(place) for place in np.minimum(places, len(rows.weight) - 1)]
