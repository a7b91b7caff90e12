"""Scores of a head of a sequence classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

from pipeline.scorers.kind import Check, affine_of
from pipeline.scorers.models import Models
from pipeline.scorers.text_models import TextScorerSettings, text_arguments
from stage1_dual.checkpoints import check_scorer_checkpoint, check_template
from stage1_dual.scoring.outputs import HeadOutput
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer


class SequenceClassificationSettings(TextScorerSettings):
    """One head of a sequence classifier; scorers of one checkpoint, read alike, share its forward pass."""

    kind: Literal["sequence_classification"] = "sequence_classification"
    head: int | str = 0
    """Index of the head, or its label."""
    output: Literal["logit", "probability"] = "logit"


def check_classifier(settings: SequenceClassificationSettings, models: Models) -> Iterator[Check]:
    if "" in models:
        yield partial(
            check_scorer_checkpoint,
            models[""].path,
            head=settings.head,
            template=settings.template,
            revision=models[""].revision,
        )
    else:
        yield partial(check_template, settings.template)


def start_classifier(
    settings: Sequence[SequenceClassificationSettings], models: Models
) -> Callable[..., SequenceClassificationScorer]:
    outputs = tuple(HeadOutput(one.head, one.output, affine_of(one)) for one in settings)
    return partial(SequenceClassificationScorer, models[""].path, outputs=outputs, **text_arguments(settings, models))
