"""One frozen, typed run configuration; the files in ``recipes/`` are its instances.

A recipe is YAML (read by the safe loader), settings on the command line win over it, and every fault of the result is
reported at once. The configuration stays in this package: the stages take plain arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from pipeline.config.sections import (
    ConstraintSettings,
    EvaluationSettings,
    ExecutionSettings,
    KlBudget,
    MultishotSettings,
    PromptSettings,
    PublishedSettings,
    ReferenceSettings,
    SamplingSettings,
    SolveSettings,
    TrainingSettings,
)
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.section import Section
from pipeline.scorers.kind import ScorerSettings
from pipeline.scorers.kinds import AnyScorerSettings
from pipeline.scorers.models import ModelSettings

_NUMBER, _BUDGET = "a number", "a KL budget"


class RunConfig(Section):
    """Everything that determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of samples, training and bootstrap."""
    beta: Annotated[
        Annotated[float, Field(gt=0), Tag(_NUMBER)] | Annotated[KlBudget, Tag(_BUDGET)],
        Discriminator(lambda value: _BUDGET if isinstance(value, Mapping | KlBudget) else _NUMBER),
    ]
    """KL strength, reward per nat, or ``{kl: NATS}``, the largest KL to spend; the only place where it is set."""
    prompts: PromptSettings = PromptSettings()
    reference: ReferenceSettings
    sampling: SamplingSettings = SamplingSettings()
    execution: ExecutionSettings = ExecutionSettings()
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the rows of a step that may fail before it stops; failed rows are counted and tried again next time."""
    scorers: dict[str, AnyScorerSettings]
    """Scorers by their names; one that nothing uses is scored too, for the next question."""
    reward: str
    """Name of the scorer to maximise."""
    constraints: dict[str, ConstraintSettings]
    """Bounds by their names; a bound without a ``score`` is on the scorer of its name."""
    solve: SolveSettings = SolveSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    multishot: MultishotSettings = MultishotSettings()
    published: PublishedSettings | None = None

    @field_validator("execution", mode="before")
    @classmethod
    def _execution_by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def stated_constraints(self) -> tuple[tuple[Constraint, Safeguard], ...]:
        """The constraints as demanded, in the order of the recipe, each with what the dual is asked for beyond it.

        Those that say ``each`` are one here; :func:`pipeline.scoring.demanded.read_demands` has them by value.
        """
        return tuple(
            (constraint, bound.safeguard)
            for name, bound in self.constraints.items()
            for constraint in bound.constraints(name)
        )

    def constraint_scores(self) -> tuple[str, ...]:
        """The scorers that the constraints are computed from, each once, in the order of the recipe."""
        return tuple(dict.fromkeys(score for one, _ in self.stated_constraints() for score in one.statistic.scores))

    def needed_scores(self) -> tuple[str, ...]:
        """The scorers that a problem is made of, each once: the reward, then those of the constraints."""
        return tuple(dict.fromkeys((self.reward, *self.constraint_scores())))

    @property
    def kl_budget(self) -> float | None:
        """The largest KL to spend, nats a prompt, or None where beta is given."""
        return self.beta.kl if isinstance(self.beta, KlBudget) else None

    @property
    def given_beta(self) -> float:
        """KL strength, reward per nat.

        Raises:
            InputError: the recipe gives a KL budget instead; beta is then that of a solution.
        """
        if isinstance(self.beta, KlBudget):
            raise InputError(f"`beta` is {{kl: {self.beta.kl:g}}}, a KL budget, where a number is needed")
        return self.beta

    @property
    def asks_of_prompts(self) -> bool:
        """Whether a constraint is of some prompts alone, or of each value of a column of theirs."""
        return any(one.each is not None or one.statistic.where for one, _ in self.stated_constraints())

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
