"""One verdict on a solution, by a rule that is written down, with advice in numbers.

The verdict is the worst of these signs, each against the two limits of :data:`LIMITS`:

- ``ess_fraction_below_2``: share of prompts with an effective sample size below 2; their tilted means are single
  responses.
- ``kl_share``: KL over the log of the number of responses. At 1 the tilt picks one response a prompt; lam* is biased
  upwards long before.
- ``pareto_k_fraction``: share of prompts whose weights have a Pareto k beyond 0.7; their effective sample sizes are
  themselves too optimistic.
- ``drift``: largest change of lam* from half of the responses to all, in units of lam* or of beta over the standard
  deviation of the score, whichever is larger; about the bias that is still in lam*. Under a KL budget that of beta, in
  units of beta, counts too.
- ``heldout_violation``: how far below 0 (for an equality, off 0) the whole interval of a held-out slack lies, in
  standard deviations of the constraint; lam* was fitted to its own prompts.
- ``few_prompts``: 1 over the number of prompts; intervals are between prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stage1_dual.dual.diagnostics import Diagnostics
from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.errors import InfeasibleError, NotCertifiedError
from stage1_dual.dual.heldout import HeldoutPrediction
from stage1_dual.dual.problem import LARGEST_KL_SHARE, DualProblem
from stage1_dual.dual.response_ladder import ResponseLadder
from stage1_dual.dual.solver import solve_dual

Verdict = Literal["ok", "weak", "unreliable"]

LIMITS: dict[str, tuple[float, float]] = {
    "ess_fraction_below_2": (0.05, 0.25),
    "kl_share": (LARGEST_KL_SHARE, 0.6),
    "pareto_k_fraction": (0.5, math.inf),
    "drift": (0.1, 0.3),
    "heldout_violation": (0.0, 0.25),
    "few_prompts": (1 / 30, 1 / 5),
}
"""Beyond the first number a sign is weak, beyond the second unreliable."""

# Advice on beta goes up by this factor a try, this often at most, on this many prompts at most.
_BETA_FACTOR = 1.15
_BETA_TRIES = 50
_SKETCH_PROMPTS = 2_000
# Advice beyond this many responses per prompt is no advice.
_MOST_RESPONSES = 100_000
_WANTED_ESS = 10.0


@dataclass(frozen=True, eq=False)
class Trust:
    """How far to trust a solution.

    Attributes:
        verdict: "ok", "weak" or "unreliable": the worst of the signs.
        signs: value of each sign by its name; NaN where it could not be had.
        reasons: a plain sentence for each sign beyond a limit, worst first.
        advice: what to do about it, in numbers; empty for "ok".
    """

    verdict: Verdict
    signs: dict[str, float]
    reasons: tuple[str, ...]
    advice: tuple[str, ...]


def judge_trust(
    problem: DualProblem,
    solution: DualSolution,
    *,
    diagnostics: Diagnostics,
    ladder: ResponseLadder,
    heldout: HeldoutPrediction | None,
) -> Trust:
    """Judge ``solution`` of ``problem`` by the rule of this module."""
    problem = problem.with_beta(solution.beta)
    signs = {
        "ess_fraction_below_2": diagnostics.ess_fraction_below_2,
        "kl_share": _kl_share(solution.predicted_kl, diagnostics.log_samples),
        "pareto_k_fraction": diagnostics.pareto_k_fraction,
        "drift": _drift(ladder, solution),
        "heldout_violation": _heldout_violation(problem, heldout),
        "few_prompts": 1.0 / problem.n_prompts,
    }
    levels = {name: _level(name, value) for name, value in signs.items()}
    worst = max(levels.values())
    verdict: Verdict = ("ok", "weak", "unreliable")[worst]
    sentences = _sentences(problem, diagnostics, ladder, signs)
    order = sorted(levels, key=lambda name: -levels[name])
    advice: tuple[str, ...] = ()
    if max(levels[name] for name in ("ess_fraction_below_2", "kl_share", "pareto_k_fraction", "drift")) > 0:
        advice = tuple(_advise_on_tilt(problem, ladder, diagnostics, levels))
    if levels["few_prompts"] or levels["heldout_violation"]:
        advice += (f"use more train prompts than {problem.n_prompts}",)
    return Trust(verdict, signs, tuple(sentences[name] for name in order if levels[name]), advice)


def _level(name: str, value: float) -> int:
    return sum(value > limit for limit in LIMITS[name])


def _kl_share(kl: float, log_samples: float) -> float:
    return kl / log_samples if log_samples > 0 else 0.0


def _drift(ladder: ResponseLadder, solution: DualSolution) -> float:
    if len(ladder.rungs) < 2:
        return math.nan
    if ladder.rungs[1].n_infeasible:
        return math.inf
    moving = solution.multipliers != 0
    return float(np.max(np.abs(ladder.drift_m[moving]), initial=abs(ladder.beta_drift)))


def _heldout_violation(problem: DualProblem, heldout: HeldoutPrediction | None) -> float:
    if heldout is None:
        return math.nan
    varying = ~problem.is_constant_m
    if not bool(np.any(varying)):
        return 0.0
    # An equality is missed on either side.
    above_m = np.where(problem.is_equality_m, heldout.slack_interval[:, 0], -np.inf)
    missed_m = np.maximum(-heldout.slack_interval[:, 1], above_m)
    return float(np.max(missed_m[varying] / problem.score_scale_m[varying]))


def _sentences(
    problem: DualProblem, diagnostics: Diagnostics, ladder: ResponseLadder, signs: dict[str, float]
) -> dict[str, str]:
    n_responses = ladder.rungs[0].n_responses
    if math.isinf(signs["drift"]):
        drift = "on half of the responses per prompt the thresholds are out of reach"
    else:
        moved = "a multiplier" if problem.kl_budget is None else "a multiplier or beta"
        drift = f"half of the responses per prompt move {moved} by {signs['drift']:.0%} of its scale"
    return {
        "ess_fraction_below_2": (
            f"{signs['ess_fraction_below_2']:.0%} of the prompts have an effective sample size below 2 (median "
            f"{diagnostics.ess_median:.1f} of {n_responses:.0f} responses): their predictions are single responses"
        ),
        "kl_share": (
            f"the KL of {diagnostics.kl:.2f} nats is {signs['kl_share']:.0%} of the {diagnostics.log_samples:.2f} "
            f"that reweighting {n_responses:.0f} responses can reach at most: the multipliers are biased upwards"
        ),
        "pareto_k_fraction": (
            f"the weights of {signs['pareto_k_fraction']:.0%} of the prompts have a tail too heavy for means of them "
            f"to converge (Pareto k beyond 0.7; median {diagnostics.pareto_k_median:.2f})"
        ),
        "drift": drift,
        "heldout_violation": (
            f"on the held-out prompts a constraint is violated with its whole interval, by at least "
            f"{max(signs['heldout_violation'], 0.0):.2f} standard deviations"
        ),
        "few_prompts": f"there are {problem.n_prompts} prompts: intervals are between prompts and need 30 or more",
    }


def _advise_on_tilt(
    problem: DualProblem, ladder: ResponseLadder, diagnostics: Diagnostics, levels: dict[str, int]
) -> Iterator[str]:
    drawn, alternative = ladder.rungs[0].n_responses, ""
    more = _sufficient_responses(ladder, diagnostics)
    if any(levels[name] for name in ("ess_fraction_below_2", "kl_share", "pareto_k_fraction")):
        found = _sufficient_tilt(problem)
        if found is not None:
            if problem.kl_budget is None:
                yield f"raise beta from {problem.beta:.3g} to about {_round_up(found.beta):g}"
            else:
                yield f"lower the KL budget from {problem.kl_budget:.3g} to about {found.predicted_kl:.2g} nats"
            alternative = "or "
    if more is None:
        yield f"draw several times the {drawn:.0f} responses a prompt: on so few, what is needed cannot be told"
    elif math.isinf(more):
        yield f"more responses than {drawn:.0f} a prompt will hardly do at this beta"
    elif more > drawn:
        yield f"{alternative}draw about {_round_up(more):.0f} responses a prompt instead of {drawn:.0f}"


def _sufficient_tilt(problem: DualProblem) -> DualSolution | None:
    """The solution for the first larger beta at which effective sample sizes and the KL pass their first limits."""
    share = problem.samples.sketch(_SKETCH_PROMPTS)
    sketch = problem if share is None else problem.with_samples(share)
    log_samples = float(np.mean(np.log(sketch.samples.counts_p)))
    start_m = None
    for attempt in range(1, _BETA_TRIES + 1):
        point = sketch.with_kl_budget(None).with_beta(problem.beta * _BETA_FACTOR**attempt)
        try:
            solution = solve_dual(point, initial_multipliers=start_m)
        except (InfeasibleError, NotCertifiedError):
            return None
        start_m = solution.multipliers
        collapsed = float(np.mean(solution.ess_p < 2))
        kl_share = _kl_share(solution.predicted_kl, log_samples)
        if not (_level("ess_fraction_below_2", collapsed) or _level("kl_share", kl_share)):
            return solution
    return None


def _sufficient_responses(ladder: ResponseLadder, diagnostics: Diagnostics) -> float | None:
    """Responses a prompt that would do, extrapolated along the ladder.

    The effective sample size is taken as a power of K, the KL as a line in log K. Infinite where no number in reach
    will do, None where the ladder cannot tell.
    """
    if len(ladder.rungs) < 2 or not math.isfinite(ladder.rungs[1].kl):
        return None
    full, half = ladder.rungs[:2]
    log_ratio = math.log(full.n_responses / half.n_responses)
    growth = math.log(full.ess_median / half.ess_median) / log_ratio
    kl_growth = (full.kl - half.kl) / log_ratio
    allowed = LIMITS["kl_share"][0]
    log_factors = [0.0]
    if full.ess_median < _WANTED_ESS:
        log_factors.append(math.log(_WANTED_ESS / full.ess_median) / growth if growth > 0 else math.inf)
    if full.kl > allowed * diagnostics.log_samples:
        excess = full.kl - allowed * diagnostics.log_samples
        log_factors.append(excess / (allowed - kl_growth) if allowed > kl_growth else math.inf)
    # Past the limits above, what drifts falls as 1 / K.
    drift = float(np.nanmax(np.abs(ladder.drift_m), initial=abs(ladder.beta_drift)))
    if math.isfinite(drift) and drift > LIMITS["drift"][0]:
        log_factors.append(math.log(drift / LIMITS["drift"][0]))
    log_wanted = math.log(full.n_responses) + max(log_factors)
    return math.exp(log_wanted) if log_wanted <= math.log(_MOST_RESPONSES) else math.inf


def _round_up(value: float) -> float:
    """The smallest number of two significant digits that is not below ``value``."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit * (1 - 1e-9)) * unit:.2g}")
