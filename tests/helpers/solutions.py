"""Solutions by hand, for what reads a ``dual.json`` and does not care how it was found."""

from __future__ import annotations

from typing import Any

from pipeline.contracts.solution import Solution, SolvedConstraint, SolvedReward

_NO_SAFEGUARD = {
    "reserve": 0.0,
    "assurance": 0.0,
    "assurance_level": None,
    "score_error": 0.0,
    "response_bias": 0.0,
}


def bound(name: str = "harmless", direction: str = ">=", **changes: Any) -> SolvedConstraint:
    """A constraint without safeguards; ``changes`` are of its entry in the file."""
    entry = {
        "name": name,
        "direction": direction,
        "threshold": 0.25,
        "margin": None,
        "safeguard": _NO_SAFEGUARD,
        "reference": -0.5,
        "multiplier": 0.7,
        **changes,
    }
    demanded = {"threshold": entry["threshold"], "margin": entry["margin"]}
    return SolvedConstraint.from_document({"demanded": demanded, **entry})


def build_solution(
    *constraints: SolvedConstraint,
    beta: float = 0.5,
    reward: str = "helpful",
    n_prompts: int = 400,
    n_samples: int = 25_600,
) -> Solution:
    """The solution with these constraints."""
    return Solution(
        beta=beta,
        n_prompts=n_prompts,
        n_samples=n_samples,
        reward=SolvedReward(name=reward),
        constraints=constraints,
    )
