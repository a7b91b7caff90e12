"""How often the evaluation's intervals contain the truth, for each statistic that a constraint can bound.

    python benchmarks/evaluation_coverage.py [--quick] [--datasets 2000] [--output FILE]

Every data set draws its prompts anew and K responses for each; the truth is that of the population of prompts. Beside
the method that ships (pipeline/evaluation/intervals.py) stands Student's t with n - 1 degrees of freedom, which a user
would take. *Too good* is the share of data sets whose whole interval lies on the good side of the truth: what would be
called satisfied and is not.

Shares differ between prompts by a beta distribution with the correlation between two responses to one prompt that is
given, or only some prompts have bad responses at all, half of theirs (`few bad prompts`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.statistics import Statistic
from pipeline.evaluation.intervals import mean_interval, share_interval, statistic_interval
from pipeline.scoring.estimates import Estimate, estimate
from pipeline.scoring.joined import JoinedScores

SIZES = ((24, 16), (90, 64), (400, 16))
LEVEL = 0.05
"""Of the tails."""


@dataclass(frozen=True)
class Case:
    """A statistic on a population.

    Attributes:
        name: for the table.
        truth: of the statistic.
        draw: from a generator, prompts and responses to the interval that ships and the one of Student's t.
        lower_is_better: which side of the truth is the good one.
    """

    name: str
    truth: float
    draw: Callable[[np.random.Generator, int, int], tuple[list[float], list[float]]]
    lower_is_better: bool = False


def plain_t(value_p: FloatArray) -> list[float]:
    """Student's t with n - 1 degrees of freedom."""
    low, high = stats.t.interval(0.95, len(value_p) - 1, value_p.mean(), stats.sem(value_p) or 1e-300)
    return [float(low), float(high)]


def estimated(statistic: Statistic, **scores_pk: FloatArray) -> Estimate:
    """The statistic of scores of shape (p, k) by name."""
    n_prompts, n_responses = next(iter(scores_pk.values())).shape
    rows = JoinedScores(
        prompt_ids=tuple(map(str, range(n_prompts))),
        prompt_n=np.repeat(np.arange(n_prompts), n_responses),
        sample_index_n=np.tile(np.arange(n_responses), n_prompts),
        reward_n=np.zeros(n_prompts * n_responses),
        score_names=tuple(scores_pk),
        scores_ns=np.column_stack([score_pk.ravel() for score_pk in scores_pk.values()]),
        cut_off_n=np.zeros(n_prompts * n_responses, dtype=bool),
    )
    return estimate(statistic, rows)


def both(found: Estimate) -> tuple[list[float], list[float]]:
    """The interval that ships, and Student's t."""
    return statistic_interval(found), plain_t(found.observations_q)


def share_case(share: float, spread: str) -> Case:
    """The share of good responses, absolute."""

    def of_prompts(rng: np.random.Generator, n: int) -> FloatArray:
        if spread == "equal prompts":
            return np.full(n, share)
        if spread == "few bad prompts":
            return np.where(rng.random(n) < 2 * (1 - share), 0.5, 1.0)
        scale = 1 / float(spread) - 1
        return rng.beta(share * scale, (1 - share) * scale, n)

    def draw(rng: np.random.Generator, n: int, k: int) -> tuple[list[float], list[float]]:
        share_p = rng.binomial(k, of_prompts(rng, n)) / k
        return share_interval(share_p, n_responses=n * k), plain_t(share_p)

    label = spread if " " in spread else f"correlation {spread}"
    return Case(f"share {share}, {label}", share, draw)


def share_margin_case(reference: float, share: float) -> Case:
    """The gain of a share over the reference's, prompts' shares correlated by 0.8."""
    sd = 0.8
    mean = {value: stats.norm.ppf(value) * np.sqrt(1 + sd**2) for value in (reference, share)}

    def draw(rng: np.random.Generator, n: int, k: int) -> tuple[list[float], list[float]]:
        first_p = rng.normal(size=n)
        second_p = 0.8 * first_p + 0.6 * rng.normal(size=n)
        gain_p = (
            rng.binomial(k, stats.norm.cdf(mean[share] + sd * second_p))
            - rng.binomial(k, stats.norm.cdf(mean[reference] + sd * first_p))
        ) / k
        return mean_interval(gain_p), plain_t(gain_p)

    return Case(f"share {share} over the reference's {reference}", share - reference, draw)


