"""Scores of a reward or cost model in the layout of safe-rlhf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from pipeline.scorers.kind import Check, affine_of
from pipeline.scorers.models import Models
from pipeline.scorers.text_models import TextScorerSettings, text_arguments
from stage1_dual.checkpoints import check_score_model_checkpoint, check_template
from stage1_dual.scoring.outputs import HeadOutput
from stage1_dual.scoring.safe_rlhf_score import SafeRlhfScorer


class SafeRlhfSettings(TextScorerSettings):
    """A reward or cost model in the layout of safe-rlhf, such as Beaver's."""

    kind: Literal["safe_rlhf_score"]
    head: Annotated[int, Field(ge=0)] = 0
    """Which of the checkpoint's ``score_dim`` scores."""


def check_score_model(settings: SafeRlhfSettings, models: Models) -> Iterator[Check]:
    if "" in models:
        yield partial(
            check_score_model_checkpoint,
            models[""].path,
            head=settings.head,
            template=settings.template,
            revision=models[""].revision,
        )
    else:
        yield partial(check_template, settings.template)


def start_score_model(settings: Sequence[SafeRlhfSettings], models: Models) -> Callable[..., SafeRlhfScorer]:
    outputs = tuple(HeadOutput(one.head, "logit", affine_of(one)) for one in settings)
    return partial(SafeRlhfScorer, models[""].path, outputs=outputs, **text_arguments(settings, models))
