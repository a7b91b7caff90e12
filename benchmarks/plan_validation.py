"""Do plans keep what they say? Pilot, plan, run, and the truth: how often a demand is missed by more than it may be.

    python benchmarks/plan_validation.py [--repeats 200] [--only TEXT ...] [--table PATH] [--output FILE]

Each repeat of a case draws a pilot, plans the number of prompts for a number of responses a prompt, draws a run of
that size anew, solves it, and asks the population for the slack of the policy tilted by its lam_hat. A plan is for a
confidence of 95%: 5% of the repeats should be off by more than what is allowed, counted over pilots and runs alike, a
repeat of several constraints being off where one of them is. What is allowed is chosen for each case so that about
200 prompts are needed, or five times the bias of so few responses where that is more, as a plan asks for.

Truth is known in two ways: populations of gaussian_population.py have it in closed form, with responses without end;
the others are tables of scores, of which a draw takes prompts with replacement, and of each prompt responses with
replacement, so that the table itself is the population. The tables are made to be as unpleasant as real ones are
(heavy tails, costs with two modes, prompts of unlike spread), and --table adds one of your own: a Parquet file with
`prompt_id` and scores, the reward first, such as the scores of a run. The cases "unseen" are those that no limit of a
plan was set on; docs/sample_sizes.md has them at --seed 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from gaussian_population import GaussianPopulation

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.constraint_text import read_constraints
from pipeline.contracts.errors import DualignError
from pipeline.contracts.problem import Constraint, expand_constraints
from pipeline.contracts.statistics import Statistic, StatisticColumns, statistic_columns
from pipeline.dual.piloting import measure_pilot
from pipeline.dual.posing import PosedProblem, pose
from stage1_dual.dual import DualSolution, SizeRequest, plan_sizes, solve_dual, top_up

_CONFIDENCE = 0.95
_WANTED_PROMPTS = 200


@dataclass(frozen=True, eq=False)
class Rows:
    """Scored responses, one a row: what a demand is posed on."""

    prompt_n: np.ndarray
    reward_n: FloatArray
    scores: Mapping[str, FloatArray]
    labels: Mapping[str, np.ndarray]

    def score_n(self, name: str) -> FloatArray:
        """Raw scores."""
        return self.scores[name]

    def statistic_columns(self, statistic: Statistic, *, at: float | None = None) -> StatisticColumns:
        """U and h of each row."""
        return statistic_columns(statistic, self.scores, self.labels, at=at)


class World(Protocol):
    """A population that pilots and runs are drawn from."""

    def draw(self, rng: np.random.Generator, *, n_prompts: int, n_responses: int) -> Rows:
        """Prompts, and responses to each."""

    def slacks(self, posed: PosedProblem, solution: DualSolution) -> FloatArray:
        """Of the policy of a solution in the population, turned, units of the statistics, shape (m,)."""

    def kl(self, constraints: Sequence[Constraint], beta: float) -> float:
        """Of the population's optimum, nats."""


@dataclass(frozen=True)
class GaussianWorld:
    """Jointly Gaussian scores r, g0, g1, ... with responses without end. Demands are on means of g alone."""

    population: GaussianPopulation

    def draw(self, rng: np.random.Generator, *, n_prompts: int, n_responses: int) -> Rows:
        """Prompts, and responses to each."""
        r_pk, g_pkm = self.population.draw(rng, n_prompts=n_prompts, n_responses=n_responses)
        scores = {f"g{j}": g_pkm[:, :, j].ravel() for j in range(g_pkm.shape[2])}
        return Rows(np.repeat(np.arange(n_prompts), n_responses), r_pk.ravel(), scores, {})

    def slacks(self, posed: PosedProblem, solution: DualSolution) -> FloatArray:  # noqa: ARG002  # they are its own
        """The reference means of the population are 0, so that margins and thresholds are the same."""
        population = replace(self.population, beta=solution.beta)
        return population.scores(solution.multipliers) - population.margins_m

    def kl(self, constraints: Sequence[Constraint], beta: float) -> float:  # noqa: ARG002  # they are its own
        """Of the population's optimum."""
        population = replace(self.population, beta=beta)
        return population.kl(population.lam_star)


