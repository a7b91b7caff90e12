"""From constraints on statistics to the columns that the dual bounds the means of, and back to the user's units.

A statistic is E[u] / E[h] (:mod:`pipeline.contracts.statistics`). Where h is 1 its column is u and its threshold b
stays b. Elsewhere the column is u - c h with the ratio c = b and the threshold 0: E_pi[u - b h] >= 0 is what
E_pi[u] / E_pi[h] >= b says, h being positive.

Constants of a prompt do not change the tilted policy. Two are subtracted from such columns so that the mean over
prompts, which the intervals redraw, carries all that is uncertain of the statistic. With bars for means over a
prompt's responses, c0 for the reference's own statistic and s for the policy's:

    k (u_ref - c0 h_ref),  k = E_pi[h] / E_ref[h]     where the threshold is a margin over c0, which is estimated too
    (s - c) (h_pi - E_pi[h])                          where the policy is not at the threshold: the influence of a
                                                      ratio is that of u - s h

Both have mean 0 over the prompts, and the second is 0 where the constraint binds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol, TypeVar

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint, constraint_signs
from pipeline.contracts.statistics import Statistic, StatisticColumns, tail_mean
from stage1_dual.dual import DualProblem

# What a number of a problem may be in size. The expansions behind starts, intervals and predictions hold products of
# three scores over a square of beta: within these, no such product leaves the range of float64.
_SMALLEST, _LARGEST = 1e-50, 1e50

NOWHERE: Mapping[str, float] = MappingProxyType({})
"""No t of any cvar."""


@dataclass(frozen=True)
class Chosen:
    """What decides the columns besides the rows: chosen on train prompts, it makes the same columns of others.

    Attributes:
        at: t of each cvar, by the constraint's name; where there is none, the reference's own.
        ratios: c of each column u - c h, likewise; where there is none, the threshold.
    """

    at: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)


NOTHING = Chosen()


Numbers = TypeVar("Numbers", float, FloatArray)


class StatisticRows(Protocol):
    """Rows, one a response, of which u and h of a statistic can be had."""

    @property
    def prompt_n(self) -> np.ndarray:
        """Which prompt each row answers, integers, shape (n,)."""

    @property
    def reward_n(self) -> FloatArray:
        """Shape (n,)."""

    def score_n(self, name: str) -> FloatArray:
        """Raw scores, shape (n,)."""

    def statistic_columns(self, statistic: Statistic, *, at: float | None = None) -> StatisticColumns:
        """U and h of each row; ``at`` is t of a cvar."""


@dataclass(frozen=True, eq=False)
class PromptMeans:
    """Means of u and h over the responses of each prompt under some policy, for m constraints.

    Attributes:
        prompt_p: the prompts, ascending, shape (p,).
        u_mp: shape (m, p).
        h_mp: shape (m, p).
    """

    prompt_p: np.ndarray
    u_mp: FloatArray
    h_mp: FloatArray

    @classmethod
    def of_chunks(
        cls,
        chunks: Iterable[StatisticRows],
        constraints: Sequence[Constraint],
        *,
        at: Mapping[str, float] = NOWHERE,
    ) -> PromptMeans:
        """Under the reference; a prompt may lie in several chunks."""
        ids, sums = [], []
        for rows in chunks:
            prompt_p, place_n = np.unique(rows.prompt_n, return_inverse=True)
            values = _values(rows, constraints, at)
            ids.append(prompt_p)
            sums.append(np.stack([np.bincount(place_n, value_n) for value_n in (*values, np.ones(len(place_n)))]))
        prompt_p, place_q = np.unique(np.concatenate(ids), return_inverse=True)
        whole = np.concatenate(sums, axis=1)
        total = np.stack([np.bincount(place_q, row_q) for row_q in whole])
        means = np.asarray(total[:-1] / total[-1], dtype=np.float64)
        return cls(prompt_p, means[: len(constraints)], means[len(constraints) :])

    @classmethod
    def under(
        cls,
        weight_n: FloatArray,
        rows: StatisticRows,
        constraints: Sequence[Constraint],
        *,
        at: Mapping[str, float] = NOWHERE,
    ) -> PromptMeans:
        """Under weights, shape (n,), that sum to 1 within a prompt."""
        prompt_p, place_n = np.unique(rows.prompt_n, return_inverse=True)
        sums = [np.bincount(place_n, weight_n * value_n) for value_n in _values(rows, constraints, at)]
        means = np.asarray(sums, dtype=np.float64)
        return cls(prompt_p, means[: len(constraints)], means[len(constraints) :])


def _values(rows: StatisticRows, constraints: Sequence[Constraint], at: Mapping[str, float]) -> list[FloatArray]:
    """U of each constraint, then h of each."""
    columns = [rows.statistic_columns(one.statistic, at=at.get(one.name)) for one in constraints]
    ones_n = np.ones(len(rows.prompt_n))
    return [one.u_n for one in columns] + [ones_n if one.h_n is None else one.h_n for one in columns]


@dataclass(frozen=True)
class ColumnUnits:
    """How a column's numbers become those of the statistic, all in the user's own direction.

    Attributes:
        ratio: c of the column u - c h; None where h is 1 and the column is u.
        reference: the statistic under the reference.
        denominator: E_ref[h].
        policy_denominator: E[h] under the tilted policy, where that is known; under the reference before.
    """

    ratio: float | None
    reference: float
    denominator: float = 1.0
    policy_denominator: float = 1.0

    def threshold(self, column: Numbers) -> Numbers:
        """The threshold of the statistic that a threshold of the column stands for."""
        return column if self.ratio is None else self.ratio + column / self.policy_denominator

    def column_threshold(self, threshold: float) -> float:
        """The threshold of the column that one of the statistic stands for."""
        return threshold if self.ratio is None else (threshold - self.ratio) * self.policy_denominator

    def asked(self, offset: float) -> float:
        """An offset of the column's threshold as one of the statistic's."""
        return offset / self.policy_denominator

    def value(self, column: Numbers) -> Numbers:
        """The statistic of the policy, of which the column has this mean."""
        return column if self.ratio is None else self.ratio + column / self.policy_denominator

    def slack(self, column: Numbers) -> Numbers:
        """A slack of the policy."""
        return column / self.policy_denominator


UNKNOWN = ColumnUnits(None, np.nan)
"""Of a mean of one column, before the dual says what it is under the reference."""


@dataclass(frozen=True, eq=False)
class ColumnPlan:
    """Which columns the dual gets of some rows.

    Attributes:
        constraints: the m constraints.
        at: t of each cvar, by the constraint's name.
        ratios: c of each column u - c h, or None.
        prompt_p: the prompts that have constants, ascending, or None.
        constants_mp: what is subtracted from the columns, in the user's own direction, shape (m, p), or None.
    """

    constraints: tuple[Constraint, ...]
    at: Mapping[str, float]
    ratios: tuple[float | None, ...]
    prompt_p: np.ndarray | None = None
    constants_mp: FloatArray | None = None

    def turned(self, rows: StatisticRows) -> FloatArray:
        """The columns, turned (:mod:`pipeline.contracts.problem`), shape (n, m)."""
        columns = [
            rows.statistic_columns(one.statistic, at=self.at.get(one.name)).less(ratio)
            for one, ratio in zip(self.constraints, self.ratios, strict=True)
        ]
        column_nm = np.stack(columns, axis=1)
        if self.constants_mp is not None:
            assert self.prompt_p is not None  # they come together
            column_nm = column_nm - self.constants_mp.T[np.searchsorted(self.prompt_p, rows.prompt_n)]
        return np.asarray(column_nm * constraint_signs(self.constraints))

    def with_constants(
        self, reference: PromptMeans, policy: PromptMeans | None, units: Sequence[ColumnUnits]
    ) -> ColumnPlan:
        """With the constants of a prompt (see the module), those of the policy where it is known."""
        constants_mp = np.zeros_like(reference.u_mp)
        for j, (constraint, unit) in enumerate(zip(self.constraints, units, strict=True)):
            if constraint.margin is not None and not constraint.statistic.is_linear:
                own_p = reference.u_mp[j] - unit.reference * reference.h_mp[j]
                constants_mp[j] += unit.policy_denominator / unit.denominator * own_p
            if policy is not None and unit.ratio is not None:
                away = float(policy.u_mp[j].mean()) / unit.policy_denominator - unit.ratio
                constants_mp[j] += away * (policy.h_mp[j] - unit.policy_denominator)
        if not constants_mp.any():
            return replace(self, prompt_p=None, constants_mp=None)
        return replace(self, prompt_p=reference.prompt_p, constants_mp=constants_mp)


def plan_columns(
    constraints: Sequence[Constraint], reference: PromptMeans, chosen: Chosen = NOTHING
) -> tuple[ColumnPlan, tuple[ColumnUnits, ...]]:
    """The plan of rows whose means under the reference are known, and how its columns are read.

    Raises:
        InputError: no row counts for a constraint.
    """
    units = []
    for j, constraint in enumerate(constraints):
        above, below = float(reference.u_mp[j].mean()), float(reference.h_mp[j].mean())
        if not constraint.statistic.is_ratio:
            units.append(ColumnUnits(None, above))
            continue
        if not below > 0:
            raise InputError(f"constraint `{constraint.name}`: no response counts ({constraint.statistic.text()})")
        own = above / below
        ratio = chosen.ratios.get(constraint.name, constraint.absolute_threshold(own))
        units.append(ColumnUnits(ratio, own, below, below))
    plan = ColumnPlan(tuple(constraints), chosen.at, tuple(unit.ratio for unit in units))
    return plan.with_constants(reference, None, units), tuple(units)


@dataclass(frozen=True, eq=False)
class PosedProblem:
    """A problem of the dual, and what its columns are of.

    Attributes:
        problem: the dual problem, turned, under the demanded thresholds.
        plan: of its columns.
        units: how they are read, one for each constraint.
        rows: what it was made of, where that is in memory; None where it is not.
    """

    problem: DualProblem
    plan: ColumnPlan
    units: tuple[ColumnUnits, ...]
    rows: StatisticRows | None

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """As demanded."""
        return self.plan.constraints

    @property
    def relative_m(self) -> np.ndarray:
        """Where the dual redraws the reference's mean together with the prompts, shape (m,), booleans."""
        return np.array([one.margin is not None and one.statistic.is_linear for one in self.constraints], dtype=bool)

    def within(self, kl_budget: float | None) -> PosedProblem:
        """The same problem with so many nats a prompt to spend, beta being an outcome; None leaves it as it is.

        Raises:
            InputError: so many nats cannot be shown by samples of this size.
        """
        return self if kl_budget is None else replace(self, problem=self.problem.with_kl_budget(kl_budget))

    def at(self, beta: float) -> PosedProblem:
        """The same problem at a beta, whatever was to be spent."""
        return replace(self, problem=self.problem.with_kl_budget(None).with_beta(beta))

    def of_policy(self, multipliers: FloatArray, *, beta: float) -> PosedProblem:
        """The same problem, its units and its constants those of the policy of some multipliers at a beta.

        The policy and its multipliers stay what they are; intervals around them become those of the statistics. Of
        rows that are not in memory nothing changes.
        """
        if self.rows is None or all(one.statistic.is_linear for one in self.constraints):
            return self
        weight_n = tilted_row_weights(self.rows, self.plan.turned(self.rows), multipliers, beta=beta)
        policy = PromptMeans.under(weight_n, self.rows, self.constraints, at=self.plan.at)
        units = tuple(
            unit if unit.ratio is None else replace(unit, policy_denominator=float(h_p.mean()))
            for unit, h_p in zip(self.units, policy.h_mp, strict=True)
        )
        plan = self.plan.with_constants(_reference_means(self.rows, self.constraints), policy, units)
        problem = _build(self.rows, plan, beta=beta).with_kl_budget(self.problem.kl_budget)
        return finish_posing(problem, plan, units, self.rows)

    @property
    def chosen(self) -> Chosen:
        """What makes the same columns of other rows."""
        pairs = zip(self.constraints, self.plan.ratios, strict=True)
        return Chosen(self.plan.at, {one.name: ratio for one, ratio in pairs if ratio is not None})

    def with_columns(self, chosen: Chosen) -> PosedProblem:
        """The same demands on the same rows, their columns chosen elsewhere; rows not in memory stay as they are."""
        if self.rows is None or all(one.statistic.is_linear for one in self.constraints):
            return self
        posed = pose(self.rows, constraints=self.constraints, beta=self.problem.beta, chosen=chosen)
        return posed.within(self.problem.kl_budget)

    @property
    def moves(self) -> bool:
        """Whether what a statistic is divided by depends on the policy, so that no column serves two thresholds."""
        if self.rows is None:
            return False
        return any(
            one.statistic.per is not None or not _same_within_prompts(self.rows, one) for one in self.constraints
        )


