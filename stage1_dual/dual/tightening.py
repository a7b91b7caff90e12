"""Thresholds moved on purpose, so that what is promised survives prediction, evaluation and reward-model error.

Four reasons to ask the dual for more than is demanded, and one to ask for less:

*Reserve.* A number of score units, for what a fine-tuned policy is known to fall short by.

*Assurance.* lam* meets the demand on average on the train prompts. The final evaluation, on n other prompts with K
responses each, calls a constraint satisfied when its whole 95% interval is on the right side, which for a policy that
meets the demand exactly happens in 1 of 40 evaluations. With e the standard error of that evaluation and s that of the
prediction (lam* comes from finitely many prompts too), tightening by

    t = z_{0.975} e + z_a sqrt(e^2 + s^2)

makes it come out satisfied with probability a, for each constraint by itself and a policy that is the tilted optimum.
A policy that falls short of it needs a ``reserve`` besides.

*Score error.* The constraint's scorer is a model: its differences g(y) - g(y') between two responses drawn from pi_ref
have a root mean square error eps against the truth. Then the true mean improves on the reference's by at least

    margin - (sqrt(1/2) + sqrt(1/2 + D2)) eps ,   1 + 2 D2 = E_x E_ref[(pi_lam / pi_ref)^2]

(Huang et al., arXiv:2405.19544, theorem 5; the expectation is the mean over prompts of K / ESS). Tightening by that
loss keeps the true margin. The bound grows with the tilt, so the two are solved together.

*Score noise.* The constraint's score of a response carries noise e of standard deviation sigma that another rating
would not repeat, independent of everything. The tilt prefers responses whose noise is high, and on the samples its
mean comes out too high by Cov(e, lam e / beta) = lam sigma^2 / beta, to first order in lam sigma / beta and exactly
where the noise is normal: beta log E exp(lam e / beta) = lam^2 sigma^2 / (2 beta), whose derivative by lam that is.
Tightening by as much takes it back. With it the multiplier grows, and the tightening with that: each round solves for
both to first order, since plain substitution converges at the rate of the noise's share in the variance.

*Response bias.* With finitely many responses a prompt lam* is high and what its policy attains is underestimated
(:mod:`stage1_dual.dual.response_ladder`). The corrected multipliers are the solution for the means that their policy
has on the samples; asking for those means instead makes them the certified answer. Where a KL budget finds beta, the
corrected beta's policy spends less on the samples than the budget, and asking for that makes it part of the answer.

Under a KL budget every round of a tightening spends the whole budget anew, so that beta settles together with the
thresholds: what is tightened costs reward, not KL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pipeline.contracts.errors import InputError
from stage1_dual.dual.dual_function import tilt
from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.frontier import threshold_at_multipliers
from stage1_dual.dual.inference import sandwich_standard_errors
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.response_ladder import ResponseLadder
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.solver import solve_dual

# The tightening depends on the tilt and the tilt on the tightening; both settle within a few rounds, to this share of
# a standard deviation of the constraint.
_ROUNDS = 40
_SETTLED = 1e-4
Z_INTERVAL = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Demand:
    """What is asked beyond the thresholds, constraint by constraint.

    Attributes:
        reserve_m: plain tightening, score units; negative to ask for less.
        assurance_m: probability that the evaluation calls the constraint satisfied, in (0, 1); NaN where not asked
            for.
        score_error_m: root mean square error of score differences, score units; 0 where not asked for.
        score_noise_m: standard deviation of the noise of a score, score units; 0 where not asked for.
        n_evaluation_prompts: prompts of the evaluation.
        n_evaluation_responses: responses per prompt of the evaluation.
        thresholds_are_relative_m: where the threshold is a margin over the reference mean.
    """

    reserve_m: FloatArray
    assurance_m: FloatArray
    score_error_m: FloatArray
    score_noise_m: FloatArray
    n_evaluation_prompts: int
    n_evaluation_responses: int
    thresholds_are_relative_m: np.ndarray[tuple[int], np.dtype[np.bool_]]

    def __post_init__(self) -> None:
        asked = self.assurance_m[~np.isnan(self.assurance_m)]
        if not bool(np.all((asked > 0) & (asked < 1))):
            raise InputError(f"`assurance` is {asked.tolist()}; a probability between 0 and 1 is needed")
        if not bool(np.all(np.isfinite(self.reserve_m))):
            raise InputError(f"`reserve` is {self.reserve_m.tolist()}; it must be finite")
        if not bool(np.all(np.isfinite(self.score_error_m) & (self.score_error_m >= 0))):
            raise InputError(f"`score_error` is {self.score_error_m.tolist()}; it must be finite and not negative")
        if not bool(np.all(np.isfinite(self.score_noise_m) & (self.score_noise_m >= 0))):
            raise InputError(f"`score_noise` is {self.score_noise_m.tolist()}; it must be finite and not negative")
        if len(asked) and min(self.n_evaluation_prompts, self.n_evaluation_responses) < 1:
            raise InputError("`assurance` needs the size of the evaluation: prompts, and responses to each")

    @property
    def moves_with_the_tilt(self) -> bool:
        """Whether the tightening depends on the solution."""
        return bool(np.any(~np.isnan(self.assurance_m)) or np.any(self.score_error_m + self.score_noise_m > 0))


@dataclass(frozen=True, eq=False)
class TightenedSolution:
    """The solution under tightened thresholds.

    Attributes:
        problem: the problem with the tightened thresholds, and with the beta of the solution.
        solution: its solution.
        assurance_m: tightening for assurance, score units, shape (m,).
        score_error_m: tightening for score error, score units, shape (m,).
        score_noise_m: tightening for score noise, score units, shape (m,).
        response_bias_m: what is asked for less (negative) by :func:`correct_response_bias`, score units, shape (m,).
        response_bias_kl: what of a KL budget it leaves unspent on the samples (negative), nats per prompt; else 0.
        price: reward predicted without tightening minus with it, reward units.
    """

    problem: DualProblem
    solution: DualSolution
    assurance_m: FloatArray
    score_error_m: FloatArray
    score_noise_m: FloatArray
    response_bias_m: FloatArray
    response_bias_kl: float
    price: float


def solve_tightened(problem: DualProblem, demand: Demand) -> TightenedSolution:
    """Solve ``problem`` with the tightening that its own solution calls for.

    Raises:
        InfeasibleError: the tightened thresholds are out of reach, where the demanded ones may not be.
        NotCertifiedError: float64 does not suffice for this problem.
        KlBudgetError: no beta spends the KL budget under the tightened thresholds.
        InputError: an equality is to be tightened, the tightening grows without end, since each round of it
            strengthens the tilt, or the noise is all that the score is.
    """
    _require_bounds(problem, demand)
    plain = solve_dual(problem)
    tightened, solution = problem, plain
    assurance_m = score_error_m = score_noise_m = np.zeros(problem.n_constraints)
    if bool(np.any(demand.reserve_m != 0)):
        tightened = problem.with_thresholds(problem.thresholds_m + demand.reserve_m)
        solution = _solve_near(tightened, plain)
    settled = not demand.moves_with_the_tilt
    for _ in range(_ROUNDS):
        if settled:
            break
        assurance_m, score_error_m = _tightening(tightened, solution, demand)
        score_noise_m = _noise_tightening(tightened, solution, demand, score_noise_m)
        thresholds_m = problem.thresholds_m + demand.reserve_m + assurance_m + score_error_m + score_noise_m
        change_m = np.abs(thresholds_m - tightened.thresholds_m)
        settled = bool(np.all(change_m <= _SETTLED * problem.score_scale_m))
        tightened = problem.with_thresholds(thresholds_m)
        solution = _solve_near(tightened, solution)
    if not settled:
        raise InputError(
            f"the tightening for `assurance`, `score_error` and `score_noise` does not settle: every round "
            f"strengthens the tilt (now {(assurance_m + score_error_m + score_noise_m).tolist()} score units); lower "
            "them, or raise beta"
        )
    return TightenedSolution(
        problem=tightened.with_beta(solution.beta),
        solution=solution,
        assurance_m=assurance_m,
        score_error_m=score_error_m,
        score_noise_m=score_noise_m,
        response_bias_m=np.zeros(problem.n_constraints),
        response_bias_kl=0.0,
        price=plain.predicted_reward - solution.predicted_reward,
    )


def _solve_near(problem: DualProblem, near: DualSolution) -> DualSolution:
    return solve_dual(problem.with_beta(near.beta), initial_multipliers=near.multipliers)


def _require_bounds(problem: DualProblem, demand: Demand) -> None:
    asked = {
        "reserve": demand.reserve_m != 0,
        "assurance": ~np.isnan(demand.assurance_m),
        "score_error": demand.score_error_m != 0,
        "score_noise": demand.score_noise_m != 0,
    }
    for setting, asked_m in asked.items():
        for j in np.flatnonzero(asked_m & problem.is_equality_m):
            raise InputError(
                f"`{setting}` of {problem.constraint_names[j]}: an equality has no safe side to move its threshold "
                "to; leave the setting out, or demand two bounds"
            )


def correct_response_bias(tightened: TightenedSolution, ladder: ResponseLadder) -> TightenedSolution:
    """The problem that has the corrected multipliers of a ladder for its solution, certified like any other.

    Its thresholds lie below what was asked by as much as the samples understate the policy. Constraints that do not
    bind keep theirs.

    Args:
        tightened: what to correct.
        ladder: of its problem and solution.

    Returns:
        ``tightened`` itself where the ladder refuses a correction.

    Raises:
        NotCertifiedError: float64 does not suffice for the corrected problem.
    """
    lam_m, beta = ladder.corrected_multipliers_m, ladder.corrected_beta
    if lam_m is None or beta is None:
        return tightened
    asked_m, asked_kl = tightened.problem.thresholds_m, tightened.problem.kl_budget
    binding_m = tightened.problem.is_active_m(tightened.solution.multipliers)
    corrected = tightened.problem.with_beta(beta)
    thresholds_m = np.where(binding_m, threshold_at_multipliers(corrected, lam_m), asked_m)
    problem, spared = corrected.with_thresholds(thresholds_m), 0.0
    if asked_kl is not None:
        kl = float(np.mean(tilt(corrected, lam_m).kl_p))
        problem, spared = replace(problem, kl_budget=kl), kl - asked_kl
    solution = solve_dual(problem, initial_multipliers=lam_m)
    return replace(
        tightened,
        problem=problem.with_beta(solution.beta),
        solution=solution,
        response_bias_m=thresholds_m - asked_m,
        response_bias_kl=spared,
        price=tightened.price + tightened.solution.predicted_reward - solution.predicted_reward,
    )


def _noise_tightening(
    problem: DualProblem, solution: DualSolution, demand: Demand, present_m: FloatArray
) -> FloatArray:
    """The tightening t = lam sigma^2 / beta that would hold for the multipliers that it leads to, shape (m,).

    A Newton step from the present one: the multipliers of the constraints that bind move by the inverse of their block
    of the Hessian, Cov / beta, times the thresholds' move.
    """
    per_multiplier_m = demand.score_noise_m**2 / solution.beta  # under a KL budget the problem has none of its own
    wanted_m = solution.multipliers * per_multiplier_m
    active = np.flatnonzero((solution.multipliers > 0) & (per_multiplier_m > 0))
    binding = np.flatnonzero((solution.multipliers > 0) | problem.is_equality_m)
    if len(active) == 0:
        return np.asarray(wanted_m)
    # How multipliers follow thresholds, of binding constraints; the pseudo-inverse moves dependent ones together.
    response = np.linalg.pinv(solution.hessian[np.ix_(binding, binding)], hermitian=True)
    rows = np.searchsorted(binding, active)
    slope = per_multiplier_m[active][:, None] * response[np.ix_(rows, rows)]
    if float(np.max(np.abs(np.linalg.eigvals(slope)))) >= 1:
        raise InputError(
            f"`score_noise` is {demand.score_noise_m.tolist()}, which is as much as the scores vary within prompts "
            "under the tilt that is asked for: whatever is added to the demand, the tilt leans on the noise by more. "
            "Lower the noise (more draws of a judge) or the demand, or bound another score"
        )
    found_m = np.array(wanted_m)
    step = np.linalg.solve(np.eye(len(active)) - slope, wanted_m[active] - present_m[active])
    found_m[active] = np.maximum(present_m[active] + step, 0.0)
    return found_m


def _tightening(problem: DualProblem, solution: DualSolution, demand: Demand) -> tuple[FloatArray, FloatArray]:
    # Imported where it is used: it takes twice as long to import as all of this package, which solves without it.
    from scipy.special import ndtri

    errors = sandwich_standard_errors(
        problem, solution, thresholds_are_relative_m=demand.thresholds_are_relative_m
    ).policy.slack
    # The spread of slacks between prompts carries over to other prompts; what K responses add is known from the tilt.
    between_m = errors**2 * problem.n_prompts
    within_m = np.diag(solution.hessian) * solution.beta / demand.n_evaluation_responses
    evaluation_m = np.sqrt((between_m + within_m) / demand.n_evaluation_prompts)
    asked_m = ~np.isnan(demand.assurance_m)
    z_m = ndtri(np.where(asked_m, demand.assurance_m, 0.5))
    assurance_m = np.where(asked_m, Z_INTERVAL * evaluation_m + z_m * np.sqrt(evaluation_m**2 + errors**2), 0.0)
    second_moment = float(np.mean(problem.samples.counts_p / solution.ess_p))
    loss = math.sqrt(0.5) + math.sqrt(0.5 * second_moment)
    return np.maximum(assurance_m, 0.0), loss * demand.score_error_m