@dataclass(frozen=True, eq=False)
class TableWorld:
    """A table of scores as a population, shape (p, k) each, the first being the reward."""

    scores: Mapping[str, FloatArray]
    labels: Mapping[str, np.ndarray]

    @property
    def reward(self) -> str:
        """The score that is maximised."""
        return next(iter(self.scores))

    def draw(self, rng: np.random.Generator, *, n_prompts: int, n_responses: int) -> Rows:
        """Prompts, and responses to each."""
        size_p, size_k = self.scores[self.reward].shape
        prompt_p = rng.integers(size_p, size=n_prompts)
        take = (prompt_p[:, None], rng.integers(size_k, size=(n_prompts, n_responses)))
        scores = {name: value[take].ravel() for name, value in self.scores.items()}
        labels = {name: np.repeat(value[prompt_p], n_responses) for name, value in self.labels.items()}
        return Rows(np.repeat(np.arange(n_prompts), n_responses), scores[self.reward], scores, labels)

    def whole(self) -> Rows:
        """Every row of it, once."""
        size_p, size_k = self.scores[self.reward].shape
        scores = {name: value.ravel() for name, value in self.scores.items()}
        labels = {name: np.repeat(value, size_k) for name, value in self.labels.items()}
        return Rows(np.repeat(np.arange(size_p), size_k), scores[self.reward], scores, labels)

    def slacks(self, posed: PosedProblem, solution: DualSolution) -> FloatArray:
        """By the columns that the run chose, on every row of the table."""
        shape = self.scores[self.reward].shape
        rows = self.whole()
        plan = replace(posed.plan, prompt_p=None, constants_mp=None)  # constants of a prompt do not move a policy
        logit_pk = ((rows.reward_n + plan.turned(rows) @ solution.multipliers) / solution.beta).reshape(shape)
        weight_pk = np.exp(logit_pk - logit_pk.max(axis=1, keepdims=True))
        weight_pk /= weight_pk.sum(axis=1, keepdims=True)
        found = []
        for one in posed.constraints:
            columns = rows.statistic_columns(one.statistic)
            u_pk = columns.u_n.reshape(shape)
            h_pk = np.ones(shape) if columns.h_n is None else columns.h_n.reshape(shape)
            value = np.sum(weight_pk * u_pk) / np.sum(weight_pk * h_pk)
            found.append(one.sign * (value - one.absolute_threshold(float(u_pk.sum() / h_pk.sum()))))
        return np.array(found)

    def kl(self, constraints: Sequence[Constraint], beta: float) -> float:
        """Of the population's optimum."""
        return solve_dual(pose(self.whole(), constraints=constraints, beta=beta).problem).predicted_kl

    def beta_of(self, constraints: Sequence[Constraint], kl: float) -> float:
        """The beta at which the population's optimum has this KL."""
        return solve_dual(pose(self.whole(), constraints=constraints, beta=1.0).within(kl).problem).beta


@dataclass(frozen=True, eq=False)
class Case:
    """A world, a demand on it, a beta, a pilot's size and the responses a prompt of the run."""

    name: str
    world: World
    constraints: tuple[Constraint, ...]
    beta: float
    n_responses: int
    pilot: tuple[int, int] = (64, 32)

    def pilot_prediction(self) -> FloatArray:
        """What is allowed, in units of the statistics: what about 200 prompts need, by a pilot without error."""
        rows = self.world.draw(np.random.default_rng(12345), n_prompts=1000, n_responses=max(64, self.n_responses))
        pilot = measure_pilot(pose(rows, constraints=self.constraints, beta=self.beta))
        found, bias_m = pilot.predict(self.n_responses), np.abs(pilot.bias_at(self.n_responses))
        allowed_m = np.maximum(2.0 * found.errors_m(_WANTED_PROMPTS) + bias_m, 5.0 * bias_m)
        return np.array([float(f"{value:.2g}") for value in allowed_m])