def _same_within_prompts(rows: StatisticRows, constraint: Constraint) -> bool:
    """Whether either all rows of a prompt count or none."""
    if not constraint.statistic.where:
        return True
    h_p = PromptMeans.of_chunks([rows], [constraint], at={constraint.name: 0.0}).h_mp[0]
    return bool(np.isin(h_p, (0.0, 1.0)).all())


def pose(
    rows: StatisticRows, *, constraints: Sequence[Constraint], beta: float, chosen: Chosen = NOTHING
) -> PosedProblem:
    """The problem of constraints on rows in memory.

    A margin becomes an absolute threshold over the reference's own statistic on these rows.

    Args:
        rows: the rows.
        constraints: the m constraints; ``each`` is expanded.
        beta: KL strength, reward per nat.
        chosen: columns that were chosen on other rows, or at other thresholds.

    Raises:
        InputError: no row counts for a constraint, ``per`` is a score that is not positive, or numbers of a size that
            float64 cannot multiply.
    """
    plan, units = plan_rows(rows, constraints, chosen)
    return finish_posing(_build(rows, plan, beta=beta), plan, units, rows)


def finish_posing(
    problem: DualProblem, plan: ColumnPlan, units: Sequence[ColumnUnits], rows: StatisticRows | None
) -> PosedProblem:
    """The problem of columns that were made by a plan, under the demanded thresholds.

    Args:
        problem: on these columns, under any thresholds.
        plan: of the columns.
        units: of the columns.
        rows: what they were made of, where that is in memory.
    """
    signs_m = constraint_signs(plan.constraints)
    means = [float(sign * mean) for sign, mean in zip(signs_m, problem.reference_means_m, strict=True)]
    found = tuple(
        # Of a plain mean, the mean that the dual knows, to the last digit.
        replace(unit, reference=mean) if one.statistic.is_linear else unit
        for one, unit, mean in zip(plan.constraints, units, means, strict=True)
    )
    require_sizes(problem, plan.constraints)
    thresholds = [
        unit.column_threshold(one.absolute_threshold(unit.reference))
        for one, unit in zip(plan.constraints, found, strict=True)
    ]
    equalities = np.array([one.is_equality for one in plan.constraints], dtype=bool)
    posed = problem.with_thresholds(np.array(thresholds) * signs_m).with_equalities(equalities)
    return PosedProblem(posed, plan, found, rows)


