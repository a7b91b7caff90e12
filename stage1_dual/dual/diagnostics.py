"""What the tilted weights are like: effective sample sizes, Pareto k, and KL against the sample size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.tail_index import LARGEST_USEFUL_K, pareto_k

ESS_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

# A prompt whose weights rest on fewer than two responses carries no information on the spread of its scores.
_COLLAPSED_ESS = 2.0


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Facts about the weights at a solution.

    Attributes:
        ess_median: median over prompts of the effective sample size, samples.
        ess_fraction_below_2: share of prompts whose effective sample size is below 2.
        ess_levels: the quantile levels of ``ess_quantiles``.
        ess_quantiles: quantiles over prompts of the effective sample size, samples, shape (5,).
        pareto_k_median: median over prompts of the tail index of the weights; NaN where all have too few responses.
        pareto_k_fraction: share of prompts whose tail index is beyond 0.7; NaN likewise.
        kl: KL from the reference, nats per prompt.
        log_samples: mean over prompts of the log of the number of responses, nats: the largest KL a reweighting of
            the samples can have.
        warnings: plain sentences on the shape of the problem; how far to trust its solution is another matter
            (:mod:`stage1_dual.dual.trust`).
    """

    ess_median: float
    ess_fraction_below_2: float
    ess_levels: tuple[float, ...]
    ess_quantiles: FloatArray
    pareto_k_median: float
    pareto_k_fraction: float
    kl: float
    log_samples: float
    warnings: tuple[str, ...]


def diagnose(problem: DualProblem, solution: DualSolution) -> Diagnostics:
    """What the weights at ``solution`` of ``problem`` are like: effective sample sizes, tails, and what to warn of."""
    counts_p = problem.samples.counts_p
    k_p = pareto_k(problem.with_beta(solution.beta), solution.multipliers)
    known = ~np.isnan(k_p)
    log_samples = float(np.mean(np.log(counts_p)))
    warnings: list[str] = []
    n_single = int(np.sum(counts_p == 1))
    if n_single:
        warnings.append(
            f"{n_single} of {problem.n_prompts} prompts have a single response: no multiplier can change them."
        )
    if problem.samples.facts.largest_reward == 0.0 and n_single < problem.n_prompts:
        warnings.append(
            "The reward is the same for all responses of every prompt: there is nothing to maximise, and the solution "
            "is the policy closest to the reference that meets the constraints."
        )
    warnings.extend(
        f"Constraint {problem.constraint_names[j]} has the same score for all responses of every prompt: "
        f"no policy changes it, and its multiplier is set to 0."
        for j in np.flatnonzero(problem.is_constant_m)
    )
    if solution.dependent_constraints:
        warnings.append(
            f"Constraints {', '.join(solution.dependent_constraints)} are linearly dependent where they are active: "
            f"their multipliers are one of many equally good choices; predictions do not depend on which."
        )
    return Diagnostics(
        ess_median=float(np.median(solution.ess_p)),
        ess_fraction_below_2=float(np.mean(solution.ess_p < _COLLAPSED_ESS)),
        ess_levels=ESS_LEVELS,
        ess_quantiles=np.asarray(np.quantile(solution.ess_p, ESS_LEVELS), dtype=np.float64),
        pareto_k_median=float(np.median(k_p[known])) if known.any() else float("nan"),
        pareto_k_fraction=float(np.mean(k_p[known] > LARGEST_USEFUL_K)) if known.any() else float("nan"),
        kl=solution.predicted_kl,
        log_samples=log_samples,
        warnings=tuple(warnings),
    )
