"""What the dual raises beside bad input: thresholds that cannot be met, answers that cannot be proved."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.contracts.errors import DualignError, InputError
from stage1_dual.dual.segments import FloatArray


@dataclass(frozen=True)
class InfeasibilityCertificate:
    """Proof that no reweighting of the samples meets all thresholds.

    With ``v_j >= 0`` for bounds and ``E_x max_k <v, g(x, y_k) - b> < 0``, any policy supported on the samples has
    ``<v, E[g] - b> < 0``, hence misses at least one threshold (a Farkas certificate; a theorem of the alternative).

    Attributes:
        thresholds: the thresholds b, shape (m,), score units, higher better.
        direction: the vector v, shape (m,), its sizes sum to 1; non-negative, except for equalities.
        support_value: E_x max_k <v, g - b>, in (v-weighted) score units; negative.
        best_attainable: the largest mean of each constraint alone over reweightings, shape (m,), score units.
        worst_attainable: the smallest mean of each equality alone, shape (m,), score units; NaN for bounds.
        largest_feasible_scale: the largest t such that the margins scaled by t are feasible
            (``reference + t * (threshold - reference)``), or None when no t >= 0 helps or the scale is undefined.
    """

    thresholds: FloatArray
    direction: FloatArray
    support_value: float
    best_attainable: FloatArray
    worst_attainable: FloatArray
    largest_feasible_scale: float | None


class TooFewRowsError(InputError):
    """The prompts or responses are too few to tell what is asked of them; more of them would."""


class InfeasibleError(DualignError):
    """The thresholds cannot be met on these samples; ``certificate`` proves it."""

    exit_code = 3

    def __init__(self, message: str, *, certificate: InfeasibilityCertificate) -> None:
        super().__init__(message)
        self.certificate = certificate


class KlBudgetError(DualignError):
    """No beta spends the KL budget on these samples: the constraints take more, or the best policy spends less.

    Attributes:
        kl_budget: what was to be spent, nats per prompt.
        attainable_kl: the nearest that can be, nats per prompt.
    """

    exit_code = 3

    def __init__(self, message: str, *, kl_budget: float, attainable_kl: float) -> None:
        super().__init__(message)
        self.kl_budget = kl_budget
        self.attainable_kl = attainable_kl


class NotCertifiedError(DualignError):
    """The solver stopped, but its answer failed the independent optimality check."""

    exit_code = 4
