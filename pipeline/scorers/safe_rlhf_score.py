"""Scores of a reward or cost model in the layout of safe-rlhf."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.scorers.models import Source
from pipeline.scorers.text_models import TextScorerSettings
from stage1_dual.checkpoints import check_score_model_checkpoint
from stage1_dual.scoring.outputs import HeadOutput
from stage1_dual.scoring.safe_rlhf_score import SafeRlhfScorer


class SafeRlhfSettings(TextScorerSettings):
    """A reward or cost model in the layout of safe-rlhf, such as Beaver's."""

    scorer: ClassVar = SafeRlhfScorer

    kind: Literal["safe_rlhf_score"]
    head: Annotated[int, Field(ge=0)] = 0
    """Which of the checkpoint's ``score_dim`` scores."""

    def check_checkpoint(self, source: Source) -> None:
        """That it is a score model with the head."""
        check_score_model_checkpoint(source.path, head=self.head, template=self.template, revision=source.revision)

    def head_output(self) -> HeadOutput:
        """The score of the head."""
        return HeadOutput(self.head, "logit", self.affine)