@dataclass(frozen=True)
class Outcome:
    """What one repeat came to."""

    n_prompts: int
    trusted: bool
    missed: bool
    below: bool
    reasons: tuple[str, ...]


def repeat(case: Case, within_m: FloatArray, rng: np.random.Generator) -> Outcome:
    """Pilot, plan, run, truth. Where there is no plan, or no run of it, that is an outcome that is not trusted."""
    n_pilot, k_pilot = case.pilot
    try:
        drawn = case.world.draw(rng, n_prompts=n_pilot, n_responses=k_pilot)
        pilot = measure_pilot(pose(drawn, constraints=case.constraints, beta=case.beta))
    except DualignError as error:
        return Outcome(0, trusted=False, missed=False, below=False, reasons=(type(error).__name__,))
    request = SizeRequest(
        within_m, _CONFIDENCE, None, 2 * within_m, n_responses=case.n_responses, most_prompts=20 * _WANTED_PROMPTS
    )
    plan = plan_sizes(pilot, request)
    assert plan.n_prompts is not None  # there is a limit to them
    rows = case.world.draw(rng, n_prompts=plan.n_prompts, n_responses=plan.n_responses)
    posed = pose(rows, constraints=case.constraints, beta=case.beta)
    try:
        solution = solve_dual(posed.problem)
    except DualignError as error:
        return Outcome(plan.n_prompts, not plan.reasons, missed=True, below=True, reasons=(type(error).__name__,))
    slack_m = case.world.slacks(posed, solution)
    two_sided_m = (solution.multipliers > 0) | posed.problem.is_equality_m
    below = bool((slack_m < -within_m).any())
    missed = below or bool((two_sided_m & (slack_m > within_m)).any())
    return Outcome(plan.n_prompts, not plan.reasons, missed, below, plan.reasons)


_MOST = (1500, 256)
"""Prompts and responses that a run which is topped up may come to."""


def repeat_looks(case: Case, within_m: FloatArray, rng: np.random.Generator) -> Outcome:
    """Draw, look, top up, until the slacks are within by the prediction, or the limits are reached."""
    drawn = case.world.draw(rng, n_prompts=_MOST[0], n_responses=_MOST[1])
    size: tuple[int, int] | None = case.pilot
    while size is not None:
        n_prompts, n_responses = size
        rows = _part(drawn, n_prompts, n_responses)
        posed = pose(rows, constraints=case.constraints, beta=case.beta)
        try:
            pilot = measure_pilot(posed)
        except DualignError as error:
            return Outcome(n_prompts, trusted=False, missed=False, below=False, reasons=(type(error).__name__,))
        request = SizeRequest(
            within_m,
            _CONFIDENCE,
            None,
            2 * within_m,
            most_prompts=_MOST[0],
            most_responses=_MOST[1],
            drawn_prompts=n_prompts,
            drawn_responses=n_responses,
        )
        holds = pilot.predict(n_responses).miss(n_prompts, within_m) <= 1 - _CONFIDENCE
        size = None if holds else top_up(pilot, request)
    solution = solve_dual(posed.problem)
    slack_m = case.world.slacks(posed, solution)
    two_sided_m = (solution.multipliers > 0) | posed.problem.is_equality_m
    below = bool((slack_m < -within_m).any())
    missed = below or bool((two_sided_m & (slack_m > within_m)).any())
    return Outcome(n_prompts, holds, missed, below, () if holds else (f"ended at {n_responses} responses",))


