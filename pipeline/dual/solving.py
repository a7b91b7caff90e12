"""From scored responses to a certified solution, in the user's own directions and units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.problem import Constraint, Safeguard, constraint_signs
from pipeline.contracts.solution import Solution
from pipeline.dual.document import Answer, Question, describe_solution
from stage1_dual.dual import (
    Demand,
    DualProblem,
    DualSolution,
    InfeasibilityCertificate,
    InfeasibleError,
    SampleScores,
    diagnose,
    judge_trust,
    predict_heldout,
    quantify_uncertainty,
    solve_tightened,
)

if TYPE_CHECKING:
    from pipeline.scoring.joined import JoinedScores


# What a number of a problem may be in size. The expansions behind starts, intervals and predictions hold products of
# three scores over a square of beta: within these, no such product leaves the range of float64.
_SMALLEST, _LARGEST = 1e-50, 1e50


@dataclass(frozen=True, eq=False)
class SolvedDual:
    """A certified solution.

    Attributes:
        content: of ``dual.json`` (docs/artifacts.md), without provenance.
        problem: what was solved, safeguards included.
        solution: its solution.
    """

    content: dict[str, Any]
    problem: DualProblem
    solution: DualSolution


@dataclass(frozen=True)
class EvaluationSize:
    """How large the final evaluation will be: what `assurance` is about."""

    n_prompts: int
    n_responses: int


def build_problem(scored: JoinedScores, *, constraints: Sequence[Constraint], beta: float) -> DualProblem:
    """The dual problem of scored rows, turned (:mod:`pipeline.contracts.problem`).

    A margin becomes an absolute threshold over the reference mean of these rows.
    """
    problem = DualProblem.from_rows(
        scored.prompt_n,
        scored.reward_n,
        scored.constraints_nm * constraint_signs(constraints),
        thresholds=np.zeros(len(constraints)),
        beta=beta,
        constraint_names=[constraint.name for constraint in constraints],
    )
    return set_thresholds(problem, constraints)


def build_problem_on_samples(samples: SampleScores, *, constraints: Sequence[Constraint], beta: float) -> DualProblem:
    """The dual problem of scores that were turned (:mod:`pipeline.contracts.problem`) when they were written."""
    names = [constraint.name for constraint in constraints]
    thresholds = np.zeros(len(constraints))
    problem = DualProblem.from_samples(samples, thresholds=thresholds, beta=beta, constraint_names=names)
    return set_thresholds(problem, constraints)


def set_thresholds(problem: DualProblem, constraints: Sequence[Constraint]) -> DualProblem:
    """The problem under the thresholds of ``constraints``; margins are over its own reference means."""
    _require_sizes(problem, constraints)
    signs_m = constraint_signs(constraints)
    thresholds = [
        bound.absolute_threshold(sign * mean)
        for bound, sign, mean in zip(constraints, signs_m, problem.reference_means_m, strict=True)
    ]
    return problem.with_thresholds(np.array(thresholds) * signs_m)


def _require_sizes(problem: DualProblem, constraints: Sequence[Constraint]) -> None:
    """Raise InputError where scores, or beta, are so large or so small that float64 cannot hold their products."""
    facts = problem.samples.facts
    sizes = [("beta", problem.beta, problem.beta), ("the reward", facts.reward_scale, abs(facts.reference_reward))]
    for j, constraint in enumerate(constraints):
        sizes.append((f"the score {constraint.name!r}", facts.score_scale_m[j], facts.score_magnitude_m[j]))
        asked = constraint.margin if constraint.threshold is None else constraint.threshold
        sizes.append((f"the constraint on {constraint.name!r}", 0.0, abs(asked or 0.0)))
    for what, spread, size in sizes:
        # A spread of zero is a score that no policy changes.
        wrong = size if size > _LARGEST else spread if spread > 0 and not _SMALLEST <= spread <= _LARGEST else None
        if wrong is not None:
            raise InputError(
                f"{what} is of the size {wrong:.3g}; scores, their spread within prompts and beta must lie between "
                f"{_SMALLEST:g} and {_LARGEST:g}, where float64 can multiply them: give them in other units"
            )


def solve_problem(
    problem: DualProblem,
    *,
    heldout: DualProblem | None,
    reward_name: str,
    constraints: Sequence[Constraint],
    safeguards: Sequence[Safeguard],
    evaluation: EvaluationSize,
    corrects_response_bias: bool,
    n_replicates: int,
    rng: np.random.Generator,
) -> SolvedDual:
    """Solve and certify the dual, with intervals, held-out predictions, the response ladder and a verdict on trust.

    Args:
        problem: the train rows under the demanded thresholds.
        heldout: other prompts under the demanded thresholds, for predictions that lambda* has not seen, or None.
        reward_name: name of the reward.
        constraints: the m constraints as demanded.
        safeguards: what is asked beyond them, one each.
        evaluation: size of the final evaluation.
        corrects_response_bias: take the multipliers that are corrected for finitely many responses, where they can be.
        n_replicates: bootstrap replicates over prompts.
        rng: source of the bootstrap.

    Raises:
        InfeasibleError: no reweighting of the responses meets the thresholds.
        NotCertifiedError: the solution failed the independent check.
        InputError: the safeguards ask for more and more.
    """
    relative_m = np.array([constraint.margin is not None for constraint in constraints])
    demand = Demand(
        reserve_m=np.array([safeguard.reserve for safeguard in safeguards]),
        assurance_m=np.array([np.nan if one.assurance is None else one.assurance for one in safeguards]),
        score_error_m=np.array([safeguard.score_error for safeguard in safeguards]),
        score_noise_m=np.array([safeguard.score_noise for safeguard in safeguards]),
        n_evaluation_prompts=evaluation.n_prompts,
        n_evaluation_responses=evaluation.n_responses,
        thresholds_are_relative_m=relative_m,
    )
    try:
        tightened = solve_tightened(problem, demand)
    except InfeasibleError as error:
        message = _infeasible_message(problem, constraints, error.certificate)
        raise InfeasibleError(message, certificate=error.certificate) from error
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
        prediction = predict_heldout(heldout, solution.multipliers, thresholds_are_relative_m=relative_m)
    diagnostics = diagnose(solved, solution)
    trust = judge_trust(solved, solution, diagnostics=diagnostics, ladder=ladder, heldout=prediction)
    content = describe_solution(
        Question(problem, heldout, reward_name, constraints, safeguards),
        Answer(found, diagnostics, prediction, trust),
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
    return SolvedDual(content, solved, solution)


def tilted_weights(scored: JoinedScores, solution: Solution) -> np.ndarray:
    """Weights of scored rows under the tilted policy of a solution, shape (n,), summing to 1 within a prompt.

    Raises:
        CorruptArtifactError: the solution has another number of constraints than the rows have scores for.
    """
    if len(solution.constraints) != scored.constraints_nm.shape[1]:
        raise CorruptArtifactError(
            f"dual.json has {len(solution.constraints)} constraints, the scores {scored.constraints_nm.shape[1]}"
        )
    problem = build_problem(scored, constraints=solution.bounds, beta=solution.beta)
    return np.asarray(problem.tilted_weights(solution.multipliers_m))


def _infeasible_message(
    problem: DualProblem, constraints: Sequence[Constraint], certificate: InfeasibilityCertificate
) -> str:
    """The verdict in the user's own directions and settings, with a proof that can be checked by hand."""
    lines = ["the thresholds cannot be met on these samples:"]
    for j, constraint in enumerate(constraints):
        sign = constraint.sign
        reference, best = (sign * float(v[j]) for v in (problem.reference_means_m, certificate.best_attainable))
        asked, demanded = (sign * float(v[j]) for v in (certificate.thresholds, problem.thresholds_m))
        margin = f" (margin {constraint.margin:g})" if constraint.margin is not None else ""
        beyond = f", {asked:.4g} with its safeguards" if asked != demanded else ""
        lines.append(
            f"  - {constraint.name} {constraint.direction} {demanded:.4g}{margin}{beyond}; reference {reference:.4g}, "
            f"best attainable alone {best:.4g} (margin {best - reference:.4g})"
        )
    if certificate.largest_feasible_scale is not None:
        together = "all margins over the reference" if len(constraints) > 1 else "the margin over the reference"
        lines.append(
            f"{together} must shrink to less than {certificate.largest_feasible_scale:.4g} times what is asked"
        )
    if certificate.support_value < 0:
        prices = ", ".join(
            f"{bound.name} {price:.4g}"
            for bound, price in zip(constraints, certificate.direction, strict=True)
            if price
        )
        lines.append(
            f"proof: weigh the slacks by ({prices}); even the best response to every prompt gives a mean of "
            f"{certificate.support_value:.4g} < 0"
        )
    else:
        lines.append("this is the very edge of what the samples attain, reached only by infinite multipliers")
    lines.append("lower a threshold, or draw more responses per prompt")
    return "\n".join(lines)
