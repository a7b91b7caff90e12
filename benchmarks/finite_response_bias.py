"""How far lam_hat is from the known lam* with few responses per prompt, and which correction brings it closer.

    python benchmarks/finite_response_bias.py [--quick] [--datasets 200] [--margins 0.5] [--output FILE]

Scores are jointly Gaussian, so that lam* is known (gaussian_population.py). The tilt is made stronger by a smaller
beta at a margin of half a standard deviation, or by a larger margin. Estimators, all from solutions of the same
sample:

- plug-in: the solution on all K responses.
- half-sample jackknife: 2 lam(K) - lam(K/2), lam(K/2) the mean over two disjoint halves of the responses.
- quadratic ladder: (8 lam(K) - 6 lam(K/2) + lam(K/4)) / 3, over two halves and four quarters. Both extrapolate a
  bias that is polynomial in 1/K, of first and of second order.
- first-order: lam(K) - H^-1 B with B = mean_p sum_k w_pk^2 (g_pk - E_w g_p), the leading bias of a ratio of means;
  H the Hessian. No further solve.
- delete-one jackknife: the root of the mean over prompts of K m_p - (K - 1) mean_k m_p(-k), with m_p the tilted mean
  of prompt p and m_p(-k) the one without response k: the order of the half-sample jackknife, with less noise.
- response ladder: what the library gives: the half-sample jackknife, clipped at 0, where its rule allows it.

Thresholds stay at the value of the full sample. Bias, sd and root mean square error are over the data sets on which
the estimator has an answer, and so are those of the plug-in that they are compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from gaussian_population import GaussianPopulation, over_datasets

from pipeline.contracts.arrays import FloatArray
from stage1_dual.dual import (
    DualProblem,
    DualSolution,
    InfeasibleError,
    NotCertifiedError,
    climb_ladder,
    solve_dual,
)

ESTIMATORS = (
    "plug-in",
    "half-sample jackknife",
    "quadratic ladder",
    "first-order",
    "delete-one jackknife",
    "response ladder",
)


@dataclass(frozen=True)
class Case:
    """One population and sample size."""

    population: GaussianPopulation
    n_prompts: int
    n_responses: int
    relative: bool


def _solve_share(problem: DualProblem, share: int, reward_pk: FloatArray, scores_pkm: FloatArray) -> FloatArray:
    """Mean lam over ``share`` disjoint parts of the responses, or NaN where a part is infeasible."""
    size = reward_pk.shape[1] // share
    parts = []
    for part in range(share):
        columns = slice(part * size, (part + 1) * size)
        small = DualProblem.from_arrays(
            reward_pk[:, columns], scores_pkm[:, columns], thresholds=problem.thresholds_m, beta=problem.beta
        )
        try:
            parts.append(solve_dual(small).multipliers)
        except (InfeasibleError, NotCertifiedError):
            return np.full(problem.n_constraints, np.nan)
    return np.asarray(np.mean(parts, axis=0), dtype=np.float64)


def _first_order(problem: DualProblem, solution: DualSolution, scores_pkm: FloatArray) -> FloatArray:
    w_pk = problem.tilted_weights(solution.multipliers)
    deviation_pkm = scores_pkm - np.einsum("pk,pkm->pm", w_pk, scores_pkm)[:, np.newaxis]
    bias_m = np.einsum("pk,pkm->m", w_pk**2, deviation_pkm) / len(w_pk)
    return np.maximum(solution.multipliers - np.linalg.solve(solution.hessian, bias_m), 0.0)


def _delete_one(problem: DualProblem, solution: DualSolution, scores_pkm: FloatArray) -> FloatArray:
    """Chord iteration on the jackknifed slack from the plug-in; NaN when it finds no root."""
    lam_m = solution.multipliers
    n_responses = scores_pkm.shape[1]
    for _ in range(100):
        w_pk = problem.tilted_weights(lam_m)
        mean_pm = np.einsum("pk,pkm->pm", w_pk, scores_pkm)
        # m(-k) - m = -w_k (g_k - m) / (1 - w_k); a weight of one leaves nothing to take a mean of.
        odds_pk = w_pk / np.maximum(1.0 - w_pk, 1e-9)
        moved_pm = np.einsum("pk,pkm->pm", odds_pk, scores_pkm - mean_pm[:, np.newaxis]) / n_responses
        slack_m = np.mean(mean_pm + (n_responses - 1) * moved_pm, axis=0) - problem.thresholds_m
        step_m = np.linalg.solve(solution.hessian, slack_m)
        lam_m = np.maximum(lam_m - step_m, 0.0)
        if np.all(np.abs(step_m) <= 1e-8 * (1.0 + lam_m)):
            return lam_m
    return np.full(len(lam_m), np.nan)


def estimate(case: Case, seed: int) -> FloatArray:
    """Multipliers by every estimator on one data set, shape (estimators, m); NaN where it does not exist."""
    rng = np.random.default_rng(seed)
    population = case.population
    reward_pk, scores_pkm = population.draw(rng, n_prompts=case.n_prompts, n_responses=case.n_responses)
    reference_m = np.mean(scores_pkm, axis=(0, 1)) if case.relative else np.zeros(population.n_constraints)
    problem = DualProblem.from_arrays(
        reward_pk, scores_pkm, thresholds=reference_m + population.margins_m, beta=population.beta
    )
    try:
        solution = solve_dual(problem)
    except (InfeasibleError, NotCertifiedError):
        return np.full((len(ESTIMATORS), population.n_constraints), np.nan)
    full_m = solution.multipliers
    half_m = _solve_share(problem, 2, reward_pk, scores_pkm)
    quarter_m = _solve_share(problem, 4, reward_pk, scores_pkm)
    accepted_m = climb_ladder(problem, solution).corrected_multipliers_m
    return np.stack(
        [
            full_m,
            2 * full_m - half_m,
            (8 * full_m - 6 * half_m + quarter_m) / 3,
            _first_order(problem, solution, scores_pkm),
            _delete_one(problem, solution, scores_pkm),
            np.full(population.n_constraints, np.nan) if accepted_m is None else accepted_m,
        ]
    )


def measure(case: Case, *, n_datasets: int, seed: int, processes: int) -> list[dict[str, object]]:
    """One row an estimator: bias, sd, error and failures over data sets."""
    entropy = [seed, case.n_prompts, case.n_responses]
    lam_dem = np.stack(
        over_datasets(partial(estimate, case), entropy=entropy, n_datasets=n_datasets, processes=processes)
    )
    lam_star_m = case.population.lam_star
    error_dem = lam_dem - lam_star_m
    rows: list[dict[str, object]] = []
    for index, name in enumerate(ESTIMATORS):
        answered_d = np.all(np.isfinite(error_dem[:, index]), axis=1)
        figures = _figures(error_dem[answered_d, index])
        plug_in = _figures(error_dem[answered_d, 0])
        rows.append(
            {
                "beta": case.population.beta,
                "margin": case.population.margin,
                "constraints": case.population.n_constraints,
                "thresholds": "margin" if case.relative else "absolute",
                "kl": case.population.kl(lam_star_m),
                "lam_star": float(np.mean(lam_star_m)),
                "prompts": case.n_prompts,
                "responses": case.n_responses,
                "estimator": name,
                **figures,
                "bias_ratio": abs(figures["bias"]) / abs(plug_in["bias"]),
                "rmse_ratio": figures["rmse"] / plug_in["rmse"],
                "failures": n_datasets - int(np.sum(answered_d)),
            }
        )
    return rows


def _figures(error_dm: FloatArray) -> dict[str, float]:
    """Of the errors on the data sets with an answer; over several constraints the mean, as they are exchangeable."""
    if len(error_dm) < 2:
        return {"bias": np.nan, "bias_error": np.nan, "sd": np.nan, "rmse": np.nan}
    return {
        "bias": float(np.mean(error_dm)),
        "bias_error": float(np.std(np.mean(error_dm, axis=1), ddof=1)) / np.sqrt(len(error_dm)),
        "sd": float(np.mean(np.std(error_dm, axis=0, ddof=1))),
        "rmse": float(np.sqrt(np.mean(error_dm**2))),
    }


HEADER = (
    "| β | margin | KL | λ* | prompts | K | estimator | bias | sd | RMSE | bias / plug-in | RMSE / plug-in "
    "| no answer |"
)


def format_row(row: dict[str, object]) -> str:
    """One line of the table."""
    return (
        f"| {row['beta']:g} | {row['margin']:g} | {row['kl']:.2f} | {row['lam_star']:.3f} | {row['prompts']} "
        f"| {row['responses']} | {row['estimator']} "
        f"| {row['bias']:+.4f} ± {row['bias_error']:.4f} | {row['sd']:.4f} | {row['rmse']:.4f} "
        f"| {row['bias_ratio']:.2f} | {row['rmse_ratio']:.2f} | {row['failures']} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=200, help="data sets a case")
    parser.add_argument("--prompts", type=int, nargs="+", default=[200])
    parser.add_argument("--responses", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--betas", type=float, nargs="+", default=[2.0, 1.0, 0.6, 0.4], help="smaller tilts more")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.5], help="in standard deviations")
    parser.add_argument("--constraints", type=int, default=1)
    parser.add_argument("--absolute", action="store_true", help="absolute thresholds; default: margins")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="50 data sets, K = 32, two tilts")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args(arguments)
    if args.quick:
        args.datasets, args.responses, args.betas = min(args.datasets, 50), [32], [2.0, 0.6]
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    rows = []
    for beta, margin, n_prompts, n_responses in product(args.betas, args.margins, args.prompts, args.responses):
        population = GaussianPopulation(beta=beta, margin=margin, n_constraints=args.constraints)
        case = Case(population, n_prompts, n_responses, not args.absolute)
        part = measure(case, n_datasets=args.datasets, seed=args.seed, processes=args.processes)
        rows += part
        print("\n".join(format_row(row) for row in part))
        sys.stdout.flush()
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
