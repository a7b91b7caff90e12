"""The answer to a dual problem: multipliers with what was proved of them.

How certain they are, given which prompts were drawn, is another matter (:mod:`stage1_dual.dual.inference`), and so is
how far to trust them (:mod:`stage1_dual.dual.trust`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.certificate import KKT_TOLERANCE, Certificate, find_dependent_constraints
from stage1_dual.dual.display import Display, describe_equalities, number, some
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray


@dataclass(frozen=True, eq=False)
class DualSolution:
    """Certified multipliers and what the tilted policy is predicted to do. Printed, it is a table.

    Attributes:
        constraint_names: one name per constraint.
        thresholds: absolute thresholds solved for, score units, shape (m,).
        beta: KL strength solved for, reward per nat; with a KL budget what was found.
        kl_budget: the KL to spend, nats per prompt, or None where beta was given.
        is_equality_m: constraints that ask for their threshold exactly, shape (m,).
        multipliers: lam*, reward per score unit, shape (m,), non-negative except of an equality. Also the shadow
            prices: the optimal value falls by lam*_j per unit of threshold j.
        dual_value: D(lam*), reward units; with a KL budget kappa D(beta, lam*) + beta kappa.
        primal_value: E[r] - beta KL of the tilted policy, reward units; with a KL budget E[r].
        duality_gap: ``dual_value - primal_value``, reward units.
        kkt_residual: max_j |min(lam_j s_j / beta, slack_j / s_j)|, of an equality |slack_j / s_j|, of a KL budget
            |KL - kappa| / kappa, dimensionless; at most 1e-8.
        n_evaluations: evaluations of the dual (value, slack and Hessian together) on all samples the solver used.
        predicted_reward: E[r] under the tilted policy, reward units.
        predicted_constraints: E[g] under the tilted policy, score units, shape (m,).
        predicted_kl: KL from the reference policy, nats per prompt.
        slack: ``predicted_constraints`` minus the thresholds, score units, shape (m,).
        hessian: of the dual at lam*, score units squared per reward unit, shape (m, m).
        ess_p: effective sample size of each prompt's weights, 1 to its number of responses, shape (p,).
        dependent_constraints: names of active constraints among which the split of lam* is not unique.
    """

    constraint_names: tuple[str, ...]
    thresholds: FloatArray
    beta: float
    kl_budget: float | None
    is_equality_m: NDArray[np.bool_]
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

    def __repr__(self) -> str:
        """A table of the constraints, with the certificate's figures."""
        return self._display().text()

    def _repr_html_(self) -> str:
        """The same table as HTML, for notebooks."""
        return self._display().html()

    def _found_for(self) -> str:
        return "" if self.kl_budget is None else f", found for a KL budget of {number(self.kl_budget)} nats"

    def _display(self) -> Display:
        columns = (self.thresholds, self.multipliers, self.predicted_constraints, self.slack)
        return Display(
            "DualSolution: certified",
            [
                ("certificate", f"KKT residual {self.kkt_residual:.1e}, at most {KKT_TOLERANCE:g}"),
                ("dual value", f"{number(self.dual_value)}, gap to the primal {self.duality_gap:.1e}"),
                ("beta", number(self.beta) + self._found_for()),
                ("reward", f"predicted {number(self.predicted_reward)}"),
                ("KL", f"predicted {number(self.predicted_kl)} nats a prompt"),
                ("effective sample size", f"median {number(float(np.median(self.ess_p)))} responses a prompt"),
                *describe_equalities(self.constraint_names, self.is_equality_m),
                *([("not unique among", some(self.dependent_constraints))] if self.dependent_constraints else []),
            ],
            ("constraint", "threshold", "multiplier", "predicted", "slack"),
            [(name, *map(number, values)) for name, *values in zip(self.constraint_names, *columns, strict=True)],
        )


def build_solution(
    problem: DualProblem, lam_m: FloatArray, certificate: Certificate, *, n_evaluations: int
) -> DualSolution:
    """Gather the solution at certified multipliers ``lam_m``, shape (m,)."""
    return DualSolution(
        constraint_names=problem.constraint_names,
        thresholds=problem.thresholds_m,
        beta=problem.beta,
        kl_budget=problem.kl_budget,
        is_equality_m=problem.is_equality_m,
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
