"""The step ``score``: every response with every scorer."""

from __future__ import annotations

from pipeline.run.run import Run
from pipeline.scoring.sample_scores import score_samples


def score(run: Run) -> None:
    """Score every response with every scorer, those of a data set with those of the reward and the constraints."""
    for responses in run.response_sets():
        # What is asked next may need another score of the samples; of pairs, training needs these.
        names = run.config.needed_scores() if responses.paired else None
        score_samples(run, responses, step="score", names=names)
