"""A ``dual.json`` as the report shows it: the solution, and with it what is known about it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.contracts.solution import Part, Solution, SolvedConstraint, SolvedReward

Ends = Annotated[tuple[float | None, float | None], Field(strict=False)]
"""A 95% interval; None for an end without bound."""


class ReportedConstraint(SolvedConstraint):
    """A solved constraint with its statistics, docs/artifacts.md."""

    multiplier_ci95: Ends
    multiplier_corrected: float | None
    predicted: float
    predicted_ci95: Ends
    heldout: float | None = None
    heldout_slack: float | None = None


class ReportedReward(SolvedReward):
    """The reward with its statistics."""

    reference: float
    predicted: float
    predicted_ci95: Ends
    heldout: float | None = None
    price_of_safeguards: float


class Kl(Part):
    """Divergence of the tilted policy, nats per prompt."""

    predicted: float
    log_samples: float


class Rung(Part):
    """The dual solved on a share of the responses; None where no part has a solution."""

    n_responses: float
    multipliers: dict[str, float | None]


class Ladder(Part):
    """The rungs, most responses first."""

    rungs: Annotated[tuple[Rung, ...], Field(strict=False)]


class Trust(Part):
    """The verdict on the samples."""

    verdict: str
    reasons: list[str]
    advice: list[str]


class Diagnostics(Part):
    """Of the weights; the page lists the others as they are."""

    ess_median: float
    ess_fraction_below_2: float


class ReportedSolution(Solution):
    """A solution with its statistics; read by :meth:`from_document`, which names what is damaged."""

    reward: ReportedReward
    constraints: Annotated[tuple[ReportedConstraint, ...], Field(strict=False)]
    status: str
    duality_gap: float
    kkt_residual: float
    kl: Kl
    ladder: Ladder
    trust: Trust
    diagnostics: Diagnostics
    warnings: list[str]
