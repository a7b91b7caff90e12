"""Rates of the dual: one evaluation against exponentiating the same values, and margins of a frontier per second.

    python benchmarks/dual_rate.py

An evaluation is value, slack and Hessian together, in one pass over blocks on all cores. The yardstick is one NumPy
call that exponentiates as many values as the problem has scores (reward and constraints) and does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from stage1_dual.dual import DualProblem, ThreadExecutor, evaluate_dual, solve_dual, solve_frontier

ROUNDS = 7


def build(n_prompts: int, n_responses: int, n_constraints: int) -> DualProblem:
    """Gaussian scores that conflict, margins of half a standard deviation over the reference."""
    rng = np.random.default_rng(0)
    g_pkm = rng.normal(size=(n_prompts, n_responses, n_constraints))
    r_pk = -0.46 * g_pkm[..., 0] + 0.89 * rng.normal(size=(n_prompts, n_responses))
    return DualProblem.from_arrays(r_pk, g_pkm, thresholds=g_pkm.mean(axis=(0, 1)) + 0.5, beta=1.0)


def best(function: Callable[[], object]) -> float:
    """Seconds of the fastest of some rounds: what is left out is the machine's other work."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Measure and print two tables."""
    print(f"threads: {ThreadExecutor().n_threads}; best of {ROUNDS} rounds\n")
    print("| prompts x responses x constraints | evaluation | np.exp of all values | ratio |")
    print("|---|---|---|---|")
    for n_prompts, n_constraints in ((1_000, 1), (1_000, 3), (20_000, 1), (20_000, 3)):
        problem = build(n_prompts, 128, n_constraints)
        lam_m = solve_dual(problem).multipliers
        values = np.random.default_rng(1).normal(size=n_prompts * 128 * (1 + n_constraints))
        ours = best(lambda problem=problem, lam_m=lam_m: evaluate_dual(problem, lam_m))  # type: ignore[misc]
        plain = best(lambda values=values: np.exp(values))  # type: ignore[misc]
        name = f"{n_prompts:,} x 128 x {n_constraints}"
        print(f"| {name} | {1e3 * ours:.2f} ms | {1e3 * plain:.2f} ms | {ours / plain:.2f} |")
    print("\n| frontier at 1,000 x 128 | margins | certified | evaluations a margin | margins a second |")
    print("|---|---|---|---|---|")
    for n_constraints in (1, 2):
        problem = build(1_000, 128, n_constraints)
        axis = np.linspace(0.0, 1.5, 200 if n_constraints == 1 else 15)
        margins = np.stack(np.meshgrid(*[axis] * n_constraints, indexing="ij"), axis=-1).reshape(-1, n_constraints)
        grid = problem.reference_means_m + margins
        seconds = best(lambda problem=problem, grid=grid: solve_frontier(problem, grid))  # type: ignore[misc]
        frontier = solve_frontier(problem, grid)
        certified = int(np.sum(frontier.status_g == "certified"))
        kind = "one constraint" if n_constraints == 1 else "a grid of two"
        evaluations = frontier.n_evaluations_g.mean()
        print(f"| {kind} | {len(grid)} | {certified} | {evaluations:.1f} | {len(grid) / seconds:.0f} |")


if __name__ == "__main__":
    main()
