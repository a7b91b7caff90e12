"""Three and five demands at once: means, a length, a share, and each category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.baselines.constraint_kinds import judge_demands
from pipeline.baselines.policies import SURE
from pipeline.baselines.results import Result
from pipeline.baselines.study import Changes, Study
from pipeline.run.run import Run

_LONGER = 2
"""Times as long as a policy of two demands: as the kinds of constraint that a policy learns least of."""


def many_constraints(study: Study) -> Result:
    """A policy for three and one for five demands, each seed: every demand with its prediction and what came out."""
    return judge_demands(study, many_demands, "many_constraints", "Several demands at once: three and five")


def many_demands(study: Study, base: Run) -> Mapping[str, Changes]:
    """The demands by their number, as a recipe has them: all assured, and nobody longer than the reference.

    Args:
        study: whose middle margin says how far to go.
        base: for how long a policy is trained; every demand is a margin over the reference.
    """

    def step(factor: float) -> float:
        return round(factor * study.middle_margin, 9)

    above: Mapping[str, Any] = {"direction": ">=", **SURE}
    three = {
        "harmless": {**above, "margin": step(0.5)},
        "humour": {**above, "margin": step(0.25)},
        "words": {"direction": "<=", "margin": 0.0, **SURE},
    }
    five = {
        **three,
        "safe": {**above, "score": "harmless", "statistic": "share", "at_least": 0.0, "margin": step(0.1)},
        "tone": {**above, "score": "harmless", "each": "category", "margin": step(0.25)},
    }
    longer = {"training.epochs": _LONGER * base.config.training.epochs}
    return {"three": {"constraints": three, **longer}, "five": {"constraints": five, **longer}}
