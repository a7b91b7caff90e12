"""From scored responses to a certified solution, in the user's own directions and units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.solution import Solution
from pipeline.dual.document import Answer, Question, describe_solution
from pipeline.dual.infeasible import describe_infeasible
from pipeline.dual.posing import PosedProblem, StatisticRows, pose
from pipeline.dual.tails import find_tails
from stage1_dual.dual import (
    Demand,
    DualProblem,
    DualSolution,
    InfeasibleError,
    diagnose,
    judge_trust,
    predict_heldout,
    quantify_uncertainty,
    solve_tightened,
)


@dataclass(frozen=True, eq=False)
class SolvedDual:
    """A certified solution.

    Attributes:
        content: of ``dual.json`` (docs/artifacts.md), without provenance.
        posed: what was solved, safeguards included.
        solution: its solution.
    """

    content: dict[str, Any]
    posed: PosedProblem
    solution: DualSolution

    @property
    def problem(self) -> DualProblem:
        """What was solved, its columns turned, safeguards included."""
        return self.posed.problem


@dataclass(frozen=True)
class EvaluationSize:
    """How large the final evaluation will be: what `assurance` is about."""

    n_prompts: int
    n_responses: int


def build_problem(scored: StatisticRows, *, constraints: Sequence[Constraint], beta: float) -> DualProblem:
    """The dual problem of scored rows, turned (:mod:`pipeline.contracts.problem`); see :func:`pose`."""
    return pose(scored, constraints=constraints, beta=beta).problem


def solve_problem(
    posed: PosedProblem,
    *,
    heldout: PosedProblem | None,
    reward_name: str,
    safeguards: Sequence[Safeguard],
    evaluation: EvaluationSize,
    corrects_response_bias: bool,
    n_replicates: int,
    rng: np.random.Generator,
) -> SolvedDual:
    """Solve and certify the dual, with intervals, held-out predictions, the response ladder and a verdict on trust.

    Args:
        posed: the train rows under the demanded constraints.
        heldout: other prompts under the demanded constraints, for predictions that lambda* has not seen, or None; beta
            is that of the solution.
        reward_name: name of the reward.
        safeguards: what is asked beyond the constraints, one each.
        evaluation: size of the final evaluation.
        corrects_response_bias: take the multipliers that are corrected for finitely many responses, where they can be.
        n_replicates: bootstrap replicates over prompts.
        rng: source of the bootstrap.

    Raises:
        InfeasibleError: no reweighting of the responses meets the thresholds.
        KlBudgetError: no beta spends the KL budget.
        NotCertifiedError: the solution failed the independent check.
        InputError: the safeguards ask for more and more, or for what a constraint has not.
    """
    for constraint, safeguard in zip(posed.constraints, safeguards, strict=True):
        safeguard.require_fit(constraint)
    tails = find_tails(posed, safeguards)
    if tails is not None:
        posed = posed.with_columns(replace(posed.chosen, at=tails.at))
    relative_m = posed.relative_m
    demand = Demand(
        reserve_m=np.array(
            [one.reserve * unit.denominator for one, unit in zip(safeguards, posed.units, strict=True)]
        ),
        assurance_m=np.array([np.nan if one.assurance is None else one.assurance for one in safeguards]),
        score_error_m=np.array([safeguard.score_error for safeguard in safeguards]),
        score_noise_m=np.array([safeguard.score_noise for safeguard in safeguards]),
        n_evaluation_prompts=evaluation.n_prompts,
        n_evaluation_responses=evaluation.n_responses,
        thresholds_are_relative_m=relative_m,
    )
    try:
        tightened = solve_tightened(posed.problem, demand)
    except InfeasibleError as error:
        raise InfeasibleError(describe_infeasible(posed, error.certificate), certificate=error.certificate) from error
    posed_there = posed.of_policy(tightened.solution.multipliers, beta=tightened.solution.beta)
    if posed_there is not posed:
        # Of another constant for each prompt: the same solution, with the intervals of the statistics.
        posed, tightened = posed_there, solve_tightened(posed_there.problem, demand)
    # The solution is certified. Around it, expansions may leave float64; what does so is said to be unknown.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found = quantify_uncertainty(
            tightened,
            thresholds_are_relative_m=relative_m,
            corrects_response_bias=corrects_response_bias,
            n_replicates=n_replicates,
            rng=rng,
        )
    solved, solution, ladder = found.tightened.problem, found.tightened.solution, found.ladder
    prediction = None
    if heldout is not None:
        heldout = (
            heldout.with_columns(posed.chosen).at(solution.beta).of_policy(solution.multipliers, beta=solution.beta)
        )
        prediction = predict_heldout(heldout.problem, solution.multipliers, thresholds_are_relative_m=relative_m)
    diagnostics = diagnose(solved, solution)
    trust = judge_trust(solved, solution, diagnostics=diagnostics, ladder=ladder, heldout=prediction)
    content = describe_solution(
        Question(posed, heldout, reward_name, safeguards),
        Answer(found, diagnostics, prediction, trust, tails),
    )
    if corrects_response_bias and ladder.bias is None:
        content["warnings"].append(f"lambda* is not corrected for finitely many responses: {ladder.refusal}")
    intervals, policy = found.intervals, found.intervals.policy
    known = (intervals.multipliers, policy.reward, policy.constraints, policy.kl)
    if not intervals.infeasible_fraction and not all(np.isfinite(bounds).all() for bounds in known):
        content["warnings"].append(
            "some 95% intervals are not known: at this beta the policy leans on so few responses that a redrawn set "
            "of prompts takes the expansion around it out of the range of float64"
        )
    return SolvedDual(content, replace(posed, problem=solved), solution)


def solution_columns(scored: StatisticRows, solution: Solution) -> np.ndarray:
    """The columns of rows that the multipliers of a solution multiply, in the user's own direction, shape (n, m)."""
    return np.stack(
        [one.column(scored.statistic_columns(one.stated, at=one.certified_at)) for one in solution.constraints],
        axis=1,
    )


def tilted_weights(scored: StatisticRows, solution: Solution) -> np.ndarray:
    """Weights of scored rows under the tilted policy of a solution, shape (n,), summing to 1 within a prompt."""
    problem = DualProblem.from_rows(
        scored.prompt_n,
        scored.reward_n,
        solution_columns(scored, solution) * solution.signs_m,
        thresholds=solution.turned_thresholds_m,
        beta=solution.beta,
        constraint_names=solution.names,
    ).with_equalities(np.array([one.direction == "=" for one in solution.constraints], dtype=bool))
    return np.asarray(problem.tilted_weights(solution.multipliers_m))
