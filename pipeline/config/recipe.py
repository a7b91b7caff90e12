"""One frozen, typed run configuration; the files in ``recipes/`` are its instances.

A recipe is YAML (read by the safe loader), settings on the command line win over it, and every fault of the result is
reported at once. The configuration stays in this package: the stages take plain arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, field_validator

from pipeline.config.sections import (
    ConstraintSettings,
    EvaluationSettings,
    ExecutionSettings,
    MultishotSettings,
    PromptSettings,
    PublishedSettings,
    ReferenceSettings,
    SamplingSettings,
    SolveSettings,
    TrainingSettings,
)
from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.section import Section
from pipeline.scorers.kind import ScorerSettings
from pipeline.scorers.kinds import AnyScorerSettings
from pipeline.scorers.models import ModelSettings


class RunConfig(Section):
    """Everything that determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    beta: Annotated[float, Field(gt=0)]
    """KL strength, reward per nat; the only place where it is set."""
    prompts: PromptSettings = PromptSettings()
    reference: ReferenceSettings
    sampling: SamplingSettings = SamplingSettings()
    execution: ExecutionSettings = ExecutionSettings()
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the rows of a step that may fail before it stops; failed rows are counted and tried again next time."""
    scorers: dict[str, AnyScorerSettings]
    reward: str
    """Name of the scorer to maximise."""
    constraints: dict[str, ConstraintSettings]
    """Bounds by the name of the scorer they bound."""
    solve: SolveSettings = SolveSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    multishot: MultishotSettings = MultishotSettings()
    published: PublishedSettings | None = None

    @field_validator("execution", mode="before")
    @classmethod
    def _execution_by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def demanded_constraints(self) -> tuple[Constraint, ...]:
        """The constraints as demanded, in the order of the recipe: what the evaluation judges."""
        return tuple(
            Constraint(name, bound.direction, threshold=bound.threshold, margin=bound.margin)
            for name, bound in self.constraints.items()
        )

    def safeguards(self, measured_noise: Mapping[str, float] = MappingProxyType({})) -> tuple[Safeguard, ...]:
        """What the dual is asked for beyond each demand, in the order of the recipe.

        Args:
            measured_noise: standard deviation of the noise by constraint, for those whose ``score_noise`` is measured.
        """
        return tuple(
            Safeguard(
                reserve=bound.reserve,
                assurance=bound.assurance,
                score_error=bound.score_error,
                score_noise=measured_noise[name] if bound.score_noise == "measured" else bound.score_noise,
            )
            for name, bound in self.constraints.items()
        )

    def checkpoints(self) -> dict[str, ModelSettings]:
        """Every model of the run by the setting that names it, such as ``reference`` and ``scorers.helpful``."""
        found: dict[str, ModelSettings] = {"reference": self.reference}
        for name in self.scorers:
            found.update(self.models_of(name).values())
        return found

    def models_of(self, name: str) -> dict[str, tuple[str, ModelSettings]]:
        """The models of a scorer by the name of the setting within it: the setting of the recipe, and the model."""
        return {
            inner: ("reference", self.reference)
            if model is None
            else (f"scorers.{name}.{inner}".removesuffix("."), model)
            for inner, model in self.scorers[name].checkpoints().items()
        }

    def used_scorers(self) -> dict[str, ScorerSettings]:
        """All scorers of the recipe, the reward first: an unused one is still scored, for the next question."""
        return {self.reward: self.scorers[self.reward], **self.scorers}
