"""The implicit reward of a preference-tuned policy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.contracts.artifacts import content_sha256
from pipeline.contracts.section import Positive
from pipeline.contracts.tables import TOKEN_IDS
from pipeline.scorers.kind import Check, ScorerSettings
from pipeline.scorers.models import Models, ModelSettings
from pipeline.scorers.text_models import absolute_template
from stage1_dual.checkpoints import check_causal_checkpoint, check_template
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.scoring.log_ratio import LogRatioScorer, read_pairs, require_same_tokenizer


class LogRatioSettings(ScorerSettings, ModelSettings):
    """The implicit reward of a preference-tuned policy: ``scale`` times the log-ratio to its reference."""

    not_identity: ClassVar = frozenset(
        {"model", "revision", "reference", "calibration", "min_accuracy", "batch_tokens"}
    )

    kind: Literal["log_ratio"]
    reference: ModelSettings | None = None
    """The policy it was tuned from; the run's reference where not given."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Score units per nat: the beta of the preference tuning."""
    max_length: Positive | None = None
    """Longest sequence, tokens, beyond which a row fails; the model's own limit where not given."""
    calibration: str | None = None
    """Table of preference pairs (prompt, chosen, rejected), judged when scoring starts; see the manifest."""
    min_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of those pairs the score must get right, or the step fails."""
    template: str | None = None
    """How the pairs' prompts are rendered; without it by the reference's chat template."""
    batch_tokens: Positive = 4096
    """Padded tokens of a batch; throughput and memory only."""

    @model_validator(mode="after")
    def _accuracy_of_pairs(self) -> Self:
        if self.min_accuracy is not None and self.calibration is None:
            raise ValueError("gives `min_accuracy` without `calibration`; give the table of pairs to judge")
        return self

    def checkpoints(self) -> dict[str, ModelSettings | None]:
        """The tuned policy and its reference."""
        return {"": self, "reference": self.reference}

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens of a batch."""
        return self.batch_tokens

    def reads(self) -> tuple[str, ...]:
        """The token ids that were sampled."""
        return TOKEN_IDS

    def check(self, models: Models) -> Iterator[Check]:
        """The tuned policy, the template, the pairs, and the two tokenizers where both models are here."""
        if "" in models:
            yield partial(check_causal_checkpoint, models[""].path, revision=models[""].revision)
        yield partial(check_template, self.template, reads_prompt=True)
        if self.calibration is not None:
            yield partial(read_pairs, Path(self.calibration))
        local = all(inner in models and models[inner].is_folder for inner in ("", "reference"))
        if local and importlib.util.find_spec("transformers") is not None:
            yield partial(_check_tokenizers, models[""].path, models["reference"].path)

    def identity(self, models: Models) -> str:
        """Of both checkpoints."""
        return content_sha256({"tuned": models[""].identity, "reference": models["reference"].identity})

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., LogRatioScorer]:
        """One pair of policies a pass."""
        (one,) = scorers
        return partial(
            LogRatioScorer,
            models[""].path,
            reference=models["reference"].path,
            revision=models[""].revision,
            reference_revision=models["reference"].revision,
            scale=one.scale,
            affine=one.affine,
            dtype=one.dtype,
            max_length=one.max_length,
            calibration=None if one.calibration is None else str(Path(one.calibration).absolute()),
            min_accuracy=one.min_accuracy,
            template=absolute_template(one.template),
            token_budget=one.batch_tokens,
        )


def _check_tokenizers(tuned: str, reference: str) -> None:
    require_same_tokenizer(load_tokenizer(tuned), load_tokenizer(reference), checkpoint=tuned, reference=reference)
