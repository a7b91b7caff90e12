"""What fewer responses per prompt would have given, and a multiplier corrected for their number.

With K responses per prompt the plug-in is biased: the log of a mean lies below the mean's log, so D comes out low, and
the tilt concentrates on the few best responses drawn, so that moving a mean looks dearer than it is and lam* comes out
high. The leading term falls as 1/K, hence solving again on halves of the responses shows it, and

    lam_J = 2 lam(K) - (lam(first half) + lam(second half)) / 2

removes it: the half-sample jackknife (Quenouille 1956; Efron and Tibshirani 1993, section 10). Thresholds stay what
they are on all responses, and so does a KL budget: the beta that spends it comes out low, and is corrected likewise.
Measured on jointly Gaussian scores with K = 32 and 1,000 prompts (benchmarks/), it leaves
5% of the bias at a KL of half a nat, 28% at 1.2 and 49% at 2.6; extrapolation over three rungs was no better, and
noisier.

Past the leading term it errs to either side. A tilt made strong by a small beta is under-corrected, which the KL
shows. A margin near the most that K/2 responses can reach is over-corrected: lam(K/2) then rises without bound, and
the correction, clipped at 0, is worse than none. That the third rung shows. With d = lam(K/2) - lam(K) and
d' = lam(K/4) - lam(K/2), a bias in 1/K alone has d' = 2 d, and of one in 1/K and 1/K**2

    (5 d - d') / 3  is all that is in lam(K), of which the correction takes off  (d' - 2 d) / 3  too much.

At d' = 5 d nothing is left to correct, at d' < 0 the bias changes sign: no correction is made unless d' lies between 0
and 5 d, or the excess is negligible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stage1_dual.dual.dual_function import tilt
from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.errors import InfeasibleError, KlBudgetError, NotCertifiedError
from stage1_dual.dual.inference import Estimates, ResponseBias
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.solver import solve_dual
from stage1_dual.dual.tilting import Tilt

# Up to this KL, in nats, the jackknife leaves less than half of the bias, and beyond it more: with 32, 64 and 128
# responses alike, since what it leaves behind depends on the tilt and not on their number.
_LARGEST_KL = 2.5
# With few responses the KL itself is capped by the log of their number; this share of it says that it was.
_LARGEST_KL_SHARE = 0.6
# From one rung to the next the change of lam doubles where its bias falls as 1/K; at this growth an expansion to
# 1/K**2 has no bias left to correct.
_LARGEST_GROWTH = 5.0
# The ratio of very small changes is noise: up to this excess of the correction, in units of the scale of lam, any will
# do.
_NEGLIGIBLE_EXCESS = 0.02
_PARTS = (2, 4)


@dataclass(frozen=True, eq=False)
class LadderRung:
    """The dual solved on a share of each prompt's responses.

    Attributes:
        n_responses: median number of responses a prompt has on this rung.
        n_parts: disjoint parts the responses were dealt into; figures are means over the parts that have a solution.
        n_infeasible: parts without a certified solution, as a rule since their responses cannot reach the thresholds.
        multipliers_m: reward per score unit, shape (m,); NaN where no part has a solution.
        beta: reward per nat; with a KL budget the mean of those found, else the beta given.
        dual_value: D, reward units.
        kl: nats per prompt.
        ess_median: median over prompts of the effective sample size, samples.
    """

    n_responses: float
    n_parts: int
    n_infeasible: int
    multipliers_m: FloatArray
    beta: float
    dual_value: float
    kl: float
    ess_median: float


@dataclass(frozen=True, eq=False)
class ResponseLadder:
    """The solution on all, half and a quarter of the responses.

    Attributes:
        rungs: most responses first; fewer than three where prompts have too few responses to be dealt.
        drift_m: (lam(K/2) - lam(K)) in units of the scale of lam, shape (m,): beta over s_j, or lam where that is
            larger. About the bias still in lam(K) where there is a correction; NaN without a half.
        beta_drift: (beta(K/2) - beta(K)) / beta(K) where a KL budget finds beta, else 0; NaN without a half.
        bias: what is to be taken off estimates, or None where no correction must be made.
        corrected_multipliers_m: half-sample jackknife of lam*, shape (m,), or None likewise.
        corrected_beta: that of the beta a KL budget finds, or the beta given, or None likewise.
        refusal: why there is no corrected multiplier; empty where there is one.
    """

    rungs: tuple[LadderRung, ...]
    drift_m: FloatArray
    beta_drift: float
    bias: ResponseBias | None
    corrected_multipliers_m: FloatArray | None
    corrected_beta: float | None
    refusal: str


def climb_ladder(problem: DualProblem, solution: DualSolution) -> ResponseLadder:
    """Solve again on halves and quarters of each prompt's responses, dealt out in turn.

    Args:
        problem: the problem solved.
        solution: its solution.
    """
    problem = problem.with_beta(solution.beta)
    counts_p = problem.samples.counts_p
    rungs = [
        LadderRung(
            n_responses=float(np.median(counts_p)),
            n_parts=1,
            n_infeasible=0,
            multipliers_m=solution.multipliers,
            beta=solution.beta,
            dual_value=solution.dual_value,
            kl=solution.predicted_kl,
            ess_median=float(np.median(solution.ess_p)),
        )
    ]
    parts = {n: _solve_parts(problem, solution, n) for n in _PARTS if np.median(counts_p) >= 2 * n}
    rungs.extend(_describe(problem, found, n_parts) for n_parts, found in parts.items())
    scale_m = np.maximum(
        np.abs(solution.multipliers), problem.beta / np.where(problem.is_constant_m, np.inf, problem.score_scale_m)
    )
    drift_m, beta_drift = np.full(problem.n_constraints, np.nan), math.nan
    if len(rungs) > 1:
        beta_drift = rungs[1].beta / solution.beta - 1.0
        drift_m = (rungs[1].multipliers_m - solution.multipliers) / np.where(scale_m > 0, scale_m, 1.0)
    refusal = _refusal(problem, rungs, scale_m)
    bias = corrected_m = corrected_beta = None
    if not refusal:
        bias = _half_sample_bias(problem, solution, halves=parts[2])
        corrected_m = problem.clip_multipliers(solution.multipliers - bias.multipliers)
        corrected_beta = solution.beta - bias.beta
    return ResponseLadder(tuple(rungs), drift_m, beta_drift, bias, corrected_m, corrected_beta, refusal)


def _solve_parts(problem: DualProblem, solution: DualSolution, n_parts: int) -> list[DualSolution]:
    """Solutions on the shares of the responses that have one."""
    found: list[DualSolution] = []
    for part in range(n_parts):
        try:
            found.append(solve_dual(_share(problem, n_parts, part), initial_multipliers=solution.multipliers))
        except (InfeasibleError, KlBudgetError, NotCertifiedError):
            continue
    return found


def _share(problem: DualProblem, n_parts: int, part: int) -> DualProblem:
    return problem.with_samples(problem.samples.every(n_parts, part))


def _describe(problem: DualProblem, found: list[DualSolution], n_parts: int) -> LadderRung:
    nothing = np.full(problem.n_constraints, np.nan)
    return LadderRung(
        n_responses=float(np.median(problem.samples.counts_p)) / n_parts,
        n_parts=n_parts,
        n_infeasible=n_parts - len(found),
        multipliers_m=np.mean([one.multipliers for one in found], axis=0) if found else nothing,
        beta=_mean([one.beta for one in found]),
        dual_value=_mean([one.dual_value for one in found]),
        kl=_mean([one.predicted_kl for one in found]),
        ess_median=_mean([float(np.median(one.ess_p)) for one in found]),
    )


def _half_sample_bias(problem: DualProblem, solution: DualSolution, halves: list[DualSolution]) -> ResponseBias:
    """Estimates on halves of the responses minus those on all."""
    # An inactive constraint has the multiplier 0 exactly, and no bias of it to remove.
    free_m = problem.is_active_m(solution.multipliers)
    multipliers_m = np.mean([half.multipliers for half in halves], axis=0) - solution.multipliers
    policies = [tilt(_share(problem, 2, part), solution.multipliers) for part in range(2)]
    return ResponseBias(
        multipliers=np.where(free_m, multipliers_m, 0.0),
        beta=_mean([half.beta for half in halves]) - solution.beta,
        optimum=_excess([_optimum(half) for half in halves], _optimum(solution)),
        # On all responses the policy of lam* and the optimum are the same.
        policy=_excess([_policy(half) for half in policies], _optimum(solution)),
    )


def _optimum(solution: DualSolution) -> Estimates:
    return Estimates(
        reward=np.asarray(solution.predicted_reward),
        constraints=solution.predicted_constraints,
        kl=np.asarray(solution.predicted_kl),
        slack=solution.slack,
    )


def _policy(tilted: Tilt) -> Estimates:
    return Estimates(
        reward=np.asarray(np.mean(tilted.reward_p)),
        constraints=np.mean(tilted.scores_mp, axis=1),
        kl=np.asarray(np.mean(tilted.kl_p)),
        slack=np.mean(tilted.slack_mp, axis=1),
    )


def _excess(halves: list[Estimates], whole: Estimates) -> Estimates:
    means = {name: np.mean([vars(half)[name] for half in halves], axis=0) for name in vars(whole)}
    return Estimates(**{name: means[name] - value for name, value in vars(whole).items()})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _refusal(problem: DualProblem, rungs: list[LadderRung], scale_m: FloatArray) -> str:
    full = rungs[0]
    if len(rungs) < 3:
        return f"the median prompt has {full.n_responses:.0f} responses; quarters of at least 2 are needed"
    _, half, quarter = rungs
    if half.n_infeasible:
        return f"on half of the responses the thresholds are out of reach in {half.n_infeasible} of 2 halves"
    largest = min(_LARGEST_KL, _LARGEST_KL_SHARE * float(np.mean(np.log(problem.samples.counts_p))))
    if full.kl > largest:
        return f"the KL of {full.kl:.2f} nats is more than {largest:.2f}: less than half of the bias would go"
    if quarter.n_infeasible:
        return (
            f"on a quarter of the responses the thresholds are out of reach in {quarter.n_infeasible} of 4 quarters: "
            "nothing shows that the bias falls as 1/K"
        )
    return _growth_refusal(problem, rungs, scale_m)


def _growth_refusal(problem: DualProblem, rungs: list[LadderRung], scale_m: FloatArray) -> str:
    """Why the changes along three rungs do not speak for a bias in 1/K, or nothing."""
    # The multipliers, then beta, which is one where a KL budget finds it.
    names = [*(f"lambda* of {name}" for name in problem.constraint_names), "beta"]
    full_i, half_i, quarter_i = (np.append(rung.multipliers_m, rung.beta) for rung in rungs)
    scale_i = np.append(scale_m, problem.beta)
    # An inactive constraint is not corrected.
    is_corrected_i = np.append(problem.is_active_m(rungs[0].multipliers_m), problem.kl_budget is not None)
    first_i, second_i = half_i - full_i, quarter_i - half_i
    excess_i = np.abs(second_i - 2 * first_i) / 3
    limit_i = _LARGEST_GROWTH * first_i
    is_between_i = (np.minimum(limit_i, 0.0) <= second_i) & (second_i <= np.maximum(limit_i, 0.0))
    failing_i = np.flatnonzero(is_corrected_i & ~is_between_i & (excess_i > _NEGLIGIBLE_EXCESS * scale_i))
    if not len(failing_i):
        return ""
    worst = int(failing_i[np.argmax(excess_i[failing_i] / scale_i[failing_i])])
    return (
        f"{names[worst]} is {full_i[worst]:.3g} on all responses, {half_i[worst]:.3g} on half and "
        f"{quarter_i[worst]:.3g} on a quarter: changes of {first_i[worst]:+.2g} and {second_i[worst]:+.2g}, where a "
        f"bias in 1/K doubles them (0 to {_LARGEST_GROWTH:.0f} times is allowed): no ground for a correction"
    )