def _part(rows: Rows, n_prompts: int, n_responses: int) -> Rows:
    """The first responses of the first prompts, as if no more had been drawn."""
    take = (np.arange(n_prompts)[:, None] * _MOST[1] + np.arange(n_responses)).ravel()
    scores = {name: value_n[take] for name, value_n in rows.scores.items()}
    labels = {name: value_n[take] for name, value_n in rows.labels.items()}
    return Rows(rows.prompt_n[take], rows.reward_n[take], scores, labels)


def measure(case: Case, *, n_repeats: int, seed: int, looks: bool = False) -> dict[str, Any]:
    """One row of the table."""
    started = time.monotonic()
    within_m = case.pilot_prediction()
    seeds = np.random.SeedSequence([seed, *case.name.encode(), case.n_responses, *case.pilot]).spawn(n_repeats)
    one_repeat = repeat_looks if looks else repeat
    outcomes = [one_repeat(case, within_m, np.random.default_rng(one)) for one in seeds]
    kept = [one for one in outcomes if one.trusted]
    sizes = [one.n_prompts for one in kept] or [0]
    reasons: dict[str, int] = {}
    for one in outcomes:
        for reason in one.reasons:
            kind = " ".join(word for word in reason.split() if not any(letter.isdigit() for letter in word))
            reasons[kind] = reasons.get(kind, 0) + 1
    return {
        "case": case.name,
        "m": len(case.constraints),
        "kl": case.world.kl(case.constraints, case.beta),
        "responses": case.n_responses,
        "pilot": list(case.pilot),
        "within": within_m.tolist(),
        "repeats": n_repeats,
        "trusted": len(kept),
        "missed": sum(one.missed for one in kept),
        "below": sum(one.below for one in kept),
        "untrusted_missed": sum(one.missed for one in outcomes if not one.trusted),
        "prompts": [int(value) for value in np.quantile(sizes, [0.1, 0.5, 0.9])],
        "reasons": reasons,
        "seconds": time.monotonic() - started,
    }


HEADER = (
    "| population and demand | m | KL | K | pilot | within | prompts, 10 to 90% | trusted % | missed % of these | "
    "below % | missed % of the others |"
)


