"""What stage 2 minimises: pure functions of sequence log-probabilities and tilted weights.

Each objective returns one loss per response. Summed over the responses of a prompt and averaged over prompts they give
the value that is minimised, so any subset of rows, rightly scaled, is an unbiased estimate of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.contracts.errors import InputError


@dataclass(frozen=True)
class Targets:
    """What stage 1 knows about each response.

    Attributes:
        ref_logp: log pi_ref(y|x), nats, shape (n,).
        weight: tilted weight w_pk, shape (n,); all weights of a prompt sum to 1.
        n_samples: how many responses the prompt has in all, shape (n,).
        largest_ratio: the largest K w_pk among the responses of the row's prompt, shape (n,).
    """

    ref_logp: torch.Tensor
    weight: torch.Tensor
    n_samples: torch.Tensor
    largest_ratio: torch.Tensor


class RowLoss(Protocol):
    """The loss of each response, shape (n,), nats; gradients flow through ``logp`` = log pi_theta(y|x), shape (n,)."""

    def __call__(self, logp: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Loss of each response, shape (n,)."""


def tilted_nll(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Tilted maximum likelihood, -w log pi_theta(y|x).

    With y_1..y_K drawn from pi_ref, -sum_k w_k log pi_theta(y_k|x) estimates the forward KL(pi_lambda || pi_theta) up
    to a constant. Exact minimiser on exact weights: the tilted policy pi_lambda, proportional to
    pi_ref exp((r + <lambda, g>) / beta). On K samples: their reweighted empirical distribution, so that an
    unrestricted policy trained to the end forgets every response that was not drawn.

    Source: the projection step of Peters and Schaal, "Reinforcement learning by reward-weighted regression" (2007),
    doi:10.1145/1273496.1273590.
    """
    return -targets.weight * logp


def tilted_kl(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Tilted maximum likelihood less its sampling noise, -w log rho + (rho - 1) / K with rho = pi_theta / pi_ref.

    Since pi_theta sums to one, E_ref[rho] = 1 whatever theta: the second term has mean zero, and the objective has the
    value (up to a constant) and the exact minimiser pi_lambda of :func:`tilted_nll`. Its gradient
    -(w - rho / K) grad log pi_theta, however, vanishes response by response where rho = K w, that is at the tilted
    policy, where that of ``tilted_nll`` is as noisy as everywhere. On K samples: any policy whose ratio to pi_ref is
    K w on the responses drawn, which leaves the reference where nothing was drawn.

    Where rho exceeds the largest tilted ratio of its prompt, c = max_k K w_k, it is continued by its tangent in
    log rho, so that no response pulls harder than c / K: a few noisy ratios would else outweigh all others. pi_lambda
    has no such ratio and stays a minimiser; the gradient equals that of ``tilted_nll`` in the mean for every policy
    whose ratios stay below c.

    Source: the variational form of the Kullback-Leibler divergence of Nguyen, Wainwright and Jordan, "Estimating
    divergence functionals and the likelihood ratio by convex risk minimization", IEEE Trans. Inf. Theory 56 (2010),
    doi:10.1109/TIT.2010.2068870, with log rho for the critic.
    """
    log_ratio = logp - targets.ref_logp
    below = torch.minimum(log_ratio, targets.largest_ratio.log())
    ratio = torch.exp(below) * (1 + log_ratio - below)
    return -targets.weight * log_ratio + (ratio - 1) / targets.n_samples


@dataclass(frozen=True)
class Objective:
    """An objective and what it needs.

    Attributes:
        row_loss: the loss of each response.
        uses_reference: whether it reads ``Targets.ref_logp``; the reference is then scored on every training response.
    """

    row_loss: RowLoss
    uses_reference: bool


OBJECTIVES = {
    "tilted_nll": Objective(tilted_nll, uses_reference=False),
    "tilted_kl": Objective(tilted_kl, uses_reference=True),
}


def read_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        InputError: there is none.
    """
    if name not in OBJECTIVES:
        raise InputError(f"objective is `{name}`; it must be one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
