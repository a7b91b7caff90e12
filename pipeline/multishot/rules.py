"""How the iterative baseline moves lambda, given what the policies trained so far show: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import nnls

_WIDEST_SCALE = 4.0


@dataclass(frozen=True, eq=False)
class Measured:
    """What a policy trained at ``lam`` shows.

    Attributes:
        lam: multipliers it was trained at, shape (m,), reward per score unit.
        slack: E_policy[g] - b on the train prompts, higher is better, score units, shape (m,).
    """

    lam: np.ndarray
    slack: np.ndarray


def gradient_step(last: Measured, *, step_size: float) -> np.ndarray:
    """Projected gradient, lambda - eta u and not below zero, shape (m,).

    Source: the dual update of arXiv 2505.19387, algorithm 1, which does not give eta.

    Args:
        last: the newest policy.
        step_size: eta, reward per squared score unit.
    """
    return np.asarray(np.maximum(last.lam - step_size * last.slack, 0.0))


def secant_step(history: Sequence[Measured], hess_mm: np.ndarray) -> np.ndarray:
    """Newton's step for slack = 0, with the curvature of the dual scaled to what the policies show, shape (m,).

    Were every policy the tilted optimum of its lambda, the slack would have the slope H = E_x Cov[g] / beta, the
    Hessian of the dual. A trained policy follows lambda more or less willingly: the slope is taken to be c H, with c
    fitted by least squares to the last two policies (the secant, for one constraint) and kept within [1/4, 4], so that
    noise in two close measurements cannot throw lambda far. The step minimises u d + c d H d / 2 over
    lambda + d >= 0, so a constraint that is met with room to spare gives its multiplier up.

    Args:
        history: the policies so far, oldest first; at least one.
        hess_mm: H at the newest lambda, score units squared per reward unit, shape (m, m).
    """
    last = history[-1]
    scale = 1.0
    if len(history) > 1:
        predicted = hess_mm @ (last.lam - history[-2].lam)
        seen = last.slack - history[-2].slack
        if predicted @ predicted > 0:
            scale = float(np.clip(predicted @ seen / (predicted @ predicted), 1 / _WIDEST_SCALE, _WIDEST_SCALE))
    # Constraints that depend on each other make H singular; a little of its trace settles which way they go.
    ridge = 1e-6 * np.trace(hess_mm) / len(hess_mm)
    root = cholesky(scale * hess_mm + ridge * np.eye(len(hess_mm)))
    # With H = R'R the objective is |R x - (R lam - R'^-1 u)|^2 / 2 up to a constant, x = lambda + d.
    target = root @ last.lam - solve_triangular(root, last.slack, trans="T")
    lam, _ = nnls(root, target)
    return np.asarray(lam)
