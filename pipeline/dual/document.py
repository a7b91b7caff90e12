"""The content of ``dual.json``: a solution and what is known about it, in the user's own directions and units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.contracts.problem import Safeguard
from pipeline.contracts.solution import (
    AppliedSafeguard,
    Demanded,
    Solution,
    SolvedConstraint,
    SolvedReward,
    StatedStatistic,
)
from pipeline.dual.posing import PosedProblem
from pipeline.dual.tails import FoundTails
from stage1_dual.dual import Diagnostics, HeldoutPrediction, Trust, Uncertainty


@dataclass(frozen=True, eq=False)
class Question:
    """What was asked of the dual.

    Attributes:
        posed: the train rows under the demanded constraints.
        heldout: other prompts under the demanded constraints, or None.
        reward_name: name of the reward.
        safeguards: one per constraint.
    """

    posed: PosedProblem
    heldout: PosedProblem | None
    reward_name: str
    safeguards: Sequence[Safeguard]


@dataclass(frozen=True, eq=False)
class Answer:
    """What came out.

    Attributes:
        found: the problem solved, safeguards included, its solution, and how certain it is.
        diagnostics: of the weights.
        prediction: for the held-out prompts, or None where there are none.
        trust: the verdict.
        tails: what the search over t of cvars found, or None where there are none.
    """

    found: Uncertainty
    diagnostics: Diagnostics
    prediction: HeldoutPrediction | None
    trust: Trust
    tails: FoundTails | None


def describe_solution(question: Question, answer: Answer) -> dict[str, Any]:
    """Everything about a solution; numbers that are not finite become null."""
    return _solution(question, answer).to_document(_statistics(question, answer))


def _solution(question: Question, answer: Answer) -> Solution:
    tightened, posed = answer.found.tightened, question.posed
    problem, demanded = tightened.problem, posed.problem
    entries = []
    for j, (constraint, unit, safeguard) in enumerate(
        zip(posed.constraints, posed.units, question.safeguards, strict=True)
    ):
        sign = constraint.sign
        added = unit.asked(float(problem.thresholds_m[j] - demanded.thresholds_m[j]))
        column_threshold = sign * float(problem.thresholds_m[j])
        entries.append(
            SolvedConstraint(
                name=constraint.name,
                score=constraint.statistic.score,
                statistic=StatedStatistic.model_validate(constraint.statistic.to_document()),
                direction=constraint.direction,
                threshold=unit.threshold(column_threshold),
                margin=constraint.tightened(added).margin,
                demanded=Demanded(
                    threshold=unit.threshold(sign * float(demanded.thresholds_m[j])),
                    margin=constraint.margin,
                    tolerance=constraint.tolerance,
                ),
                safeguard=AppliedSafeguard(
                    reserve=safeguard.reserve,
                    assurance=unit.asked(float(tightened.assurance_m[j])),
                    assurance_level=safeguard.assurance,
                    score_error=float(tightened.score_error_m[j]),
                    response_bias=unit.asked(float(tightened.response_bias_m[j])),
                    score_noise=float(tightened.score_noise_m[j]),
                    score_noise_sigma=safeguard.score_noise,
                ),
                reference=unit.reference,
                certified_at=posed.plan.at.get(constraint.name),
                column_ratio=unit.ratio,
                column_threshold=column_threshold,
                multiplier=float(tightened.solution.multipliers[j]),
            )
        )
    return Solution(
        beta=tightened.solution.beta,
        kl_budget=demanded.kl_budget,
        n_prompts=problem.n_prompts,
        n_samples=problem.n_samples,
        reward=SolvedReward(name=question.reward_name),
        constraints=tuple(entries),
    )


def _constraint_statistics(question: Question, answer: Answer) -> Iterator[dict[str, Any]]:
    found, prediction = answer.found, answer.prediction
    solution, intervals, corrected_m = found.tightened.solution, found.intervals, found.ladder.corrected_multipliers_m
    posed, heldout = question.posed, question.heldout
    for j, (constraint, unit) in enumerate(zip(posed.constraints, posed.units, strict=True)):
        sign = constraint.sign
        there = None if heldout is None else heldout.units[j]
        about: dict[str, Any] = {
            "multiplier_ci95": _interval(intervals.multipliers[j]),
            "multiplier_standard_error": _finite(found.errors.multipliers[j]),
            "multiplier_corrected": None if corrected_m is None else float(corrected_m[j]),
            "predicted": unit.value(sign * float(solution.predicted_constraints[j])),
            "predicted_ci95": _interval(unit.value(sign * intervals.policy.constraints[j])),
            "predicted_corrected": (
                None
                if found.bias is None
                else unit.value(sign * float(solution.predicted_constraints[j] - found.bias.policy.constraints[j]))
            ),
            "heldout": None,
            "heldout_ci95": None,
            "heldout_reference": None,
            "heldout_slack": None,
            "heldout_slack_ci95": None,
        }
        if prediction is not None and there is not None:
            about |= {
                "heldout": there.value(sign * float(prediction.constraints[j])),
                "heldout_ci95": _interval(there.value(sign * prediction.constraints_interval[j])),
                "heldout_reference": there.reference,
                "heldout_slack": there.slack(float(prediction.slack[j])),
                "heldout_slack_ci95": _interval(there.slack(prediction.slack_interval[j])),
            }
        if answer.tails is not None and constraint.name in answer.tails.at:
            about["tail_responses"] = answer.tails.responses[constraint.name]
        yield about | {
            "slack": unit.slack(float(solution.slack[j])),
            "slack_ci95": _interval(unit.slack(intervals.policy.slack[j])),
        }


def _statistics(question: Question, answer: Answer) -> dict[str, Any]:
    """What ``dual.json`` says besides the solution itself, laid out as the file is."""
    found, diagnostics, prediction, trust = answer.found, answer.diagnostics, answer.prediction, answer.trust
    tightened, ladder, intervals = found.tightened, found.ladder, found.intervals
    problem, solution = tightened.problem, tightened.solution
    heldout = None if question.heldout is None else question.heldout.problem
    names = [constraint.name for constraint in question.posed.constraints]
    return {
        "beta_ci95": None if intervals.beta is None else _interval(intervals.beta),
        "beta_standard_error": None if found.errors.beta is None else _finite(found.errors.beta),
        "beta_corrected": (
            None if problem.kl_budget is None or ladder.corrected_beta is None else float(ladder.corrected_beta)
        ),
        "dual_value": solution.dual_value,
        "primal_value": solution.primal_value,
        "duality_gap": solution.duality_gap,
        "kkt_residual": solution.kkt_residual,
        "n_evaluations": solution.n_evaluations,
        "largest_gain_of_other_tails": None if answer.tails is None else _finite(answer.tails.largest_gain),
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
            "response_bias": tightened.response_bias_kl,
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
                    "beta": _finite(rung.beta),
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
