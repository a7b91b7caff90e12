"""Least squares of scores in the tangent of an adapter, and the best policy within what was learnt.

In the tangent at the reference log rho(y|x) = <phi(y|x), change> with phi the score function of a response
(:mod:`stage2_policy.score_functions`). The pairwise objective is, to second order in log-ratios and scores, the sum
over prompts of the squared differences of log rho and s = (r + <lam*, g - b>)/beta within the prompt; its least
squares with a penalty on the change is a ridge regression, solved by a system of as many equations as there are
responses. The change it gives is the natural gradient step (Kakade, "A natural policy gradient", NeurIPS 2001; Peters
and Schaal, "Natural actor-critic", 2008, eq. 8: the regression of returns on score functions), damped by the penalty.

The regression is linear in what it fits, so that each score has a change of its own, and s their sum. What is taught
of one score is more than of another, so that the sum may break a demand that the tilted policy keeps.
:func:`choose_factors` takes, of all sums of these changes, the one that is best on held-out prompts while it
keeps the constraints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from stage2_policy.data import less_means, segment_softmax
from stage2_policy.score_functions import as_floats

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-4, 5))
"""Beside a system whose diagonal is 1 in the mean."""
_FOLDS = 5
_WEIGHTS_AT_ONCE = 8192


@dataclass(frozen=True)
class Tangent:
    """The changes of an adapter's weights that least squares gives.

    Attributes:
        changes: of each score's column, by one unit of the column in log rho, float32, shape (c, weights).
        penalty: that foresaw s best on prompts left out.
        explained: share of the variance of s within prompts left out that the fit without them explains.
    """

    changes: np.ndarray
    penalty: float
    explained: float


def fit_tangent(
    score_functions: np.ndarray, columns: np.ndarray, prompt_n: np.ndarray, *, nats: np.ndarray
) -> Tangent:
    """Ridge regression of each column on the score functions within prompts; the penalty by leaving prompts out.

    Args:
        score_functions: bfloat16 as its bits in uint16, shape (n, weights).
        columns: of each response, shape (n, c).
        prompt_n: prompt of each response, ascending, shape (n,).
        nats: of s a unit of each column, shape (c,).
    """
    _, prompt_n = np.unique(prompt_n, return_inverse=True)
    system = _products(score_functions, prompt_n)
    scale = np.trace(system) / len(system)
    system /= scale
    y = less_means(columns, prompt_n)
    s = y @ nats
    fold = prompt_n % min(_FOLDS, int(prompt_n[-1]) + 1)
    errors = np.zeros(len(PENALTIES))
    for one in range(int(fold.max()) + 1):
        left, kept = fold == one, fold != one
        across, within = system[np.ix_(left, kept)], system[np.ix_(kept, kept)]
        for place, penalty in enumerate(PENALTIES):
            errors[place] += np.sum((s[left] - across @ _solve(within, s[kept], penalty)) ** 2)
    best = int(np.argmin(errors))
    shares = (_solve(system, y, PENALTIES[best]) / scale).astype(np.float32)
    changes = np.empty((columns.shape[1], score_functions.shape[1]), dtype=np.float32)
    for part in _parts(score_functions.shape[1]):
        centred = less_means(as_floats(score_functions[:, part]).numpy(), prompt_n)
        changes[:, part] = shares.T @ centred
    return Tangent(changes, PENALTIES[best], 1 - float(errors[best]) / float(s @ s))


@dataclass(frozen=True)
class Chosen:
    """How much of each change is taken.

    Attributes:
        factors: of each change, 1 where it is taken as at lambda*, shape (c,).
        reached: share of the required gains in the constraints that the sum reaches, 1 where it reaches all.
    """

    factors: np.ndarray
    reached: float


@dataclass(frozen=True, eq=False)
class Judging:
    """Responses of the reference that judge the sums of changes, and what a sum must gain on them.

    Attributes:
        log_ratios: that each change taken once gives, nats, shape (n, c); of the reward and of each constraint.
        columns: the reward and each constraint's column, turned so that more is better, shape (n, c).
        prompt_n: prompt of each row, from 0, ascending, shape (n,).
        reward_nats: of s a unit of the reward, 1 / beta.
        required: gain in each constraint's column over the reference, shape (c - 1,).
        is_equality: of each constraint, shape (c - 1,).
        most_kl: the largest KL that may be spent, nats a prompt; infinite where there is none.
    """

    log_ratios: np.ndarray
    columns: np.ndarray
    prompt_n: np.ndarray
    reward_nats: float
    required: np.ndarray
    is_equality: np.ndarray
    most_kl: float = np.inf

    def outcome(self, factors: np.ndarray) -> tuple[np.ndarray, float]:
        """Gain in each column, shape (c,), and the KL in nats a prompt, of a sum with these factors, shape (c,)."""
        weight, counts = segment_softmax(self.log_ratios @ factors, self.prompt_n), np.bincount(self.prompt_n)
        even = 1.0 / counts[self.prompt_n]
        nats = float(np.sum(weight * np.log(np.maximum(weight / even, 1e-300))))
        return (weight - even) @ self.columns / len(counts), nats / len(counts)


def choose_factors(judging: Judging) -> Chosen:
    """The best policy among the sums of changes that gains in each constraint what is required.

    Maximises E[r] / beta - KL over the factors c of pi proportional to pi_ref exp(sum_j c_j log rho_j), with the gains
    in the constraints at least those required: the dual's own problem among the policies that were learnt.
    Expectations are of the reference's responses, weighted within each prompt. Where no sum reaches what is required,
    the largest share of all requirements that one reaches is asked for.

    Args:
        judging: the responses, and what is required.
    """
    # A change of nothing, as of a constraint that does not bind, has no factor to choose.
    moves = np.abs(judging.log_ratios).max(axis=0) > 0
    if not moves.any():
        return Chosen(np.ones(len(moves)), 1.0)
    for share in np.linspace(1.0, 0.0, _SHARES):
        factors = _solve_for(judging, float(share), moves)
        if factors is not None:
            return Chosen(factors, float(share))
    return Chosen(np.ones(len(moves)), 0.0)


def _solve_for(judging: Judging, share: float, moves: np.ndarray) -> np.ndarray | None:
    """The best factors that gain a share of what is required, shape (c,); None where there are none."""
    scale = judging.columns[:, 1:].std(axis=0) + 1e-12

    def outcome(some: np.ndarray) -> tuple[np.ndarray, float]:
        return judging.outcome(_spread(some, moves))

    def loss(some: np.ndarray) -> float:
        gains, kl = outcome(some)
        return kl - judging.reward_nats * float(gains[0])

    def slack(some: np.ndarray) -> np.ndarray:
        return np.asarray((outcome(some)[0][1:] - share * judging.required) / scale)

    rules: list[Any] = [
        {"type": "ineq", "fun": lambda some: slack(some)[~judging.is_equality]},
        {"type": "eq", "fun": lambda some: slack(some)[judging.is_equality]},
    ]
    if np.isfinite(judging.most_kl):
        rules.append({"type": "ineq", "fun": lambda some: judging.most_kl - outcome(some)[1]})
    found = minimize(loss, np.ones(int(moves.sum())), method="SLSQP", constraints=rules, options={"maxiter": 200})
    met, spent = slack(found.x), outcome(found.x)[1]
    missed = np.where(judging.is_equality, np.abs(met), -met).max(initial=0.0)
    if missed > _MET or spent > judging.most_kl * (1 + _MET) or np.abs(found.x).max() > _FURTHEST:
        return None
    return _spread(found.x, moves)


_MET = 1e-3
"""Standard deviations of a column by which a requirement may be missed and counts as reached."""
_FURTHEST = 5.0
"""The largest factor: a policy that much further from the reference is no longer near its tangent."""
_SHARES = 21


def _spread(factors: np.ndarray, moves: np.ndarray) -> np.ndarray:
    whole = np.ones(len(moves))
    whole[moves] = factors
    return whole


def _solve(system: np.ndarray, values: np.ndarray, penalty: float) -> np.ndarray:
    damped = system + penalty * np.eye(len(system))
    return np.asarray(cho_solve(cho_factor(damped, overwrite_a=True, check_finite=False), values, check_finite=False))


def _products(score_functions: np.ndarray, prompt_n: np.ndarray) -> np.ndarray:
    """Inner products of the centred score functions of all pairs of responses, float64, shape (n, n)."""
    n_rows, n_weights = score_functions.shape
    system = np.zeros((n_rows, n_rows))
    for part in _parts(n_weights):
        centred = torch.from_numpy(less_means(as_floats(score_functions[:, part]).numpy(), prompt_n))
        system += (centred @ centred.T).numpy()
    return system


def _parts(n_weights: int) -> Sequence[slice]:
    return [slice(begin, begin + _WEIGHTS_AT_ONCE) for begin in range(0, n_weights, _WEIGHTS_AT_ONCE)]