def tilted_row_weights(
    rows: StatisticRows, column_nm: FloatArray, multipliers: FloatArray, *, beta: float
) -> FloatArray:
    """Weights of rows in any order under a tilt, shape (n,), summing to 1 within a prompt.

    Args:
        rows: the rows.
        column_nm: their turned columns, shape (n, m).
        multipliers: of the columns, shape (m,).
        beta: KL strength, reward per nat.
    """
    _, place_n = np.unique(rows.prompt_n, return_inverse=True)
    exponent_n = (rows.reward_n + column_nm @ multipliers) / beta
    highest_p = np.full(int(place_n.max()) + 1, -np.inf)
    np.maximum.at(highest_p, place_n, exponent_n)
    weight_n = np.exp(exponent_n - highest_p[place_n])
    return np.asarray(weight_n / np.bincount(place_n, weight_n)[place_n])


def plan_linear(constraints: Sequence[Constraint]) -> tuple[ColumnPlan, tuple[ColumnUnits, ...]]:
    """The plan of constraints that are all means of one column: their references are the dual's own means."""
    return ColumnPlan(tuple(constraints), NOWHERE, (None,) * len(constraints)), (UNKNOWN,) * len(constraints)


def plan_rows(
    rows: StatisticRows, constraints: Sequence[Constraint], chosen: Chosen = NOTHING
) -> tuple[ColumnPlan, tuple[ColumnUnits, ...]]:
    """The plan of rows in memory, and how its columns are read; arguments and errors as of :func:`pose`."""
    if all(one.statistic.is_linear for one in constraints):
        return plan_linear(constraints)
    starts = reference_tails(rows, constraints)
    reference = _reference_means(rows, constraints)
    return plan_columns(constraints, reference, replace(chosen, at={**starts, **chosen.at}))


