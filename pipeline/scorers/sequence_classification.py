"""Scores of a head of a sequence classifier."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.scorers.models import Models, Source
from pipeline.scorers.text_models import TextScorerSettings
from stage1_dual.checkpoints import check_scorer_checkpoint
from stage1_dual.scoring.outputs import HeadOutput
from stage1_dual.scoring.protocol import Scorer
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer
from stage1_dual.scoring.vllm_pooling import require_pooled


class SequenceClassificationSettings(TextScorerSettings):
    """One head of a sequence classifier; scorers of one checkpoint, read alike, share its forward pass."""

    scorer: ClassVar = SequenceClassificationScorer
    not_identity: ClassVar = TextScorerSettings.not_identity | {"checked_share", "engine_limit"}

    kind: Literal["sequence_classification"] = "sequence_classification"
    head: int | str = 0
    """Index of the head, or its label."""
    output: Literal["logit", "probability"] = "logit"
    """What is read off the head."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What computes the scores; vLLM's are compared with those of transformers."""
    checked_share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the texts that vLLM is compared on, besides the longest of every shard."""
    engine_limit: Annotated[float, Field(gt=0)] = 1e-4
    """Largest difference to transformers above which the step fails, score units; a share of scores above 1."""

    @model_validator(mode="after")
    def _of_vllm(self) -> Self:
        changed = [
            name
            for name in ("checked_share", "engine_limit")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if changed and self.engine != "vllm":
            raise ValueError(f"{' and '.join(changed)} belong to `engine: vllm`, and the engine is {self.engine}")
        return self

    def check_checkpoint(self, source: Source) -> None:
        """That it is a sequence classifier with the head and a template, which the engine reads."""
        heads = check_scorer_checkpoint(source.path, head=self.head, template=self.template, revision=source.revision)
        if self.engine == "vllm" and heads is not None:
            require_pooled(heads, checkpoint=source.path)

    def head_output(self) -> HeadOutput:
        """The logit of the head, or its probability."""
        return HeadOutput(self.head, self.output, self.affine)

    def packages(self) -> tuple[str, ...]:
        """The engine."""
        return ("vllm",) if self.engine == "vllm" else ()

    @property
    def copies(self) -> int:
        """By vLLM two: what it is compared with is held beside it."""
        return 2 if self.engine == "vllm" else 1

    def identity_settings(self) -> Mapping[str, Any]:
        """The settings that determine its values; the engine only where it is not the one that there was first."""
        settings = dict(super().identity_settings())
        if self.engine == "transformers":
            del settings["engine"]
        return settings

    def shared_settings(self) -> Hashable:
        """What two heads must have in common to be read off one pass."""
        return super().shared_settings(), self.engine

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., Scorer]:
        """All heads of one pass, checked as the strictest of them asks."""
        return partial(
            super().start(scorers, models),
            engine=scorers[0].engine,
            checked_share=max(one.checked_share for one in scorers),
            engine_limit=min(one.engine_limit for one in scorers),
        )
