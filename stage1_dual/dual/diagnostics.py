"""How much the samples can bear: effective sample sizes of the tilted weights, and KL against the sample size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.solution import DualSolution

ESS_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

# A prompt whose weights rest on fewer than two responses carries no information on the spread of its scores.
_COLLAPSED_ESS = 2.0
_COLLAPSED_FRACTION = 0.1
# At KL = log k the tilt has used up k responses: half of it is where weighted means start to lean on a few.
_KL_SHARE = 0.5
_FEW_PROMPTS = 30


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Facts about the weights at a solution.

    Attributes:
        ess_median: median over prompts of the effective sample size, samples.
        ess_fraction_below_2: share of prompts whose effective sample size is below 2.
        ess_levels: the quantile levels of ``ess_quantiles``.
        ess_quantiles: quantiles over prompts of the effective sample size, samples, shape (5,).
        kl: KL from the reference, nats per prompt.
        log_samples: mean over prompts of the log of the number of responses, nats: the largest KL a reweighting of
            the samples can have.
        warnings: plain sentences with numbers; empty when nothing is wrong.
    """

    ess_median: float
    ess_fraction_below_2: float
    ess_levels: tuple[float, ...]
    ess_quantiles: FloatArray
    kl: float
    log_samples: float
    warnings: tuple[str, ...]


def diagnose(problem: DualProblem, solution: DualSolution) -> Diagnostics:
    """Diagnose ``solution`` of ``problem``."""
    counts_p = problem.segments.counts_p
    ess_median = float(np.median(solution.ess_p))
    below_2 = float(np.mean(solution.ess_p < _COLLAPSED_ESS))
    log_samples = float(np.mean(np.log(counts_p)))
    warnings: list[str] = []
    if problem.n_prompts < _FEW_PROMPTS:
        warnings.append(
            f"Only {problem.n_prompts} prompts: intervals need at least {_FEW_PROMPTS} to mean what they say."
        )
    n_single = int(np.sum(counts_p == 1))
    if n_single:
        warnings.append(
            f"{n_single} of {problem.n_prompts} prompts have a single response: no multiplier can change them."
        )
    if below_2 > _COLLAPSED_FRACTION and n_single < problem.n_prompts:
        warnings.append(
            f"{below_2:.0%} of the prompts have an effective sample size below 2 (median {ess_median:.1f} of "
            f"{float(np.median(counts_p)):.0f} responses): the predictions rest on single responses; raise beta or "
            f"draw more responses per prompt."
        )
    if log_samples > 0 and solution.predicted_kl > _KL_SHARE * log_samples:
        warnings.append(
            f"KL is {solution.predicted_kl:.2f} nats, {solution.predicted_kl / log_samples:.0%} of the "
            f"{log_samples:.2f} nats that reweighting these samples can reach: the multipliers are biased upwards; "
            f"raise beta or draw more responses per prompt."
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
        ess_median=ess_median,
        ess_fraction_below_2=below_2,
        ess_levels=ESS_LEVELS,
        ess_quantiles=np.asarray(np.quantile(solution.ess_p, ESS_LEVELS), dtype=np.float64),
        kl=solution.predicted_kl,
        log_samples=log_samples,
        warnings=tuple(warnings),
    )
