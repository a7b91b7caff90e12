"""The answer to a dual problem."""

from __future__ import annotations

from dataclasses import dataclass

from stage1_dual.dual.certificate import Certificate, find_dependent_constraints
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray


@dataclass(frozen=True, eq=False)
class DualSolution:
    """Certified multipliers and what the tilted policy is predicted to do.

    Attributes:
        multipliers: lam*, reward per score unit, shape (m,), non-negative. Also the shadow prices: the optimal
            value falls by lam*_j per unit of threshold j.
        dual_value: D(lam*), reward units.
        primal_value: E[r] - beta KL of the tilted policy, reward units.
        duality_gap: ``dual_value - primal_value``, reward units.
        kkt_residual: max_j |min(lam_j s_j / beta, slack_j / s_j)|, dimensionless; at most 1e-8.
        n_evaluations: evaluations of the dual (value, slack and Hessian together) on all samples the solver used.
        predicted_reward: E[r] under the tilted policy, reward units.
        predicted_constraints: E[g] under the tilted policy, score units, shape (m,).
        predicted_kl: KL from the reference policy, nats per prompt.
        slack: ``predicted_constraints`` minus the thresholds, score units, shape (m,).
        hessian: of the dual at lam*, score units squared per reward unit, shape (m, m).
        ess_p: effective sample size of each prompt's weights, 1 to its number of responses, shape (p,).
        dependent_constraints: names of active constraints among which the split of lam* is not unique.
    """

    multipliers: FloatArray
    dual_value: float
    primal_value: float
    duality_gap: float
    kkt_residual: float
    n_evaluations: int
    predicted_reward: float
    predicted_constraints: FloatArray
    predicted_kl: float
    slack: FloatArray
    hessian: FloatArray
    ess_p: FloatArray
    dependent_constraints: tuple[str, ...]


def build_solution(
    problem: DualProblem, lam_m: FloatArray, certificate: Certificate, *, n_evaluations: int
) -> DualSolution:
    """Gather the solution at certified multipliers ``lam_m``, shape (m,)."""
    return DualSolution(
        multipliers=lam_m,
        dual_value=certificate.dual_value,
        primal_value=certificate.primal_value,
        duality_gap=certificate.duality_gap,
        kkt_residual=certificate.kkt_residual,
        n_evaluations=n_evaluations,
        predicted_reward=certificate.reward,
        predicted_constraints=problem.thresholds_m + certificate.slack_m,
        predicted_kl=certificate.kl,
        slack=certificate.slack_m,
        hessian=certificate.hess_mm,
        ess_p=certificate.ess_p,
        dependent_constraints=find_dependent_constraints(problem, lam_m, certificate),
    )
