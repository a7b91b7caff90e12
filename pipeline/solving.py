"""From scored responses to ``dual.json`` and the frontier, in the user's own directions and units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.errors import CorruptArtifactError, InfeasibilityCertificate, InfeasibleError
from pipeline.contracts.problem import Constraint
from pipeline.contracts.tables import SCHEMA_VERSION, with_metadata
from pipeline.scores import ScoredRows
from stage1_dual.dual import (
    AttainableMeans,
    BootstrapIntervals,
    DualProblem,
    DualSolution,
    Frontier,
    HeldoutPrediction,
    bootstrap_intervals,
    diagnose,
    predict_heldout,
    sandwich_standard_errors,
    solve_dual,
    solve_frontier,
)

_FRONTIER_REACH = 0.95
"""How far a sweep goes from the reference mean towards the best the samples can attain: beyond, few responses rule."""


def build_problem(scored: ScoredRows, *, constraints: Sequence[Constraint], beta: float) -> DualProblem:
    """The dual problem of scored rows: here, and only here, a ``<=`` is turned into a ``>=``.

    A margin becomes an absolute threshold over the reference mean of these rows.
    """
    signs_m = _signs(constraints)
    turned_nm = scored.constraints_nm * signs_m
    problem = DualProblem.from_rows(
        scored.prompt_id_n,
        scored.reward_n,
        turned_nm,
        thresholds=np.zeros(len(constraints)),
        beta=beta,
        constraint_names=[constraint.name for constraint in constraints],
    )
    thresholds = [
        bound.absolute_threshold(sign * mean)
        for bound, sign, mean in zip(constraints, signs_m, problem.reference_means_m, strict=True)
    ]
    return problem.with_thresholds(np.array(thresholds) * signs_m)


def solve_scores(
    scored: ScoredRows,
    *,
    heldout: ScoredRows | None,
    reward_name: str,
    constraints: Sequence[Constraint],
    beta: float,
    n_replicates: int,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], DualProblem]:
    """Solve and certify the dual, with intervals, held-out predictions and diagnostics.

    Args:
        scored: the train rows, which determine lambda*.
        heldout: rows of other prompts, for predictions that lambda* has not seen, or None.
        reward_name: name of the reward.
        constraints: the m constraints.
        beta: KL strength, reward per nat.
        n_replicates: bootstrap replicates over prompts.
        rng: source of the bootstrap.

    Returns:
        The content of ``dual.json`` (docs/artifacts.md) without provenance, and the problem solved.

    Raises:
        InfeasibleError: no reweighting of the responses meets the thresholds.
        NotCertifiedError: the solution failed the independent check.
    """
    problem = build_problem(scored, constraints=constraints, beta=beta)
    try:
        solution = solve_dual(problem)
    except InfeasibleError as error:
        raise InfeasibleError(
            _infeasible_message(problem, constraints, error.certificate), certificate=error.certificate
        ) from error
    relative_m = np.array([constraint.margin is not None for constraint in constraints])
    intervals = bootstrap_intervals(
        problem, solution, rng=rng, n_replicates=n_replicates, thresholds_are_relative_m=relative_m
    )
    errors = sandwich_standard_errors(problem, solution, thresholds_are_relative_m=relative_m)
    diagnostics = diagnose(problem, solution)
    prediction = None
    if heldout is not None:
        other = build_problem(heldout, constraints=constraints, beta=beta)
        prediction = predict_heldout(other, solution.multipliers)
    dual = {
        "schema_version": SCHEMA_VERSION,
        "status": "certified",
        "beta": beta,
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
        },
        "kl": {
            "predicted": solution.predicted_kl,
            "predicted_ci95": _interval(intervals.policy.kl),
            "heldout": prediction.kl if prediction else None,
            "log_samples": diagnostics.log_samples,
        },
        "constraints": [
            _constraint_entry(j, bound, problem, solution, intervals, errors.multipliers[j], prediction)
            for j, bound in enumerate(constraints)
        ],
        "diagnostics": {
            "ess_median": diagnostics.ess_median,
            "ess_fraction_below_2": diagnostics.ess_fraction_below_2,
            "ess_quantiles": dict(
                zip(map(str, diagnostics.ess_levels), map(float, diagnostics.ess_quantiles), strict=True)
            ),
            "heldout_prompts": prediction.n_prompts if prediction else 0,
            "dependent_constraints": list(solution.dependent_constraints),
            "bootstrap_replicates": intervals.n_replicates,
        },
        "warnings": list(diagnostics.warnings),
    }
    return dual, problem


def build_frontier_table(problem: DualProblem, constraints: Sequence[Constraint], *, n_points: int) -> pa.Table:
    """Sweep each constraint's threshold, the others held: from the reference mean to near the best attainable.

    The grid also holds the thresholds of the problem itself, so that the run's own point lies on the curve.
    """
    best_m = AttainableMeans(problem).best_attainable_m()
    tables = []
    for j in range(len(constraints)):
        start, best = problem.reference_means_m[j], best_m[j]
        own = problem.thresholds_m[j]
        sweep = np.linspace(start, start + _FRONTIER_REACH * (best - start), n_points)
        grid = np.tile(problem.thresholds_m, (n_points + 1, 1))
        grid[:, j] = np.sort(np.append(sweep, own))
        tables.append(_frontier_rows(problem, constraints, j, solve_frontier(problem, grid)))
    return pa.concat_tables(tables)


def frontier_of_thresholds(
    scored: ScoredRows, points: Sequence[Sequence[Constraint]], *, swept: int, beta: float
) -> pa.Table:
    """Solve for many settings of the same constraints; infeasible ones are marked, not dropped.

    Args:
        scored: the rows that determine lambda*.
        points: for each point the m constraints; they differ in the number of the swept one only.
        swept: place of the constraint that varies.
        beta: KL strength, reward per nat.
    """
    problem = build_problem(scored, constraints=points[0], beta=beta)
    signs_m = _signs(points[0])
    reference_m = signs_m * problem.reference_means_m
    thresholds_gm = np.array(
        [[bound.absolute_threshold(float(mean)) for bound, mean in zip(p, reference_m, strict=True)] for p in points]
    )
    return _frontier_rows(problem, points[0], swept, solve_frontier(problem, thresholds_gm * signs_m))


def write_frontier(path: Path, frontier: pa.Table, *, metadata: Mapping[str, str]) -> None:
    """Write ``frontier.parquet``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = with_metadata(frontier.schema, metadata)
    pq.write_table(frontier.replace_schema_metadata(schema.metadata), path, compression="zstd")


