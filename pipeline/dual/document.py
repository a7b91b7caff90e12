"""The content of ``dual.json``: a solution and what is known about it, in the user's own directions and units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.solution import AppliedSafeguard, Demanded, Solution, SolvedConstraint, SolvedReward
from stage1_dual.dual import Diagnostics, DualProblem, HeldoutPrediction, Trust, Uncertainty


@dataclass(frozen=True, eq=False)
class Question:
    """What was asked of the dual.

    Attributes:
        problem: the train rows under the demanded thresholds.
        heldout: other prompts under the demanded thresholds, or None.
        reward_name: name of the reward.
        constraints: as demanded.
        safeguards: one per constraint.
    """

    problem: DualProblem
    heldout: DualProblem | None
    reward_name: str
    constraints: Sequence[Constraint]
    safeguards: Sequence[Safeguard]


@dataclass(frozen=True, eq=False)
class Answer:
    """What came out.

    Attributes:
        found: the problem solved, safeguards included, its solution, and how certain it is.
        diagnostics: of the weights.
        prediction: for the held-out prompts, or None where there are none.
        trust: the verdict.
    """

    found: Uncertainty
    diagnostics: Diagnostics
    prediction: HeldoutPrediction | None
    trust: Trust


def describe_solution(question: Question, answer: Answer) -> dict[str, Any]:
    """Everything about a solution; numbers that are not finite become null."""
    return _solution(question, answer).to_document(_statistics(question, answer))


def _solution(question: Question, answer: Answer) -> Solution:
    tightened, demanded = answer.found.tightened, question.problem
    problem = tightened.problem
    entries = []
    for j, (constraint, safeguard) in enumerate(zip(question.constraints, question.safeguards, strict=True)):
        sign = constraint.sign
        added = float(problem.thresholds_m[j] - demanded.thresholds_m[j])
        entries.append(
            SolvedConstraint(
                name=constraint.name,
                direction=constraint.direction,
                threshold=sign * float(problem.thresholds_m[j]),
                margin=constraint.tightened(added).margin,
                demanded=Demanded(threshold=sign * float(demanded.thresholds_m[j]), margin=constraint.margin),
                safeguard=AppliedSafeguard(
                    reserve=safeguard.reserve,
                    assurance=float(tightened.assurance_m[j]),
                    assurance_level=safeguard.assurance,
                    score_error=float(tightened.score_error_m[j]),
                    response_bias=float(tightened.response_bias_m[j]),
                    score_noise=float(tightened.score_noise_m[j]),
                    score_noise_sigma=safeguard.score_noise,
                ),
                reference=sign * float(problem.reference_means_m[j]),
                multiplier=float(tightened.solution.multipliers[j]),
            )
        )
    return Solution(
        beta=problem.beta,
        n_prompts=problem.n_prompts,
        n_samples=problem.n_samples,
        reward=SolvedReward(name=question.reward_name),
        constraints=tuple(entries),
    )


def _constraint_statistics(question: Question, answer: Answer) -> Iterator[dict[str, Any]]:
    found, prediction, heldout = answer.found, answer.prediction, question.heldout
    solution, intervals, corrected_m = found.tightened.solution, found.intervals, found.ladder.corrected_multipliers_m
    for j, sign in enumerate(constraint.sign for constraint in question.constraints):
        yield {
            "multiplier_ci95": _interval(intervals.multipliers[j]),
            "multiplier_standard_error": _finite(found.errors.multipliers[j]),
            "multiplier_corrected": None if corrected_m is None else float(corrected_m[j]),
            "predicted": sign * float(solution.predicted_constraints[j]),
            "predicted_ci95": _interval(sign * intervals.policy.constraints[j]),
            "predicted_corrected": (
                None
                if found.bias is None
                else sign * float(solution.predicted_constraints[j] - found.bias.policy.constraints[j])
            ),
            "heldout": sign * float(prediction.constraints[j]) if prediction else None,
            "heldout_ci95": _interval(sign * prediction.constraints_interval[j]) if prediction else None,
            "heldout_reference": sign * float(heldout.reference_means_m[j]) if heldout else None,
            "heldout_slack": float(prediction.slack[j]) if prediction else None,
            "heldout_slack_ci95": _interval(prediction.slack_interval[j]) if prediction else None,
            "slack": float(solution.slack[j]),
            "slack_ci95": _interval(intervals.policy.slack[j]),
        }


def _statistics(question: Question, answer: Answer) -> dict[str, Any]:
    """What ``dual.json`` says besides the solution itself, laid out as the file is."""
    found, diagnostics, prediction, trust = answer.found, answer.diagnostics, answer.prediction, answer.trust
    tightened, ladder, intervals = found.tightened, found.ladder, found.intervals
    problem, solution, heldout = tightened.problem, tightened.solution, question.heldout
    names = [constraint.name for constraint in question.constraints]
    return {
        "dual_value": solution.dual_value,
        "primal_value": solution.primal_value,
        "duality_gap": solution.duality_gap,
        "kkt_residual": solution.kkt_residual,
        "n_evaluations": solution.n_evaluations,
        "reward": {
            "reference": problem.reference_reward,
            "predicted": solution.predicted_reward,
            "predicted_ci95": _interval(intervals.policy.reward),
            "predicted_corrected": (
                None if found.bias is None else float(solution.predicted_reward - found.bias.policy.reward)
            ),
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
        "constraints": list(_constraint_statistics(question, answer)),
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
