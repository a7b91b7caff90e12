"""What is minimised at each step of the training run, and at what rate: a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.contracts.errors import InputError
from stage2_policy.objectives import Objective, read_objective


@dataclass(frozen=True)
class Phase:
    """A stretch of the training run with an objective of its own.

    Attributes:
        objective: name in :data:`stage2_policy.objectives.OBJECTIVES`, or several names with their weights.
        learning_rate: peak rate of the optimiser; it rises to it linearly and falls to zero on a cosine.
        share: of the run's steps, relative to the other phases.
    """

    objective: str | Mapping[str, float]
    learning_rate: float
    share: float = 1.0


class Schedule:
    """Phases laid out over the steps of a run; a continued run finds its place by the number of the step.

    Args:
        phases: in order.
        steps: of the whole run.
        warmup_ratio: share of the steps of a phase over which the rate rises.

    Raises:
        InputError: no phase, an unknown objective, a rate or share that is not positive, or fewer steps than phases.
    """

    def __init__(self, phases: Sequence[Phase], *, steps: int, warmup_ratio: float) -> None:
        self._objectives = validate_phases(phases)
        if steps < len(phases):
            raise InputError(f"the run has {steps} steps and {len(phases)} phases; each phase needs at least one step")
        ends = np.cumsum([phase.share for phase in phases])
        inner = np.round(ends[:-1] / ends[-1] * steps).astype(int)
        # At least one step each.
        inner = np.clip(inner, np.arange(1, len(phases)), steps - np.arange(len(phases) - 1, 0, -1))
        self.starts = (0, *inner.tolist())
        """First step of each phase."""
        self._ends = (*self.starts[1:], steps)
        self._phases = phases
        self._warmup_ratio = warmup_ratio

    @property
    def peak_rate(self) -> float:
        """The largest rate of all."""
        return max(phase.learning_rate for phase in self._phases)

    @property
    def uses_reference(self) -> bool:
        """Whether a phase needs the reference's log-probabilities of the training responses."""
        return any(objective.uses_reference for objective in self._objectives)

    def objective(self, step: int) -> Objective:
        """What the step minimises."""
        return self._objectives[self._place(step)]

    def rate(self, step: int) -> float:
        """Learning rate of the step."""
        place = self._place(step)
        start, end = self.starts[place], self._ends[place]
        warmup = math.ceil(self._warmup_ratio * (end - start))
        done = step - start
        if done < warmup:
            # Half a step on: no step of a phase is lost at rate zero.
            return self._phases[place].learning_rate * (done + 0.5) / warmup
        left = (done - warmup) / max(1, end - start - warmup)
        return self._phases[place].learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, left)))

    def _place(self, step: int) -> int:
        return max(place for place, start in enumerate(self.starts) if start <= max(step, 0))


def validate_phases(phases: Sequence[Phase]) -> list[Objective]:
    """The objective of each phase.

    Raises:
        InputError: no phase, an unknown objective, or a rate or share that is not positive.
    """
    if not phases:
        raise InputError("training setting `phases` is empty; it must have at least one phase")
    for place, phase in enumerate(phases):
        for name in ("learning_rate", "share"):
            value = getattr(phase, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"training setting `phases[{place}].{name}` is {value}; it must be a positive number")
    return [read_objective(phase.objective) for phase in phases]
