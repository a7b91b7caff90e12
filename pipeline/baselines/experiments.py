"""The experiments by name: each asks the study for policies and makes a table, a picture and a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.baselines.constraint_kinds import constraint_kinds
from pipeline.baselines.costs import cost
from pipeline.baselines.demands import constraint_satisfaction
from pipeline.baselines.dual_experiments import convergence, geometry, sample_sizes
from pipeline.baselines.global_normalisation import global_normalisation
from pipeline.baselines.many_constraints import many_constraints
from pipeline.baselines.real_model import real_model
from pipeline.baselines.results import Result
from pipeline.baselines.study import Study
from pipeline.baselines.trade_off import preference_calibration, trade_off
from pipeline.baselines.two_constraints import two_constraints


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        title: what it shows, in a line.
        perform: performs it.
        unasked: whether it is performed where no experiment is named.
    """

    title: str
    perform: Callable[[Study], Result]
    unasked: bool = True


# Those that take longest first, as several are performed at a time; and those that share policies apart.
EXPERIMENTS: dict[str, Experiment] = {
    "trade_off": Experiment("helpfulness against harmlessness, all methods", trade_off),
    "two_constraints": Experiment("harmlessness and humour, a grid of margins", two_constraints),
    "constraint_kinds": Experiment("share, each category, band, KL budget, tail, equality", constraint_kinds),
    "constraint_satisfaction": Experiment("realised against demanded margins", constraint_satisfaction),
    "many_constraints": Experiment("three and five demands at once", many_constraints),
    "geometry": Experiment("frontier, supporting line and trained policies, two sizes", geometry),
    "sample_sizes": Experiment("lambda* against the number of prompts and responses", sample_sizes),
    "global_normalisation": Experiment(
        "the dual normalised over all prompts at once, and what it realises", global_normalisation
    ),
    "convergence": Experiment("the dual by our solver and by projected gradient", convergence),
    "preference_calibration": Experiment("calibration of the implicit rewards", preference_calibration),
    "cost": Experiment("wall time and tokens of each method", cost),
    # Hours, where all the others together take one and a half.
    "real_model": Experiment("a published model: realised against demanded", real_model, unasked=False),
}

PERFORMED_UNASKED = [name for name, one in EXPERIMENTS.items() if one.unasked]
"""What a call without names performs."""
