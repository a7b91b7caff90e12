"""A ``dual.json`` as the report shows it: the solution, and with it what is known about it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.contracts.solution import Name, Part, Solution, SolvedConstraint, SolvedReward

Ends = Annotated[tuple[float | None, float | None], Field(strict=False)]
"""A 95% interval; None for an end without bound."""


class ReportedConstraint(SolvedConstraint):
    """A solved constraint with its statistics, docs/artifacts.md."""

    multiplier_ci95: Ends
    multiplier_corrected: float | None
    predicted: float
    predicted_ci95: Ends
    predicted_corrected: float | None = None
    heldout: float | None = None
    heldout_ci95: Ends | None = None
    heldout_reference: float | None = None
    heldout_slack: float | None = None
    heldout_slack_ci95: Ends | None = None
    slack_ci95: Ends | None = None


class ReportedReward(SolvedReward):
    """The reward with its statistics."""

    reference: float
    predicted: float
    predicted_ci95: Ends
    predicted_corrected: float | None = None
    heldout: float | None = None
    heldout_ci95: Ends | None = None
    price_of_safeguards: float


class Kl(Part):
    """Divergence of the tilted policy, nats per prompt."""

    predicted: float
    log_samples: Annotated[float, Field(ge=0, le=100)]


class Rung(Part):
    """The dual solved on a share of the responses; None where no part has a solution."""

    n_responses: float
    multipliers: dict[str, float | None]


class Ladder(Part):
    """The rungs, most responses first."""

    rungs: Annotated[tuple[Rung, ...], Field(strict=False)]


class Trust(Part):
    """The verdict on the samples."""

    verdict: Literal["ok", "weak", "unreliable"]
    reasons: list[str]
    advice: list[str]

    @model_validator(mode="after")
    def _doubt_has_a_reason(self) -> Self:
        if self.verdict != "ok" and not self.reasons:
            raise ValueError(f"`trust.reasons` is empty; a verdict {self.verdict!r} has at least one")
        return self


class Diagnostics(Part):
    """Of the weights; the page lists the others as they are."""

    ess_median: float
    ess_fraction_below_2: float
    intervals_corrected: bool = False


class PredictedScore(Part):
    """The mean reward, or a constraint's statistic, over the prompts of a category; None where it is about others."""

    name: Name
    reference: float | None
    predicted: float | None


class PredictedCategory(Part):
    """A category of prompts."""

    category: str
    n_prompts: int
    scores: Annotated[tuple[PredictedScore, ...], Field(strict=False, min_length=1)]


class Truncation(Part):
    """What the token limit cut off."""

    rule: str
    share: float


class ReportedSolution(Solution):
    """A solution with its statistics; read by :meth:`from_document`, which names what is damaged."""

    reward: ReportedReward
    constraints: Annotated[tuple[ReportedConstraint, ...], Field(strict=False)]
    status: str
    duality_gap: float
    kkt_residual: float
    kl: Kl
    beta_ci95: Ends | None = None
    ladder: Ladder
    trust: Trust
    diagnostics: Diagnostics
    warnings: list[str]
    truncation: Truncation | None = None
    by_category: Annotated[tuple[PredictedCategory, ...], Field(strict=False)] = ()
    inputs: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _scores_are_known(self) -> Self:
        for place, rung in enumerate(self.ladder.rungs):
            missing = sorted(set(self.names) - rung.multipliers.keys())
            if missing:
                raise ValueError(f"`ladder.rungs[{place}].multipliers` lacks {missing[0]!r}")
        other = {score.name for one in self.by_category for score in one.scores} - {self.reward.name, *self.names}
        if other:
            raise ValueError(f"`by_category` has the scores {sorted(other)}, which are not of this dual")
        return self