def ratio_case() -> Case:
    """Supported claims a claim, the number of claims unlike between prompts."""

    def draw(rng: np.random.Generator, n: int, k: int) -> tuple[list[float], list[float]]:
        claims_pk = 1 + rng.poisson(np.exp(1 + 0.5 * rng.normal(size=(n, 1))) * np.ones((1, k)))
        supported_pk = rng.binomial(claims_pk, rng.beta(18, 2, size=(n, 1)))
        return both(
            estimated(Statistic("supported", per="claims"), supported=1.0 * supported_pk, claims=1.0 * claims_pk)
        )

    return Case("ratio of means 0.9", 0.9, draw)


def shortfall_case() -> Case:
    """E (0 - g)+ of scores N(1.5, 1 + 0.25 between prompts)."""
    sd = np.sqrt(1.25)
    truth = float(sd * stats.norm.pdf(1.5 / sd) - 1.5 * stats.norm.cdf(-1.5 / sd))

    def draw(rng: np.random.Generator, n: int, k: int) -> tuple[list[float], list[float]]:
        score_pk = 1.5 + 0.5 * rng.normal(size=(n, 1)) + rng.normal(size=(n, k))
        return both(estimated(Statistic("g", "shortfall", below=0.0), g=score_pk))

    return Case("shortfall", truth, draw, lower_is_better=True)


def tail_case(name: str, draw_scores: Callable[[np.random.Generator, int, int], FloatArray]) -> Case:
    """CVaR of the worst twentieth; its truth by ten million draws."""
    pool = np.sort(
        np.concatenate([draw_scores(np.random.default_rng(part), 500_000, 1).ravel() for part in range(20)])
    )
    truth = float(pool[: int(LEVEL * len(pool))].mean())

    def draw(rng: np.random.Generator, n: int, k: int) -> tuple[list[float], list[float]]:
        return both(estimated(Statistic("g", "cvar", level=LEVEL), g=draw_scores(rng, n, k)))

    return Case(f"CVaR 0.05, {name}", truth, draw)


def cases() -> Iterator[Case]:
    """Every row of the table."""
    for share in (0.7, 0.97, 0.995):
        for spread in ("equal prompts", "0.1", "0.5", "few bad prompts"):
            yield share_case(share, spread)
    yield share_margin_case(0.6, 0.97)
    yield share_margin_case(0.95, 0.99)
    yield ratio_case()
    yield shortfall_case()
    yield tail_case("normal", lambda rng, n, k: 0.5 * rng.normal(size=(n, 1)) + rng.normal(size=(n, k)))
    yield tail_case("t with 4 degrees", lambda rng, n, k: 0.5 * rng.normal(size=(n, 1)) + rng.standard_t(4, (n, k)))
    yield tail_case(
        "prompts of unlike spread", lambda rng, n, k: np.exp(0.5 * rng.normal(size=(n, 1))) * rng.normal(size=(n, k))
    )


def measure(case: Case, n_prompts: int, n_responses: int, *, n_datasets: int, seed: int) -> dict[str, object]:
    """Coverage of both intervals, in percent."""
    rng = np.random.default_rng([seed, n_prompts, n_responses])
    drawn = np.array([case.draw(rng, n_prompts, n_responses) for _ in range(n_datasets)])  # (data set, method, end)
    below, above = drawn[..., 1] < case.truth, drawn[..., 0] > case.truth
    good = below if case.lower_is_better else above
    row: dict[str, object] = {"case": case.name, "prompts": n_prompts, "responses": n_responses}
    for place, method in enumerate(("ours", "t")):
        row[method] = 100 * float(np.mean(~below[:, place] & ~above[:, place]))
        row[f"{method}_too_good"] = 100 * float(np.mean(good[:, place]))
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure every case at every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=2000, help="replicated data sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="200 data sets")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args(arguments)
    n_datasets = 200 if args.quick else args.datasets
    print(f"{n_datasets} data sets; coverage and (too good) in percent, nominal 95 (2.5)\n")
    print("| statistic | prompts | responses | ours | Student's t |\n|---|---|---|---|---|")
    rows = []
    for case in cases():
        for n_prompts, n_responses in SIZES:
            row = measure(case, n_prompts, n_responses, n_datasets=n_datasets, seed=args.seed)
            rows.append(row)
            print(
                f"| {case.name} | {n_prompts} | {n_responses} | {row['ours']:.1f} ({row['ours_too_good']:.1f}) "
                f"| {row['t']:.1f} ({row['t_too_good']:.1f}) |",
                flush=True,
            )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
