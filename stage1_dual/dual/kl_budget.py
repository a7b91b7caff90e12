"""The beta that spends a KL budget: the multiplier of a bound on the KL, found by a search around the solver.

    maximise over policies pi  E[r]   subject to   E[g] >= b ,  E_x KL(pi || pi_ref) <= kappa

has the dual D(beta, lam) = beta E_x log E exp{(r + <lam, g - b>)/beta} + beta kappa, the perspective of a convex
function plus a linear term, hence jointly convex in beta > 0 and lam (relative entropy policy search: Peters, Muelling
and Altun, AAAI 2010). Its derivative by beta is kappa - KL, and along lam*(beta) the KL falls as beta grows. So one
root is to be found, and any solution for a fixed beta says on which side of it that beta lies.

The budget can be out of reach on either side. As beta grows without end the KL falls to the least with which the
constraints can be met; less cannot be had. As beta goes to 0 it rises to what the best policy on the samples spends; a
larger budget does not bind, and the optimum is no tilted policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.errors import KlBudgetError, NotCertifiedError
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray

SolveAtBeta = Callable[[float, FloatArray | None], DualSolution]
"""The certified solution for a fixed beta, from multipliers near it, shape (m,), or from none."""

# Between these, in standard deviations of the reward within prompts, lies every beta that is looked at: at the upper
# the KL is within 1e-8 of its least, at the lower the best response to a prompt, with its equals, has all the weight.
_LARGEST_BETA = 1e4
_SMALLEST_BETA = 1e-4
# From one beta to the next on the way to the other side of the root.
_LARGEST_FACTOR, _SMALLEST_FACTOR = 8.0, 1.05
# The root is found where the KL is the budget to this share of it; what the certificate asks is a thousand times that.
_SPENT = 1e-11


def spend_budget(problem: DualProblem, solve: SolveAtBeta, start_m: FloatArray | None) -> DualSolution:
    """The solution for the beta at which the KL is the problem's budget, certified for that beta.

    Args:
        problem: its beta is where the search starts if there are multipliers to start from.
        solve: solves the problem without its budget.
        start_m: multipliers near the answer, shape (m,), or None.

    Raises:
        KlBudgetError: the budget is too small for the constraints, or larger than what the best policy spends.
        InfeasibleError: the thresholds cannot be met at any beta.
        NotCertifiedError: float64 does not suffice.
    """
    if problem.kl_budget is None:
        raise ValueError("the problem has no KL budget")
    budget, scale = problem.kl_budget, problem.reward_scale
    search = _Search(budget, solve, start_m)
    if scale == 0:
        least = solve(problem.beta, start_m).predicted_kl
        raise KlBudgetError(
            f"the KL budget of {budget:.6g} nats leaves beta open: the reward is the same for all responses of every "
            f"prompt, and the policy closest to the reference that meets the constraints spends {least:.6g} nats "
            f"whatever beta is; give beta instead",
            kl_budget=budget,
            attainable_kl=least,
        )
    # The KL of a Gaussian reward without constraints.
    beta = problem.beta if start_m is not None else scale / math.sqrt(2.0 * budget)
    side = search.excess(math.log(beta))
    while side != 0.0:
        factor = min(max(math.exp(0.5 * abs(side)), _SMALLEST_FACTOR), _LARGEST_FACTOR)
        beta = beta * factor if side > 0 else beta / factor
        if not _SMALLEST_BETA <= beta / scale <= _LARGEST_BETA:
            raise _out_of_reach(budget, search.last, too_small=side > 0)
        try:
            other = search.excess(math.log(beta))
        except NotCertifiedError:
            if side > 0:
                raise
            raise _out_of_reach(budget, search.last, too_small=False) from None
        if other * side < 0:
            return search.between()
        side = other
    return search.last


def _out_of_reach(budget: float, nearest: DualSolution, *, too_small: bool) -> KlBudgetError:
    kl = nearest.predicted_kl
    if too_small:
        message = (
            f"the KL budget of {budget:.6g} nats is too small: the policy closest to the reference that meets the "
            f"constraints on these samples spends {kl:.6g} nats; raise the budget above that, or lower a threshold"
        )
    else:
        message = (
            f"the KL budget of {budget:.6g} nats does not bind: as beta goes to 0 the best policy on these samples "
            f"spends {kl:.6g} nats (at beta {nearest.beta:.3g}); lower the budget below that, or give beta instead"
        )
    return KlBudgetError(message, kl_budget=budget, attainable_kl=kl)


class _Search:
    """Solutions along log beta, remembered: each is a start for the next."""

    def __init__(self, budget: float, solve: SolveAtBeta, start_m: FloatArray | None) -> None:
        self._budget = budget
        self._solve = solve
        self._start_m = start_m
        self._solved: list[tuple[float, float, DualSolution]] = []

    @property
    def last(self) -> DualSolution:
        return self._solved[-1][2]

    def excess(self, log_beta: float) -> float:
        """log(KL / budget) at the solution for this beta: about linear in log beta; 0 where the budget is spent."""
        solution = self._solve(math.exp(log_beta), self._near(math.exp(log_beta)))
        share = max(solution.predicted_kl / self._budget, float(np.finfo(np.float64).tiny))
        excess = 0.0 if abs(share - 1.0) <= _SPENT else math.log(share)
        self._solved.append((log_beta, excess, solution))
        return excess

    def between(self) -> DualSolution:
        """The solution between the last two betas, on either side of the root."""
        # Imported where it is used: it takes longer to import than most problems to solve.
        from scipy.optimize import brentq

        (one, _, _), (other, _, _) = self._solved[-2:]
        brentq(self.excess, one, other, xtol=1e-15, rtol=4 * np.finfo(np.float64).eps)
        return min(self._solved, key=lambda known: abs(known[1]))[2]

    def _near(self, beta: float) -> FloatArray | None:
        """About where lam* is, shape (m,): on the line through the two nearest solutions, as it is nearly linear."""
        near = sorted(self._solved, key=lambda known: abs(known[2].beta - beta))[:2]
        if not near:
            return self._start_m
        first = near[0][2]
        if len(near) == 1:
            return first.multipliers * (beta / first.beta)
        second = near[1][2]
        if first.beta == second.beta:
            return first.multipliers
        slope_m = (first.multipliers - second.multipliers) / (first.beta - second.beta)
        return np.where(first.multipliers == 0, 0.0, first.multipliers + slope_m * (beta - first.beta))
