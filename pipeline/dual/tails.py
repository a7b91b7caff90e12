"""Where the worst responses begin: t of each cvar, so that the columns are those of the best policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Safeguard, constraint_signs
from pipeline.contracts.statistics import Statistic
from pipeline.dual.infeasible import describe_infeasible
from pipeline.dual.posing import ColumnUnits, PosedProblem, StatisticRows
from stage1_dual.dual import DualProblem, InfeasibleError, Tail, maximise_over_tails


@dataclass(frozen=True)
class FoundTails:
    """What the search over t found.

    Attributes:
        at: t of each cvar, score units, by the constraint's name.
        largest_gain: what other t could add to the optimal value at most, reward units.
        responses: effective number of responses in each tail under the policy, by the constraint's name.
    """

    at: dict[str, float]
    largest_gain: float
    responses: dict[str, float]


def find_tails(posed: PosedProblem, safeguards: Sequence[Safeguard]) -> FoundTails | None:
    """The t that give the largest value; None where no constraint is on a cvar.

    A cvar of the rows of G alone is one of all rows: the worst ``level`` of G are the worst ``level * P(G)`` of all,
    where every other row has a score that is in no tail.

    Args:
        posed: the problem, at any t.
        safeguards: what is asked beyond the constraints; reserves are part of what is searched under.

    Raises:
        InfeasibleError: no policy on these samples meets the demands, whatever t.
        KlBudgetError: no beta spends the KL budget.
        InputError: a tail has too few responses, or the rows that count differ within a prompt.
    """
    places = [j for j, one in enumerate(posed.constraints) if one.statistic.kind == "cvar"]
    if not places:
        return None
    assert posed.rows is not None  # whoever reads tables says so before
    column_nm = posed.plan.turned(posed.rows)
    thresholds_m = posed.problem.thresholds_m.copy()
    signs_m = constraint_signs(posed.constraints)
    tails = []
    for j in places:
        constraint, unit = posed.constraints[j], posed.units[j]
        assert constraint.statistic.level is not None  # Statistic's rule
        column_nm[:, j] = signs_m[j] * _scores_in_tail(posed.rows, constraint.statistic, signs_m[j])
        thresholds_m[j] = signs_m[j] * constraint.absolute_threshold(unit.reference) + safeguards[j].reserve
        tails.append(Tail(j, constraint.statistic.level * unit.denominator))
    problem = (
        DualProblem.from_rows(
            posed.rows.prompt_n,
            posed.rows.reward_n,
            column_nm,
            thresholds=thresholds_m,
            beta=posed.problem.beta,
            constraint_names=posed.problem.constraint_names,
        )
        .with_equalities(posed.problem.is_equality_m)
        .with_kl_budget(posed.problem.kl_budget)
    )
    try:
        found = maximise_over_tails(problem, tails)
    except InfeasibleError as error:
        units = tuple(ColumnUnits(None, unit.reference) if j in places else unit for j, unit in enumerate(posed.units))
        searched = replace(posed, problem=problem, units=units)
        raise InfeasibleError(
            describe_infeasible(searched, error.certificate), certificate=error.certificate
        ) from error
    names = [posed.constraints[j].name for j in places]
    return FoundTails(
        at={name: float(signs_m[j] * at) for name, j, at in zip(names, places, found.at_c, strict=True)},
        largest_gain=found.largest_gain,
        responses=dict(zip(names, found.tail_responses_c.tolist(), strict=True)),
    )


def _scores_in_tail(rows: StatisticRows, statistic: Statistic, sign: float) -> FloatArray:
    """The scores, those of rows that do not count beyond all others on the better side; of either sign."""
    score_n = rows.score_n(statistic.score)
    if not statistic.where:
        return score_n
    h_n = rows.statistic_columns(replace(statistic, kind="mean", level=None, tail="lower")).h_n
    assert h_n is not None  # `where` makes it a ratio
    counts_p = np.unique(rows.prompt_n[h_n > 0])
    if np.isin(rows.prompt_n[h_n == 0], counts_p).any():
        raise InputError(f"{statistic.text()}: which rows count differs within a prompt; a cvar is of whole prompts")
    return np.where(h_n > 0, score_n, sign * np.max(sign * score_n))