def format_row(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    n, kept = int(str(row["repeats"])), int(str(row["trusted"]))

    def share(part: object, whole: int) -> str:
        return f"{100 * int(str(part)) / whole:.1f}" if whole else "-"

    low, _, high = row["prompts"]
    allowed = ", ".join(f"{value:g}" for value in row["within"])
    p, k = row["pilot"]
    return (
        f"| {row['case']} | {row['m']} | {row['kl']:.2f} | {row['responses']} | {p} x {k} | {allowed} | "
        f"{low} to {high} | {share(kept, n)} | {share(row['missed'], kept)} | {share(row['below'], kept)} | "
        f"{share(row['untrusted_missed'], n - kept)} |"
    )


# The populations.


def _gaussian(
    kl: float, *, n_constraints: int = 1, spread: float = 0.0, margin: float = 0.4
) -> tuple[GaussianWorld, float]:
    """A Gaussian world and the beta at which its optimum has this KL."""
    population = GaussianPopulation(margin=margin, n_constraints=n_constraints, spread=spread, between=0.2)
    low, high = 0.05, 50.0
    for _ in range(80):
        middle = (low * high) ** 0.5
        candidate = replace(population, beta=middle)
        low, high = (middle, high) if candidate.kl(candidate.lam_star) > kl else (low, middle)
    return GaussianWorld(replace(population, beta=high)), high


def _size(rng: np.random.Generator, *shape: int) -> FloatArray:
    return rng.normal(size=shape)


def heavy_tails(n_prompts: int = 800, n_responses: int = 384) -> TableWorld:
    """Rewards with Student tails of 3 degrees, costs that are lognormal, both pushed by how reckless a response is."""
    rng = np.random.default_rng(101)
    shape = (n_prompts, n_responses)
    reckless = _size(rng, *shape)
    reward = 0.6 * reckless + rng.standard_t(3, size=shape) / 2 + _size(rng, n_prompts, 1)
    cost = np.exp(0.5 * reckless + 0.7 * _size(rng, *shape) + 0.5 * _size(rng, n_prompts, 1))
    return TableWorld({"helpful": np.clip(reward, -8, 8), "cost": np.minimum(cost, 30.0)}, {})


def two_modes(n_prompts: int = 800, n_responses: int = 384) -> TableWorld:
    """Responses are unsafe or not, and prompts differ much in how often; two categories, and a number of claims."""
    rng = np.random.default_rng(102)
    shape = (n_prompts, n_responses)
    category = np.where(rng.uniform(size=n_prompts) < 0.4, "plain", "risky")
    often = np.where(category == "risky", rng.beta(0.8, 1.2, size=n_prompts), rng.beta(0.5, 4.0, size=n_prompts))
    unsafe = rng.uniform(size=shape) < often[:, None]
    reward = 0.7 * unsafe + _size(rng, *shape) + _size(rng, n_prompts, 1)
    cost = -2.0 + 7.0 * unsafe + _size(rng, *shape)
    claims = 1.0 + rng.poisson(4, size=shape)
    errors = rng.binomial(claims.astype(int), np.where(unsafe, 0.35, 0.15)).astype(float)
    scores = {"helpful": reward, "cost": cost, "claims": claims, "errors": errors}
    return TableWorld(scores, {"category": category})


def unlike_spread(n_prompts: int = 800, n_responses: int = 384) -> TableWorld:
    """Prompts whose responses spread little or much: standard deviations with a coefficient of variation of 0.8."""
    rng = np.random.default_rng(103)
    shape = (n_prompts, n_responses)
    size_p1 = np.minimum(rng.gamma(1.6, 1 / 1.6, size=(n_prompts, 1)), 3.0)
    shared = _size(rng, *shape)
    scores = {
        "helpful": size_p1 * (0.6 * shared + 0.8 * _size(rng, *shape)) + _size(rng, n_prompts, 1),
        "harmless": size_p1 * (-0.5 * shared + 0.85 * _size(rng, *shape)) + 0.5 * _size(rng, n_prompts, 1),
        "humour": size_p1 * (-0.2 * shared + 0.98 * _size(rng, *shape)) + 0.5 * _size(rng, n_prompts, 1),
    }
    return TableWorld(scores, {})


def unseen_costs(n_prompts: int = 800, n_responses: int = 384) -> TableWorld:
    """Not used in setting any threshold: lognormal costs, and a quality that most responses have, not all prompts."""
    rng = np.random.default_rng(211)
    shape = (n_prompts, n_responses)
    pushed = _size(rng, *shape)
    reward = 0.5 * pushed + 0.87 * _size(rng, *shape) + _size(rng, n_prompts, 1)
    cost = np.exp(0.4 * pushed + 0.9 * _size(rng, *shape) + 0.6 * _size(rng, n_prompts, 1))
    quality = 1.2 - 0.8 * pushed + _size(rng, *shape) + _size(rng, n_prompts, 1)
    return TableWorld({"helpful": reward, "cost": np.minimum(cost, 60.0), "quality": quality}, {})


def unseen_spreads(n_prompts: int = 800, n_responses: int = 384) -> TableWorld:
    """Not used in setting any threshold: three prompts of four spread little, the fourth three times as much."""
    rng = np.random.default_rng(212)
    shape = (n_prompts, n_responses)
    size_p1 = np.where(rng.uniform(size=(n_prompts, 1)) < 0.75, 0.5, 1.7)
    pushed = _size(rng, *shape)
    scores = {
        "helpful": size_p1 * (0.5 * pushed + 0.87 * _size(rng, *shape)) + _size(rng, n_prompts, 1),
        "kind": size_p1 * (-0.4 * pushed + 0.92 * _size(rng, *shape)) + 0.5 * _size(rng, n_prompts, 1),
        "brief": -0.5 * pushed + 0.87 * _size(rng, *shape) + 0.5 * _size(rng, n_prompts, 1),
    }
    return TableWorld(scores, {})


def later_spreads(n_prompts: int = 800, n_responses: int = 384) -> TableWorld:
    """Written down after the terms of second order: prompts of lognormal spread, and a share of bad responses."""
    rng = np.random.default_rng(307)
    shape = (n_prompts, n_responses)
    size_p1 = np.minimum(np.exp(0.6 * _size(rng, n_prompts, 1)), 3.5)
    pushed = _size(rng, *shape)
    scores = {
        "helpful": size_p1 * (0.6 * pushed + 0.8 * _size(rng, *shape)) + _size(rng, n_prompts, 1),
        "civil": size_p1 * (-0.3 * pushed + 0.95 * _size(rng, *shape)) + 0.6 * _size(rng, n_prompts, 1),
        "risk": 0.4 * pushed + 0.92 * _size(rng, *shape) + 0.8 * _size(rng, n_prompts, 1),
    }
    return TableWorld(scores, {})


def read_table(path: Path) -> TableWorld:
    """A table of one row a response, as many a prompt as the prompt with the fewest has; the reward column first."""
    table = pq.read_table(path)
    _, place_n = np.unique(table["prompt_id"].to_pylist(), return_inverse=True)
    fewest = int(np.bincount(place_n).min())
    order_n = np.argsort(place_n, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(place_n))[:-1]])
    take = order_n[(starts[:, None] + np.arange(fewest)).ravel()]
    names = [name for name in table.column_names if name not in ("prompt_id", "sample_index", "category", "split")]
    scores = {name: table[name].to_numpy()[take].reshape(-1, fewest) for name in names}
    labels = {}
    if "category" in table.column_names:
        labels["category"] = np.array(table["category"].to_pylist())[take].reshape(-1, fewest)[:, 0]
    return TableWorld(scores, labels)