def tilted_weights(scored: ScoredRows, dual: Mapping[str, Any]) -> np.ndarray:
    """Weights of scored rows under the tilted policy of a ``dual.json``, shape (n,), summing to 1 within a prompt.

    Raises:
        CorruptArtifactError: the dual names other constraints than the rows hold scores of.
    """
    if len(dual["constraints"]) != scored.constraints_nm.shape[1]:
        raise CorruptArtifactError(
            f"dual.json has {len(dual['constraints'])} constraints, the scores {scored.constraints_nm.shape[1]}"
        )
    constraints = read_dual_constraints(dual)
    problem = build_problem(scored, constraints=constraints, beta=dual["beta"])
    multipliers = np.array([entry["multiplier"] for entry in dual["constraints"]])
    return np.asarray(problem.tilted_weights(multipliers))


def read_dual_constraints(dual: Mapping[str, Any]) -> tuple[Constraint, ...]:
    """The constraints of a ``dual.json`` as the user stated them."""
    return tuple(
        Constraint(entry["name"], entry["direction"], margin=entry["margin"])
        if entry["margin"] is not None
        else Constraint(entry["name"], entry["direction"], threshold=entry["threshold"])
        for entry in dual["constraints"]
    )


def _constraint_entry(
    j: int,
    constraint: Constraint,
    problem: DualProblem,
    solution: DualSolution,
    intervals: BootstrapIntervals,
    standard_error: float,
    prediction: HeldoutPrediction | None,
) -> dict[str, Any]:
    sign = constraint.sign
    return {
        "name": constraint.name,
        "direction": constraint.direction,
        "threshold": sign * float(problem.thresholds_m[j]),
        "margin": constraint.margin,
        "reference": sign * float(problem.reference_means_m[j]),
        "multiplier": float(solution.multipliers[j]),
        "multiplier_ci95": _interval(intervals.multipliers[j]),
        "multiplier_standard_error": float(standard_error),
        "predicted": sign * float(solution.predicted_constraints[j]),
        "predicted_ci95": _interval(sign * intervals.policy.constraints[j]),
        "heldout": sign * float(prediction.constraints[j]) if prediction else None,
        "heldout_ci95": _interval(sign * prediction.constraints_interval[j]) if prediction else None,
        "heldout_slack": float(prediction.slack[j]) if prediction else None,
        "slack": float(solution.slack[j]),
    }


def _infeasible_message(
    problem: DualProblem, constraints: Sequence[Constraint], certificate: InfeasibilityCertificate
) -> str:
    """The verdict in the user's own directions and settings, with a proof that can be checked by hand."""
    lines = ["the thresholds cannot be met on these samples:"]
    for j, constraint in enumerate(constraints):
        reference, best = (
            constraint.sign * float(v[j]) for v in (problem.reference_means_m, certificate.best_attainable)
        )
        asked = f"{constraint.name} {constraint.direction} {constraint.sign * problem.thresholds_m[j]:.4g}"
        margin = f" (margin {constraint.margin:g})" if constraint.margin is not None else ""
        lines.append(
            f"  - {asked}{margin}; reference {reference:.4g}, best attainable alone {best:.4g} "
            f"(margin {best - reference:.4g})"
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


def _frontier_rows(problem: DualProblem, constraints: Sequence[Constraint], j: int, frontier: Frontier) -> pa.Table:
    sign = constraints[j].sign
    threshold_g = sign * frontier.thresholds_gm[:, j]
    columns: dict[str, pa.Array] = {
        "constraint": pa.array([constraints[j].name] * len(threshold_g), pa.string()),
        "threshold": pa.array(threshold_g, pa.float64()),
        "margin": pa.array(threshold_g - sign * problem.reference_means_m[j], pa.float64()),
        "feasible": pa.array(frontier.status_g == "certified", pa.bool_()),
        "status": pa.array(frontier.status_g.tolist(), pa.string()),
        "reward": pa.array(frontier.reward_g, pa.float64()),
        "kl": pa.array(frontier.kl_g, pa.float64()),
        "dual_value": pa.array(frontier.dual_value_g, pa.float64()),
        "ess_median": pa.array(frontier.ess_median_g, pa.float64()),
        "kkt_residual": pa.array(frontier.kkt_residual_g, pa.float64()),
    }
    for place, constraint in enumerate(constraints):
        columns[f"multiplier_{constraint.name}"] = pa.array(frontier.multipliers_gm[:, place], pa.float64())
        predicted_g = constraint.sign * frontier.constraints_gm[:, place]
        columns[f"predicted_{constraint.name}"] = pa.array(predicted_g, pa.float64())
    return pa.table(columns)


def _signs(constraints: Sequence[Constraint]) -> np.ndarray:
    return np.array([constraint.sign for constraint in constraints])


def _interval(bounds: np.ndarray) -> list[float]:
    low, high = sorted(float(bound) for bound in bounds)
    return [low, high]
