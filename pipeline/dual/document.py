"""The content of ``dual.json``: a solution and what is known about it, in the user's own directions and units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.tables import SCHEMA_VERSION
from stage1_dual.dual import (
    BootstrapIntervals,
    Diagnostics,
    DualProblem,
    HeldoutPrediction,
    ResponseLadder,
    StandardErrors,
    TightenedSolution,
    Trust,
)


def describe_solution(
    tightened: TightenedSolution,
    *,
    demanded: DualProblem,
    heldout: DualProblem | None,
    reward_name: str,
    constraints: Sequence[Constraint],
    safeguards: Sequence[Safeguard],
    intervals: BootstrapIntervals,
    errors: StandardErrors,
    diagnostics: Diagnostics,
    ladder: ResponseLadder,
    prediction: HeldoutPrediction | None,
    trust: Trust,
) -> dict[str, Any]:
    """Gather everything; numbers that are not finite become null.

    Args:
        tightened: the problem solved, safeguards included, and its solution.
        demanded: the problem under the demanded thresholds.
        heldout: other prompts under the demanded thresholds, or None.
        reward_name: name of the reward.
        constraints: as demanded.
        safeguards: one per constraint.
        intervals: by the bootstrap.
        errors: by the sandwich.
        diagnostics: of the weights.
        ladder: over the number of responses.
        prediction: for ``heldout``.
        trust: the verdict.
    """
    problem, solution = tightened.problem, tightened.solution
    names = [constraint.name for constraint in constraints]
    entries = []
    for j, (constraint, safeguard) in enumerate(zip(constraints, safeguards, strict=True)):
        sign = constraint.sign
        added = float(problem.thresholds_m[j] - demanded.thresholds_m[j])
        entries.append(
            {
                "name": constraint.name,
                "direction": constraint.direction,
                "threshold": sign * float(problem.thresholds_m[j]),
                "margin": constraint.tightened(added).margin,
                "demanded": {"threshold": sign * float(demanded.thresholds_m[j]), "margin": constraint.margin},
                "safeguard": {
                    "reserve": safeguard.reserve,
                    "assurance": float(tightened.assurance_m[j]),
                    "assurance_level": safeguard.assurance,
                    "score_error": float(tightened.score_error_m[j]),
                    "response_bias": float(tightened.response_bias_m[j]),
                },
                "reference": sign * float(problem.reference_means_m[j]),
                "multiplier": float(solution.multipliers[j]),
                "multiplier_ci95": _interval(intervals.multipliers[j]),
                "multiplier_standard_error": _finite(errors.multipliers[j]),
                "multiplier_corrected": (
                    None if ladder.corrected_multipliers_m is None else float(ladder.corrected_multipliers_m[j])
                ),
                "predicted": sign * float(solution.predicted_constraints[j]),
                "predicted_ci95": _interval(sign * intervals.policy.constraints[j]),
                "heldout": sign * float(prediction.constraints[j]) if prediction else None,
                "heldout_ci95": _interval(sign * prediction.constraints_interval[j]) if prediction else None,
                "heldout_reference": sign * float(heldout.reference_means_m[j]) if heldout else None,
                "heldout_slack": float(prediction.slack[j]) if prediction else None,
                "heldout_slack_ci95": _interval(prediction.slack_interval[j]) if prediction else None,
                "slack": float(solution.slack[j]),
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "certified",
        "beta": problem.beta,
        "n_prompts": problem.n_prompts,
        "n_samples": problem.n_samples,
        "dual_value": solution.dual_value,
        "primal_value": solution.primal_value,
        "duality_gap": solution.duality_gap,
        "kkt_residual": solution.kkt_residual,
        "n_evaluations": solution.n_evaluations,
        "reward": {
            "name": reward_name,
            "reference": problem.reference_reward,
            "predicted": solution.predicted_reward,
            "predicted_ci95": _interval(intervals.policy.reward),
            "heldout": prediction.reward if prediction else None,
            "heldout_ci95": _interval(prediction.reward_interval) if prediction else None,
            "heldout_reference": heldout.reference_reward if heldout else None,
            "price_of_safeguards": tightened.price,
        },
        "kl": {
            "predicted": solution.predicted_kl,
            "predicted_ci95": _interval(intervals.policy.kl),
            "heldout": prediction.kl if prediction else None,
            "log_samples": diagnostics.log_samples,
        },
        "constraints": entries,
        "trust": {
            "verdict": trust.verdict,
            "signs": {name: _finite(value) for name, value in trust.signs.items()},
            "reasons": list(trust.reasons),
            "advice": list(trust.advice),
        },
        "ladder": {
            "rungs": [
                {
                    "n_responses": rung.n_responses,
                    "n_parts": rung.n_parts,
                    "n_infeasible": rung.n_infeasible,
                    "multipliers": dict(zip(names, map(_finite, rung.multipliers_m), strict=True)),
                    "dual_value": _finite(rung.dual_value),
                    "kl": _finite(rung.kl),
                    "ess_median": _finite(rung.ess_median),
                }
                for rung in ladder.rungs
            ],
            "drift": dict(zip(names, map(_finite, ladder.drift_m), strict=True)),
            "refusal": ladder.refusal,
        },
        "diagnostics": {
            "ess_median": diagnostics.ess_median,
            "ess_fraction_below_2": diagnostics.ess_fraction_below_2,
            "ess_quantiles": dict(
                zip(map(str, diagnostics.ess_levels), map(float, diagnostics.ess_quantiles), strict=True)
            ),
            "pareto_k_median": _finite(diagnostics.pareto_k_median),
            "pareto_k_fraction": _finite(diagnostics.pareto_k_fraction),
            "heldout_prompts": prediction.n_prompts if prediction else 0,
            "dependent_constraints": list(solution.dependent_constraints),
            "bootstrap_replicates": intervals.n_replicates,
            "intervals_corrected": ladder.bias is not None,
            "bootstrap_infeasible_fraction": intervals.infeasible_fraction,
        },
        "warnings": [*diagnostics.warnings, *trust.reasons],
    }


def _interval(bounds: np.ndarray) -> list[float | None]:
    return [_finite(bound) for bound in sorted(float(bound) for bound in bounds)]


def _finite(value: float) -> float | None:
    """A number of JSON: null stands for what is infinite or unknown."""
    return float(value) if math.isfinite(value) else None
