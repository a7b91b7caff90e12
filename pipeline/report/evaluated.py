"""An ``evaluation.json`` as the report shows it: of every key that is read, that it is there and what it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from pipeline.contracts.artifacts import read_json
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.problem import Direction
from pipeline.contracts.solution import Name, Part, Solution
from pipeline.report.solved import Ends

Status = Literal["satisfied", "undecided", "violated"]
"""The worst comes last."""


class EvaluatedScore(Part):
    """Means of a score on the test prompts."""

    name: Name | None = None
    reference: float
    predicted: float
    realised: float
    ci95: Ends
    improvement: float = 0.0
    improvement_ci95: Ends | None = None


class EvaluatedConstraint(EvaluatedScore):
    """The statistic of a constraint, with what was demanded and the verdict on it."""

    name: Name
    direction: Direction
    threshold: float
    margin: float | None = None
    tolerance: float | None = None
    slack: float
    status: Status


class RealisedKl(Part):
    """Divergence of the trained policy, nats per prompt, with the verdict on it where it has a budget."""

    predicted: float
    realised: float
    realised_ci95: Ends | None = None
    budget: float | None = None
    status: Status | None = None


class Lagrangian(Part):
    """How much of the way to the tilted optimum was gone."""

    closed_fraction: float | None
    closed_fraction_ci95: Ends | None = None


class CategoryScore(Part):
    """Means of a score over the prompts of a category; None of a policy without responses to any of them."""

    name: Name
    reference: float | None
    realised: float | None
    improvement: float | None = None
    improvement_ci95: Ends | None = None
    ci95: Ends | None = None
    status: Status | None = None


class Category(Part):
    """A category of prompts."""

    category: str
    n_prompts: int
    scores: Annotated[tuple[CategoryScore, ...], Field(strict=False, min_length=1)]


class Gold(Part):
    """Ground-truth means."""

    reference: float
    realised: float


class Evaluation(Part):
    """The content of an ``evaluation.json``, docs/artifacts.md; read by :meth:`from_document`."""

    status: Status
    n_prompts: Annotated[int, Field(ge=1)]
    n_samples: Annotated[int, Field(ge=1)]
    reward: EvaluatedScore
    constraints: Annotated[tuple[EvaluatedConstraint, ...], Field(strict=False, min_length=1)]
    kl: RealisedKl
    lagrangian: Lagrangian
    by_category: Annotated[tuple[Category, ...], Field(strict=False)] = ()
    gold: dict[str, Gold] | None = None
    warnings: list[str] = Field(default_factory=list)
    inputs: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _status_is_the_worst(self) -> Self:
        judged = [bound.status for bound in self.constraints]
        if self.kl.status is not None:
            judged.append(self.kl.status)
        worst = max(judged, key=get_args(Status).index)
        if worst != self.status:
            raise ValueError(f"`status` is {self.status!r}; the worst of what was demanded is {worst!r}")
        return self

    def require_of(self, solution: Solution, *, source: Path) -> None:
        """Refuse an evaluation of other scores than those of a solution.

        Args:
            solution: that the policy was trained for.
            source: the file, for the message.

        Raises:
            CorruptArtifactError: it has other scores, or one twice.
        """
        names = [bound.name for bound in self.constraints]
        if names != list(solution.names):
            raise CorruptArtifactError(
                f"{source} is damaged: `constraints` are {names}; those of the dual are {list(solution.names)}"
            )
        known = {solution.reward.name, *names}
        other = {score.name for one in self.by_category for score in one.scores} - known
        if self.reward.name is not None:
            other |= {self.reward.name} - {solution.reward.name}
        if other:
            raise CorruptArtifactError(
                f"{source} is damaged: it has the scores {sorted(other)}, which are not of the dual"
            )


def read_evaluation(path: Path, solution: Solution) -> Evaluation:
    """An ``evaluation.json`` of a policy that was trained for a solution.

    Raises:
        CorruptArtifactError: the file is missing or damaged, or is of other scores.
    """
    found = Evaluation.from_document(read_json(path), source=path)
    found.require_of(solution, source=path)
    return found