def _demanded(world: TableWorld, *texts: str) -> tuple[Constraint, ...]:
    stated = read_constraints(texts)
    counts = {
        name: dict(zip(*np.unique(value, return_counts=True), strict=True)) for name, value in world.labels.items()
    }
    return expand_constraints(stated, {name: {str(k): int(v) for k, v in one.items()} for name, one in counts.items()})


def _table_cases(
    name: str, world: TableWorld, demands: Sequence[tuple[Sequence[str], float, int]], **settings: tuple[int, int]
) -> list[Case]:
    cases = []
    for texts, kl, n_responses in demands:
        constraints = _demanded(world, *texts)
        beta = world.beta_of(constraints, kl)
        cases.append(Case(f"{name}: {'; '.join(texts)}", world, constraints, beta, n_responses, **settings))
    return cases


def all_cases(table: Path | None) -> list[Case]:
    """Every case, in the order of the table."""
    cases = []
    for kl, n_responses, n_constraints, spread, margin in (
        (0.2, 16, 1, 0.5, 0.4),
        (0.2, 256, 1, 0.5, 0.4),
        (0.5, 16, 1, 0.0, 0.4),
        (0.5, 32, 1, 0.5, 0.4),
        (0.5, 64, 3, 0.5, 0.3),
        (0.5, 128, 2, 0.0, 0.4),
        (1.0, 32, 1, 0.5, 0.6),
        (1.0, 64, 2, 0.5, 0.5),
        (1.0, 128, 3, 0.5, 0.4),
        (1.5, 32, 1, 0.5, 0.6),
        (1.5, 128, 1, 0.5, 0.6),
        (1.5, 256, 2, 0.5, 0.5),
    ):
        world, beta = _gaussian(kl, n_constraints=n_constraints, spread=spread, margin=margin)
        # Few responses leave a bias that is small beside the spread of prompts, and large where a margin cancels that.
        reference = "ref + " if n_responses > 32 else ""
        if not reference:
            world = GaussianWorld(replace(world.population, score_effect=1.0))
        texts = [f"g{j} >= {reference}{margin}" for j in range(n_constraints)]
        like = f"Gaussian, spread {spread:g}: {'; '.join(texts)}"
        pilot = (64, 32) if kl < 1.2 else (64, 64)
        cases.append(Case(like, world, read_constraints(texts), beta, n_responses, pilot))
    cases += _table_cases(
        "heavy tails",
        heavy_tails(),
        [
            (["cost <= ref - 0.4"], 0.3, 16),
            (["cost <= ref - 0.4"], 0.3, 64),
            (["share(cost >= 3) <= 0.1"], 0.6, 64),
            (["shortfall(helpful, -1) <= ref - 0.1", "cost <= ref - 0.3"], 0.5, 64),
        ],
    )
    cases += _table_cases(
        "two modes",
        two_modes(),
        [
            (["cost <= ref - 1"], 0.3, 16),
            (["share(cost <= 0) >= 0.85"], 0.5, 32),
            (["share(cost <= 0) >= ref + 0.15"], 0.6, 128),
            (["errors per claims <= ref - 0.03"], 0.3, 64),
            (["each(category): cost <= ref - 0.6"], 0.4, 64),
            (["share(cost <= 0)[category=risky] >= ref + 0.15", "errors per claims <= 0.19"], 0.5, 64),
            (["share(cost <= 0) >= 0.85"], 1.2, 128),
        ],
    )
    cases += _table_cases(
        "unlike spread",
        unlike_spread(),
        [
            (["harmless >= ref + 0.4"], 0.4, 16),
            (["harmless >= ref + 0.4"], 0.4, 256),
            (["harmless >= ref + 0.3", "humour >= ref + 0.3"], 0.8, 64),
            (["harmless = 0.3", "humour >= ref + 0.2"], 0.5, 64),
        ],
    )
    # Made and fixed before they were measured once, after all thresholds were.
    cases += _table_cases(
        "unseen costs",
        unseen_costs(),
        [(["cost <= ref - 0.5"], 0.3, 24), (["share(quality >= 0) >= 0.9"], 0.8, 96)],
    )
    cases += _table_cases(
        "unseen spreads",
        unseen_spreads(),
        [(["kind >= ref + 0.3"], 0.3, 48), (["kind >= ref + 0.3", "brief >= ref + 0.3"], 0.8, 96)],
    )
    cases += _table_cases(
        "later spreads",
        later_spreads(),
        [
            (["civil >= ref + 0.3"], 0.4, 32),
            (["civil >= ref + 0.3"], 0.4, 192),
            (["civil >= ref + 0.25", "share(risk >= 1) <= 0.15"], 0.7, 96),
        ],
    )
    if table is not None:
        given = read_table(table)
        others = list(given.scores)[1:3]
        own = [f"{name} >= ref + {0.5 * float(given.scores[name].std(axis=1).mean()):.2g}" for name in others]
        demands: list[tuple[Sequence[str], float, int]] = [(own[:1], 0.5, 32), (own[:1], 1.0, 64), (own, 0.8, 64)]
        cases += _table_cases(table.stem, given, demands)
    return cases


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name has one of these")
    parser.add_argument("--table", type=Path, help="a table of scores of your own")
    parser.add_argument("--looks", action="store_true", help="top up from 64 x 16 until it holds, in place of a plan")
    parser.add_argument("--pilot", type=int, nargs=2, metavar=("PROMPTS", "RESPONSES"), help="another size of pilots")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args(arguments)
    wanted: Callable[[str], bool] = lambda name: not args.only or any(text in name for text in args.only)  # noqa: E731
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    rows = []
    for case in all_cases(args.table):
        if not wanted(case.name):
            continue
        if args.looks or args.pilot:
            case = replace(case, pilot=tuple(args.pilot or (64, 16)))  # noqa: PLW2901  # the same, from another pilot
        rows.append(measure(case, n_repeats=args.repeats, seed=args.seed, looks=args.looks))
        print(format_row(rows[-1]))
        sys.stdout.flush()
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
