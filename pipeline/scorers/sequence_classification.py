"""Scores of a head of a sequence classifier."""

from __future__ import annotations

from typing import ClassVar, Literal

from pipeline.scorers.models import Source
from pipeline.scorers.text_models import TextScorerSettings
from stage1_dual.checkpoints import check_scorer_checkpoint
from stage1_dual.scoring.outputs import HeadOutput
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer


class SequenceClassificationSettings(TextScorerSettings):
    """One head of a sequence classifier; scorers of one checkpoint, read alike, share its forward pass."""

    scorer: ClassVar = SequenceClassificationScorer

    kind: Literal["sequence_classification"] = "sequence_classification"
    head: int | str = 0
    """Index of the head, or its label."""
    output: Literal["logit", "probability"] = "logit"

    def check_checkpoint(self, source: Source) -> None:
        """That it is a sequence classifier with the head and a template."""
        check_scorer_checkpoint(source.path, head=self.head, template=self.template, revision=source.revision)

    def head_output(self) -> HeadOutput:
        """The logit of the head, or its probability."""
        return HeadOutput(self.head, self.output, self.affine)
