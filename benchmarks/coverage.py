"""How often the intervals contain the truth, on populations whose lam* has a closed form.

    python benchmarks/coverage.py [--quick] [--datasets 1000] [--processes 1] [--output FILE]

Every data set draws its prompts anew (with their mean scores and spreads) and K responses for each from the
population of gaussian_population.py, solves the dual and asks for intervals at a nominal 95%. The population is over
prompts, with infinitely many responses each. What each interval should contain:

- lam: the population's lam*. By bootstrap, and by sandwich (lam_hat +- 1.96 standard errors).
- optimum reward, optimum KL: those of the population's policy at lam*.
- policy ...: what the policy tilted by this data set's lam_hat does in the population: its target moves with the data
  set. The slack is against the population's threshold, for a margin over the population's reference mean.
- ..., moved: the bootstrap interval moved by the correction of the response ladder for finitely many responses.

Beside the coverage: the share of data sets whose interval lies wholly below and wholly above the target; the bias of
the estimate in its own standard deviations; and the mean half-width over 1.96 of those standard deviations. An
interval of the right width (1) about an estimate that is biased by half a standard deviation covers 92%, by a whole
one 83%.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gaussian_population import GaussianPopulation, over_datasets
from numpy.typing import ArrayLike

from pipeline.contracts.arrays import FloatArray
from stage1_dual.dual import DualProblem, bootstrap_intervals, climb_ladder, sandwich_standard_errors, solve_dual

_NORMAL_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class Scenario:
    """A population and how thresholds are given.

    Attributes:
        name: for the table.
        population: what data sets are drawn from.
        relative: margins over the sample's reference mean, else absolute thresholds.
    """

    name: str
    population: GaussianPopulation
    relative: bool


SCENARIOS = (
    Scenario("absolute threshold", GaussianPopulation(beta=2.0), relative=False),
    Scenario("margin", GaussianPopulation(beta=2.0), relative=True),
    Scenario("margin, prompts differ in spread", GaussianPopulation(beta=2.0, spread=0.5), relative=True),
    Scenario("margin, stronger tilt", GaussianPopulation(beta=1.0), relative=True),
    Scenario("3 absolute thresholds", GaussianPopulation(beta=2.0, n_constraints=3), relative=False),
    Scenario("3 margins", GaussianPopulation(beta=2.0, n_constraints=3), relative=True),
)


def intervals_of_dataset(
    scenario: Scenario, n_prompts: int, n_responses: int, n_replicates: int, seed: int
) -> dict[str, FloatArray]:
    """By quantity: estimate, low, high and target, last axis 4; one row a constraint where there are several."""
    rng = np.random.default_rng(seed)
    population = scenario.population
    r_pk, g_pkm = population.draw(rng, n_prompts=n_prompts, n_responses=n_responses)
    relative_m = np.full(population.n_constraints, scenario.relative)
    reference_m = np.mean(g_pkm, axis=(0, 1)) if scenario.relative else np.zeros(population.n_constraints)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=reference_m + population.margins_m, beta=population.beta)
    solution = solve_dual(problem)
    bootstrap = bootstrap_intervals(
        problem, solution, rng=rng, n_replicates=n_replicates, thresholds_are_relative_m=relative_m
    )
    errors = sandwich_standard_errors(problem, solution, thresholds_are_relative_m=relative_m)
    lam_m, lam_star_m = solution.multipliers, population.lam_star
    ladder = climb_ladder(problem, solution)
    if ladder.bias is None:
        raise ValueError(f"no interval can be moved: {ladder.refusal}")
    bias = ladder.bias
    sandwich = lam_m[:, np.newaxis] + np.outer(errors.multipliers, [-_NORMAL_QUANTILE, _NORMAL_QUANTILE])
    optimum, policy = bootstrap.optimum, bootstrap.policy
    parts: dict[str, tuple[ArrayLike, ArrayLike, ArrayLike]] = {
        "lam, bootstrap": (lam_m, bootstrap.multipliers, lam_star_m),
        "lam, sandwich": (lam_m, sandwich, lam_star_m),
        "lam, bootstrap, moved": (
            lam_m - bias.multipliers,
            bootstrap.multipliers - bias.multipliers[:, np.newaxis],
            lam_star_m,
        ),
        "optimum reward": (solution.predicted_reward, optimum.reward, population.reward(lam_star_m)),
        "optimum KL": (solution.predicted_kl, optimum.kl, population.kl(lam_star_m)),
        "optimum KL, moved": (
            solution.predicted_kl - bias.optimum.kl,
            optimum.kl - bias.optimum.kl,
            population.kl(lam_star_m),
        ),
        "policy reward": (solution.predicted_reward, policy.reward, population.reward(lam_m)),
        "policy KL": (solution.predicted_kl, policy.kl, population.kl(lam_m)),
        "policy KL, moved": (
            solution.predicted_kl - bias.policy.kl,
            policy.kl - bias.policy.kl,
            population.kl(lam_m),
        ),
        "policy constraint": (solution.predicted_constraints, policy.constraints, population.scores(lam_m)),
        "policy slack": (solution.slack, policy.slack, population.scores(lam_m) - population.margins_m),
        "policy slack, moved": (
            solution.slack - bias.policy.slack,
            policy.slack - bias.policy.slack[:, np.newaxis],
            population.scores(lam_m) - population.margins_m,
        ),
    }
    return {
        name: np.column_stack([np.atleast_1d(value), np.atleast_2d(interval), np.atleast_1d(target)])
        for name, (value, interval, target) in parts.items()
    }


def measure(
    scenario: Scenario,
    *,
    n_prompts: int,
    n_responses: int,
    n_datasets: int,
    n_replicates: int,
    seed: int,
    processes: int,
) -> list[dict[str, object]]:
    """One row a quantity, over ``n_datasets`` data sets."""
    entropy = [seed, n_prompts, n_responses, SCENARIOS.index(scenario) if scenario in SCENARIOS else len(SCENARIOS)]
    run = partial(intervals_of_dataset, scenario, n_prompts, n_responses, n_replicates)
    datasets = over_datasets(run, entropy=entropy, n_datasets=n_datasets, processes=processes)
    rows: list[dict[str, object]] = []
    for name in datasets[0]:
        value_dm, low_dm, high_dm, target_dm = np.moveaxis(np.stack([one[name] for one in datasets]), -1, 0)
        below_dm, above_dm = high_dm < target_dm, low_dm > target_dm
        covered_d = np.mean(~below_dm & ~above_dm, axis=1)
        sd = float(np.mean(np.std(value_dm - target_dm, axis=0, ddof=1)))
        rows.append(
            {
                "scenario": scenario.name,
                "beta": scenario.population.beta,
                "kl": scenario.population.kl(scenario.population.lam_star),
                "prompts": n_prompts,
                "responses": n_responses,
                "datasets": n_datasets,
                "quantity": name,
                "coverage": float(np.mean(covered_d)),
                "coverage_error": float(np.std(covered_d, ddof=1) / np.sqrt(n_datasets)),
                "below": float(np.mean(below_dm)),
                "above": float(np.mean(above_dm)),
                "bias_in_sd": float(np.mean(value_dm - target_dm)) / sd,
                "width_in_sd": float(np.mean(high_dm - low_dm)) / (2 * _NORMAL_QUANTILE * sd),
            }
        )
    return rows


HEADER = "| scenario | KL | K | interval of | coverage % | below % | above % | bias / sd | width / sd |"


def format_row(row: dict[str, object]) -> str:
    """One line of the table."""
    return (
        f"| {row['scenario']} | {row['kl']:.2f} | {row['responses']} | {row['quantity']} "
        f"| {row['coverage']:.1%} ± {row['coverage_error']:.1%} | {row['below']:.1%} | {row['above']:.1%} "
        f"| {row['bias_in_sd']:+.2f} | {row['width_in_sd']:.2f} |"
    ).replace("%", "")


def main(arguments: list[str] | None = None) -> None:
    """Measure every scenario at every response count and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000, help="replicated data sets")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--responses", type=int, nargs="+", default=[512, 128, 32])
    parser.add_argument("--replicates", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--scenarios", type=int, nargs="+", default=list(range(len(SCENARIOS))), help="by number")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 data sets, K = 512 and 32")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args(arguments)
    if args.quick:
        args.datasets, args.responses = 100, [512, 32]
    print(f"{args.datasets} data sets of {args.prompts} prompts, {args.replicates} bootstrap replicates each\n")
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    rows = []
    for number in args.scenarios:
        for n_responses in args.responses:
            part = measure(
                SCENARIOS[number],
                n_prompts=args.prompts,
                n_responses=n_responses,
                n_datasets=args.datasets,
                n_replicates=args.replicates,
                seed=args.seed,
                processes=args.processes,
            )
            rows += part
            print("\n".join(format_row(row) for row in part))
            sys.stdout.flush()
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
