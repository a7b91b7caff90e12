"""From a demand and a pilot's scored responses to the rows of :mod:`stage1_dual.dual.pilot_rows`.

A statistic E[u] / E[h] that is to reach c is planned as the mean of (u - c h) / E_pi[h], so that its errors are those
of the statistic, in the user's own units; turned, so that more is safer. Where the demand is a margin, what is
subtracted prompt by prompt is the influence of the reference's own statistic c0, (u - c0 h) / E_ref[h].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.dual.posing import PosedProblem, pose
from pipeline.run.run import Run
from pipeline.scoring.demanded import read_demands
from pipeline.scoring.joined import reference_scores
from stage1_dual.dual import Pilot, PilotRows, diagnose, solve_dual


def require_plannable(constraints: Sequence[Constraint]) -> None:
    """Raise InputError where a constraint is of a statistic whose sizes cannot be planned."""
    for one in constraints:
        if one.statistic.kind == "cvar":
            raise InputError(
                f"constraint `{one.name}`: {one.statistic.text()} is the mean of a tail whose beginning moves with "
                "the sample, which no plan covers; plan for a share or a shortfall instead"
            )


def pose_pilot(run: Run) -> PosedProblem:
    """The demand of a run, with its reserve, on the train responses that are drawn and scored.

    ``assurance`` is left out: it is asked for at the size that the plan finds.
    """
    demands = read_demands(run)
    constraints = [
        one.tightened(guard.reserve) if guard.reserve else one
        for one, guard in zip(demands.constraints, demands.safeguards, strict=True)
    ]
    beta = 1.0 if run.config.kl_budget is not None else run.config.given_beta
    return pose(reference_scores(run, "train"), constraints=constraints, beta=beta).within(run.config.kl_budget)


def measure_pilot(posed: PosedProblem) -> Pilot:
    """Solve the demand on the pilot's rows and measure what decides the error of a run to come.

    Args:
        posed: the pilot's rows, in memory, under the demand.

    Raises:
        InputError: a statistic that no plan covers, rows that are not in memory, or too few of them.
        InfeasibleError: no reweighting of the pilot's responses meets the demand.
        KlBudgetError: no beta spends the KL budget.
        NotCertifiedError: the solution failed the independent check.
    """
    require_plannable(posed.constraints)
    rows = posed.rows
    if rows is None:
        raise InputError("the pilot does not fit in memory; some 64 prompts of 32 responses are enough for a plan")
    solution = solve_dual(posed.problem)
    posed = posed.of_policy(solution.multipliers, beta=solution.beta)
    order_n = np.argsort(rows.prompt_n, kind="stable")
    _, counts_p = np.unique(rows.prompt_n, return_counts=True)
    nothing_n = np.zeros(len(order_n))
    columns, references, targets, scales = [], [], [], []
    for one, unit in zip(posed.constraints, posed.units, strict=True):
        found = rows.statistic_columns(one.statistic)
        scale = one.sign / unit.policy_denominator
        columns.append(found.less(unit.ratio) * scale)
        target = 0.0
        if unit.ratio is None:
            asked = one.threshold if one.margin is None else one.margin
            assert asked is not None  # Constraint's rule
            target = one.sign * asked
        if one.margin is None:
            references.append(nothing_n)
        elif unit.ratio is None:
            references.append(found.u_n * one.sign)
        else:
            references.append(found.less(unit.reference) * (one.sign / unit.denominator))
        targets.append(target)
        scales.append(unit.policy_denominator)
    pilot = Pilot.measure(
        PilotRows(
            counts_p=counts_p.astype(np.int64),
            reward_n=rows.reward_n[order_n],
            column_mn=np.ascontiguousarray(np.stack(columns)[:, order_n]),
            reference_mn=np.ascontiguousarray(np.stack(references)[:, order_n]),
            target_m=np.array(targets),
            multipliers_m=solution.multipliers * np.array(scales),
            beta=solution.beta,
            is_equality_m=posed.problem.is_equality_m,
            names=posed.problem.constraint_names,
        )
    )
    return replace(pilot, warnings=diagnose(posed.problem, solution).warnings)
