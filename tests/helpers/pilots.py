"""Pilots of Gaussian scores, and what is asked of a plan from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual import DualProblem, PilotRows, SizeRequest, solve_dual

BETA = 2.0

Scores = NDArray[np.float64]


def draw_gaussian(
    rng: np.random.Generator,
    n_prompts: int,
    n_responses: int,
    *,
    n_constraints: int = 1,
    effect: float = 0.5,
    correlation: float = -0.4,
) -> tuple[Scores, Scores]:
    """Rewards and scores that are Gaussian with standard deviation 1 within a prompt, shapes (p, k) and (p, k, m)."""
    r_pk = rng.normal(size=(n_prompts, n_responses))
    own_pkm = rng.normal(size=(n_prompts, n_responses, n_constraints))
    g_pkm = correlation * r_pk[:, :, None] + math.sqrt(1 - correlation**2) * own_pkm
    return r_pk, g_pkm + effect * rng.normal(size=(n_prompts, 1, n_constraints))


def draw_unlike(
    rng: np.random.Generator, variance_p: Scores, n_responses: int, *, n_constraints: int = 1
) -> tuple[Scores, Scores]:
    """Rewards, and scores of an own variance a prompt that they do not go with, shapes (p, k) and (p, k, m).

    The slack of a prompt is then lam_j variance_p / beta less the margin.
    """
    shape = (len(variance_p), n_responses)
    own_pkm = rng.normal(size=(*shape, n_constraints))
    return 0.3 * rng.normal(size=shape), np.sqrt(variance_p)[:, None, None] * own_pkm


def pilot_rows(
    r_pk: Scores, g_pkm: Scores, margins: float, *, relative: bool = True, beta: float = BETA, equal: bool = False
) -> PilotRows:
    """The rows of a pilot at the solution of its own problem."""
    n_prompts, n_responses = r_pk.shape
    m = g_pkm.shape[2]
    margins_m = np.full(m, margins)
    reference_m = g_pkm.mean(axis=(0, 1)) if relative else np.zeros(m)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=reference_m + margins_m, beta=beta)
    problem = problem.with_equalities(np.full(m, equal))
    column_mn = np.ascontiguousarray(g_pkm.reshape(-1, m).T)
    return PilotRows(
        counts_p=np.full(n_prompts, n_responses),
        reward_n=r_pk.ravel(),
        column_mn=column_mn,
        reference_mn=column_mn if relative else np.zeros_like(column_mn),
        target_m=margins_m,
        multipliers_m=solve_dual(problem).multipliers,
        beta=beta,
        is_equality_m=problem.is_equality_m,
        names=tuple(f"g{j}" for j in range(m)),
    )


def size_request(within: float, m: int = 1, **settings: Any) -> SizeRequest:
    """95%, an evaluation of 64 responses and room for twice as much, but for the settings given."""
    defaults: dict[str, Any] = {"confidence": 0.95, "evaluation_responses": 64, "room_m": np.full(m, 2 * within)}
    return SizeRequest(within_m=np.full(m, within), **{**defaults, **settings})
