"""Demands that cannot be met, in the user's own directions and words, with a proof that can be checked by hand."""

from __future__ import annotations

import math

from pipeline.contracts.problem import Constraint
from pipeline.dual.posing import ColumnUnits, PosedProblem
from stage1_dual.dual import InfeasibilityCertificate


def describe_infeasible(posed: PosedProblem, certificate: InfeasibilityCertificate) -> str:
    """The verdict on a problem: what each constraint asks and could have at most, which block, and why.

    Args:
        posed: the problem under its demanded thresholds.
        certificate: the proof, of the thresholds with their safeguards.
    """
    problem = posed.problem
    lines = ["the thresholds cannot be met on these samples:"]
    for j, (constraint, unit) in enumerate(zip(posed.constraints, posed.units, strict=True)):
        sign = constraint.sign
        reference = unit.reference
        best = unit.threshold(sign * float(certificate.best_attainable[j]))
        asked = unit.threshold(sign * float(certificate.thresholds[j]))
        demanded = unit.threshold(sign * float(problem.thresholds_m[j]))
        margin = f" (margin {constraint.margin:g})" if constraint.margin is not None else ""
        beyond = f", {asked:.4g} with its safeguards" if not math.isclose(asked, demanded, rel_tol=1e-12) else ""
        attainable = f"best attainable alone {best:.4g} (margin {best - reference:.4g})"
        if constraint.is_equality:
            worst = unit.threshold(float(certificate.worst_attainable[j]))
            attainable = f"attainable alone {worst:.4g} to {best:.4g}"
        lines.append(
            f"  - {constraint.name} {constraint.direction} {demanded:.4g}{margin}{beyond}; reference {reference:.4g}, "
            f"{attainable}"
        )
        if sign * (asked - best) > 0 and constraint.statistic.kind == "share":
            lines.append(f"    {_missing(constraint, unit, best, problem.n_prompts)}")
    if certificate.largest_feasible_scale is not None:
        together = "all margins over the reference" if len(posed.constraints) > 1 else "the margin over the reference"
        lines.append(
            f"{together} must shrink to less than {certificate.largest_feasible_scale:.4g} times what is asked"
        )
    if certificate.support_value < 0:
        blocking = [
            (bound.name, price) for bound, price in zip(posed.constraints, certificate.direction, strict=True) if price
        ]
        if len(posed.constraints) > len(blocking) > 0:
            lines.append(f"blocked by {' and '.join(name for name, _ in blocking)}, whatever is asked of the others")
        prices = ", ".join(f"{name} {price:.4g}" for name, price in blocking)
        lines.append(
            f"proof: weigh the slacks by ({prices}); even the best response to every prompt gives a mean of "
            f"{certificate.support_value:.4g} < 0"
        )
    else:
        lines.append("this is the very edge of what the samples attain, reached only by infinite multipliers")
    lines.append("lower a threshold, or draw more responses per prompt")
    return "\n".join(lines)


def _missing(constraint: Constraint, unit: ColumnUnits, best: float, n_prompts: int) -> str:
    """Which prompts keep a share from what is asked: those of which no response is on the right side."""
    statistic = constraint.statistic
    share = f"{statistic.score} {'>=' if statistic.at_least is not None else '<='} "
    share += f"{statistic.at_least if statistic.at_least is not None else statistic.at_most:.12g}"
    counting = round(n_prompts * unit.denominator)
    of = f"of {counting} prompts" if not statistic.where else f"of {counting} prompts that count"
    if constraint.direction == ">=":
        without = round((1 - best) * counting)
        return (
            f"{without} {of} have no response with {share}, so no policy on these samples reaches a share above "
            f"{best:.4g}"
        )
    every = round(best * counting)
    return (
        f"{every} {of} have no response but with {share}, so no policy on these samples reaches a share below "
        f"{best:.4g}"
    )