def reference_tails(rows: StatisticRows, constraints: Sequence[Constraint]) -> dict[str, float]:
    """Where the tail of each cvar begins under the reference, score units, by the constraint's name."""
    found = {}
    weight_n = tilted_row_weights(rows, np.zeros((len(rows.prompt_n), 0)), np.zeros(0), beta=np.inf)
    for one in constraints:
        if one.statistic.kind != "cvar":
            continue
        assert one.statistic.level is not None  # Statistic's rule
        # u of a mean is the score itself, and h says which rows count.
        plain = rows.statistic_columns(replace(one.statistic, kind="mean", level=None, tail="lower"))
        count_n = weight_n if plain.h_n is None else weight_n * plain.h_n
        if count_n.any():
            _, found[one.name] = tail_mean(plain.u_n, count_n, level=one.statistic.level, tail=one.statistic.tail)
    return found


def _reference_means(rows: StatisticRows, constraints: Sequence[Constraint]) -> PromptMeans:
    """Each cvar at the t at which it is the reference's own."""
    return PromptMeans.of_chunks([rows], constraints, at=reference_tails(rows, constraints))


def _build(rows: StatisticRows, plan: ColumnPlan, *, beta: float) -> DualProblem:
    equalities = np.array([one.is_equality for one in plan.constraints], dtype=bool)
    return DualProblem.from_rows(
        rows.prompt_n,
        rows.reward_n,
        plan.turned(rows),
        thresholds=np.zeros(len(plan.constraints)),
        beta=beta,
        constraint_names=[one.name for one in plan.constraints],
    ).with_equalities(equalities)


def require_sizes(problem: DualProblem, constraints: Sequence[Constraint]) -> None:
    """Raise InputError where scores, or beta, are so large or so small that float64 cannot hold their products."""
    facts = problem.samples.facts
    sizes = [("beta", problem.beta, problem.beta), ("the reward", facts.reward_scale, abs(facts.reference_reward))]
    for j, constraint in enumerate(constraints):
        sizes.append((f"the score {constraint.statistic.score!r}", facts.score_scale_m[j], facts.score_magnitude_m[j]))
        asked = constraint.margin if constraint.threshold is None else constraint.threshold
        sizes.append((f"the constraint on {constraint.statistic.score!r}", 0.0, abs(asked or 0.0)))
    for what, spread, size in sizes:
        # A spread of zero is a score that no policy changes.
        wrong = size if size > _LARGEST else spread if spread > 0 and not _SMALLEST <= spread <= _LARGEST else None
        if wrong is not None:
            raise InputError(
                f"{what} is of the size {wrong:.3g}; scores, their spread within prompts and beta must lie between "
                f"{_SMALLEST:g} and {_LARGEST:g}, where float64 can multiply them: give them in other units"
            )
