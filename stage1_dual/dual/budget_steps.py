"""Where beta and lam move together when prompts are redrawn: the steps behind intervals under a KL budget.

The tilted policy is an exponential family with statistics u = (r, g) and natural parameters nu = (1, lam) / beta, in
which every derivative is a cumulant: d E[u] = Cov(u, u) dnu, d^2 E[u] = K3(u, u, u), and for the KL, <nu, E[u]> - log
Z, d KL = Cov(u, u) nu and d^2 KL = Cov(u, u) + K3(u, u, u) nu. The equations KL = kappa and E[g] >= b are those of the
jointly convex dual (:mod:`stage1_dual.dual.kl_budget`), in z = (beta', lam s / beta) with beta' in units of the beta
found: its gradient there is (kappa - KL, slack / s), its Hessian symmetric. A step is Newton's under lam >= 0,
corrected some times by what the second-order expansion at nu(z) adds to the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.prompt_sums import PromptSums
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.solver import newton_step

# Corrections of a step, as long as each is smaller than the one before. Against full re-solves of 150 prompts under
# absolute thresholds the first leaves the ends of the interval for beta 0.4 to 0.6 standard errors off, the third 0.2,
# these 0.06.
_ROUNDS = 6
# An expansion around beta says nothing of one that is so many times smaller.
_LEAST_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class BudgetMoments:
    """What the equations and their derivatives are, for each of b sets of prompts; axis i is r, then the m scores.

    Attributes:
        beta: the beta found, reward per nat.
        nu_i: natural parameters at the solution, shape (1 + m,).
        scale_v: standard deviations of the v constraints that vary, score units, shape (v,).
        varying: which ones they are, shape (v,).
        is_free: axes of z that may go below 0, shape (1 + v,).
        gradient_bz: kappa - KL, nats, then slack over scale, shape (b, 1 + v).
        covariance_bii: of u under the tilted policy, shape (b, 1 + m, 1 + m).
        third_biii: third cumulants of u, shape (b, 1 + m, 1 + m, 1 + m).
    """

    beta: float
    nu_i: FloatArray
    scale_v: FloatArray
    varying: NDArray[np.intp]
    is_free: NDArray[np.bool_]
    gradient_bz: FloatArray
    covariance_bii: FloatArray
    third_biii: FloatArray

    @classmethod
    def gather(cls, problem: DualProblem, lam_m: FloatArray, means: PromptSums, kl_budget: float) -> BudgetMoments:
        """From sums by prompt at ``lam_m``, shape (m,), and the problem's beta."""
        beta, n_sets, n_constraints = problem.beta, len(means.reward_p), len(lam_m)
        covariance_bii = np.empty((n_sets, 1 + n_constraints, 1 + n_constraints))
        third_biii = np.empty((*covariance_bii.shape, 1 + n_constraints))
        covariance_bii[:, 1:, 1:] = beta * means.scores_slope_pmm
        covariance_bii[:, 0, 1:] = covariance_bii[:, 1:, 0] = beta * means.reward_slope_pm
        covariance_bii[:, 0, 0] = means.reward_cumulants_pc[:, 0]
        third_biii[:, 1:, 1:, 1:] = beta**2 * means.scores_bend_pmmm
        # The reward stands in one place, or the score does.
        for axes in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)):
            turned_biii = np.transpose(third_biii, axes)
            turned_biii[:, 0, 1:, 1:] = beta**2 * means.reward_bend_pmm
            turned_biii[:, 1:, 0, 0] = means.reward_cumulants_pc[:, 2:]
        third_biii[:, 0, 0, 0] = means.reward_cumulants_pc[:, 1]
        varying = np.flatnonzero(~problem.is_constant_m)
        scale_v = problem.score_scale_m[varying]
        return cls(
            beta=beta,
            nu_i=np.append(1.0, lam_m) / beta,
            scale_v=scale_v,
            varying=varying,
            is_free=np.append(False, problem.is_equality_m[varying]),
            gradient_bz=np.column_stack([kl_budget - means.kl_p, means.psi_pm[:, varying] / scale_v]),
            covariance_bii=covariance_bii,
            third_biii=third_biii,
        )

    @property
    def start_z(self) -> FloatArray:
        """Z at the solution, shape (1 + v,)."""
        return np.append(1.0, self.nu_i[1 + self.varying] * self.scale_v)

    @property
    def turn_iz(self) -> FloatArray:
        """D nu / d z at the solution, shape (1 + m, 1 + v)."""
        turn_iz = np.zeros((len(self.nu_i), 1 + len(self.varying)))
        turn_iz[:, 0] = -self.nu_i
        turn_iz[1 + self.varying, 1 + np.arange(len(self.varying))] = 1.0 / self.scale_v
        return turn_iz

    @property
    def slope_bzi(self) -> FloatArray:
        """D gradient / d nu, shape (b, 1 + v, 1 + m)."""
        kl_slope_bi = self.covariance_bii @ self.nu_i
        scores_bvi = self.covariance_bii[:, 1 + self.varying] / self.scale_v[:, np.newaxis]
        return np.concatenate([-kl_slope_bi[:, np.newaxis], scores_bvi], axis=1)

    @property
    def hessian_bzz(self) -> FloatArray:
        """D gradient / d z, symmetric, shape (b, 1 + v, 1 + v)."""
        return np.asarray(self.slope_bzi @ self.turn_iz, dtype=np.float64)

    def steps(self) -> FloatArray:
        """The step of z in each set of prompts, shape (b, 1 + v)."""
        hessian_bzz = self.hessian_bzz
        step_bz = self._newton(self.gradient_bz, hessian_bzz)
        last_b = np.full(len(step_bz), np.inf)
        for _ in range(_ROUNDS):
            linear_bz = np.einsum("bzy,by->bz", hessian_bzz, step_bz)
            bent_bz = self._expand_gradient(self.moves(step_bz)) - linear_bz
            next_bz = self._newton(self.gradient_bz + bent_bz, hessian_bzz)
            change_b = np.abs(next_bz - step_bz).max(axis=1)
            settles_b = change_b < last_b
            step_bz[settles_b] = next_bz[settles_b]
            last_b = np.minimum(last_b, change_b)
        return step_bz

    def moves(self, step_bz: FloatArray) -> FloatArray:
        """How far nu goes with a step of z, shape (b, 1 + m)."""
        z_bz = self.start_z + step_bz
        nu_bi = np.zeros((len(step_bz), len(self.nu_i)))
        nu_bi[:, 0] = 1.0 / self.beta
        nu_bi[:, 1 + self.varying] = z_bz[:, 1:] / self.scale_v
        return np.asarray(nu_bi / z_bz[:, :1] - self.nu_i, dtype=np.float64)

    def expand(self, move_bi: FloatArray) -> FloatArray:
        """What E[u] gains where nu moves, to second order, shape (b, 1 + m)."""
        gain_bi: FloatArray = np.einsum("bij,bj->bi", self.covariance_bii, move_bi)
        gain_bi += 0.5 * np.einsum("bijk,bj,bk->bi", self.third_biii, move_bi, move_bi)
        return gain_bi

    def _expand_gradient(self, move_bi: FloatArray) -> FloatArray:
        """What the gradient gains where nu moves, to second order, shape (b, 1 + v)."""
        bend_bij = self.covariance_bii + self.third_biii @ self.nu_i
        kl_b = np.einsum("bij,bi,j->b", self.covariance_bii, move_bi, self.nu_i)
        kl_b += 0.5 * np.einsum("bij,bi,bj->b", bend_bij, move_bi, move_bi)
        return np.column_stack([-kl_b, self.expand(move_bi)[:, 1 + self.varying] / self.scale_v])

    def _newton(self, gradient_bz: FloatArray, hessian_bzz: FloatArray) -> FloatArray:
        start_z = self.start_z
        step_bz = np.empty_like(gradient_bz)
        for place, (gradient_z, hessian_zz) in enumerate(zip(gradient_bz, hessian_bzz, strict=True)):
            step_bz[place] = newton_step(start_z, gradient_z, hessian_zz, self.is_free)
        step_bz[:, 0] = np.maximum(step_bz[:, 0], _LEAST_SHARE - 1.0)
        return step_bz
