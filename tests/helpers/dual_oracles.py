"""Independent witnesses for the dual: a naive loop, and cvxpy with Clarabel in dual and in primal form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from pipeline.contracts.arrays import FloatArray


def naive_dual_value(r_pk: FloatArray, g_pkm: FloatArray, *, b_m: FloatArray, beta: float, lam_m: FloatArray) -> float:
    """D(lam) with one Python loop a prompt and one a response: the mean of logs of per-prompt means."""
    total = 0.0
    for r_k, g_km in zip(r_pk, g_pkm, strict=True):
        mean = 0.0
        for r, g_m in zip(r_k, g_km, strict=True):
            mean += math.exp((r + sum(lam * (g - b) for lam, g, b in zip(lam_m, g_m, b_m, strict=True))) / beta)
        total += math.log(mean / len(r_k))
    return beta * total / len(r_pk)


@dataclass(frozen=True)
class NaivePolicy:
    """What the tilted policy does: means over prompts, and effective sample sizes by prompt."""

    reward: float
    slack_m: FloatArray
    kl: float
    covariance_mm: FloatArray
    ess_p: FloatArray


def naive_policy(
    r_pk: FloatArray, g_pkm: FloatArray, *, b_m: FloatArray, beta: float, lam_m: FloatArray
) -> NaivePolicy:
    """One prompt after the other, from the definitions."""
    parts: list[tuple[float, FloatArray, float, FloatArray, float]] = []
    for r_k, g_km in zip(r_pk, g_pkm, strict=True):
        weights = [math.exp((r + float(lam_m @ (g_m - b_m))) / beta) for r, g_m in zip(r_k, g_km, strict=True)]
        w_k = np.array(weights) / math.fsum(weights)
        slack_m = sum((w * (g_m - b_m) for w, g_m in zip(w_k, g_km, strict=True)), np.zeros(len(b_m)))
        off_km = g_km - b_m - slack_m
        parts.append(
            (
                math.fsum(w_k * r_k),
                slack_m,
                math.fsum(w * math.log(w * len(w_k)) for w in w_k if w > 0),
                sum((w * np.outer(off, off) for w, off in zip(w_k, off_km, strict=True)), np.zeros(2 * b_m.shape)),
                1.0 / math.fsum(w_k**2),
            )
        )
    reward, slack_m, kl, covariance_mm, ess = zip(*parts, strict=True)
    return NaivePolicy(
        float(np.mean(reward)),
        np.mean(slack_m, axis=0),
        float(np.mean(kl)),
        np.mean(covariance_mm, axis=0),
        np.array(ess),
    )


@dataclass(frozen=True)
class OracleAnswer:
    value: float
    lam_m: FloatArray


def _solve_tightly(problem: cp.Problem) -> None:
    """Solve to the tightest tolerance at which Clarabel still calls its answer optimal.

    At its defaults its multipliers are off by up to 4e-5 on these problems. Asked for too much it stops short and says
    so, at a level that differs from problem to problem; shorter steps without rescaling bring it furthest.
    """
    for tolerance in (1e-12, 1e-11, 1e-10, 1e-9, 1e-8):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            problem.solve(
                solver=cp.CLARABEL,
                tol_gap_abs=tolerance,
                tol_gap_rel=tolerance,
                tol_feas=tolerance,
                max_step_fraction=0.9,
                equilibrate_enable=False,
                warm_start=False,
            )
        if problem.status == cp.OPTIMAL:
            return
    raise AssertionError(f"Clarabel gave {problem.status}")


def cvxpy_dual(
    r_pk: FloatArray, g_pkm: FloatArray, *, b_m: FloatArray, beta: float, equal: Sequence[int] = ()
) -> OracleAnswer:
    """Minimise D over lam >= 0, and over lam of either sign for the equalities ``equal``."""
    n_prompts, n_responses, n_constraints = g_pkm.shape
    lam = cp.Variable(n_constraints)
    bounds = [lam[j] >= 0 for j in range(n_constraints) if j not in equal]
    terms = [
        cp.log_sum_exp((r_pk[p] + (g_pkm[p] - b_m) @ lam) / beta) - math.log(n_responses) for p in range(n_prompts)
    ]
    problem = cp.Problem(cp.Minimize(beta * cp.sum(cp.hstack(terms)) / n_prompts), bounds)
    _solve_tightly(problem)
    return OracleAnswer(value=float(problem.value), lam_m=np.asarray(lam.value))


def cvxpy_primal(
    r_pk: FloatArray, g_pkm: FloatArray, *, b_m: FloatArray, beta: float, equal: Sequence[int] = ()
) -> OracleAnswer:
    """Maximise E[r] - beta KL over the weights of the samples; lam* are the constraints' own duals."""
    n_prompts, n_responses, n_constraints = g_pkm.shape
    w = cp.Variable((n_prompts, n_responses), nonneg=True)
    kl = cp.sum(cp.rel_entr(w, np.full((n_prompts, n_responses), 1.0 / n_responses))) / n_prompts
    reward = cp.sum(cp.multiply(w, r_pk)) / n_prompts
    slack = [cp.sum(cp.multiply(w, g_pkm[:, :, j])) / n_prompts - b_m[j] for j in range(n_constraints)]
    constraints = [slack[j] == 0 if j in equal else slack[j] >= 0 for j in range(n_constraints)]
    problem = cp.Problem(cp.Maximize(reward - beta * kl), [*constraints, cp.sum(w, axis=1) == 1])
    _solve_tightly(problem)
    lam_m = np.array([float(np.squeeze(constraint.dual_value)) for constraint in constraints])
    # An equality's dual has the sign of its slack in the Lagrangian of the minimisation.
    lam_m[list(equal)] *= -1.0
    return OracleAnswer(value=float(problem.value), lam_m=lam_m)


@dataclass(frozen=True)
class BudgetAnswer(OracleAnswer):
    beta: float


def cvxpy_budget(
    r_pk: FloatArray, g_pkm: FloatArray, *, b_m: FloatArray, kl: float, equal: Sequence[int] = ()
) -> BudgetAnswer:
    """Maximise E[r] over the weights of the samples within a KL budget; beta* is the budget's own dual."""
    n_prompts, n_responses, n_constraints = g_pkm.shape
    w = cp.Variable((n_prompts, n_responses), nonneg=True)
    spent = cp.sum(cp.rel_entr(w, np.full((n_prompts, n_responses), 1.0 / n_responses))) / n_prompts
    slack = [cp.sum(cp.multiply(w, g_pkm[:, :, j])) / n_prompts - b_m[j] for j in range(n_constraints)]
    constraints = [slack[j] == 0 if j in equal else slack[j] >= 0 for j in range(n_constraints)]
    budget = spent <= kl
    reward = cp.sum(cp.multiply(w, r_pk)) / n_prompts
    problem = cp.Problem(cp.Maximize(reward), [*constraints, budget, cp.sum(w, axis=1) == 1])
    _solve_tightly(problem)
    lam_m = np.array([float(np.squeeze(constraint.dual_value)) for constraint in constraints])
    lam_m[list(equal)] *= -1.0
    return BudgetAnswer(value=float(problem.value), lam_m=lam_m, beta=float(budget.dual_value))
