"""What stage 2 minimises: pure functions of sequence log-probabilities, scores and the grouping by prompt.

Each objective returns one loss per response, nats. Summed over the responses of a prompt and averaged over prompts
they give the value that is minimised, so any whole groups of rows, rightly scaled, are an unbiased estimate of it.
Their names and what each needs are in :mod:`stage2_policy.objectives`.

Two families. The *likelihood* (``tilted_nll``) weighs each response by the tilted weight, which is itself an estimate:
K responses stand for all, and the weighted sample is what is learnt. *Log-ratio objectives* (``tilted_pairwise``,
``dpo``) ask that the differences of log pi_theta - log pi_ref between responses of one prompt be the differences of
their scores; both sides are known exactly for every response drawn, so that nothing is noisy at the optimum except
drawn labels.

A log-ratio objective says nothing of responses that were not drawn, and any constant may be added to all log-ratios of
a prompt. The gradient in the log-probabilities of a group sums to zero, so training starts from pi_ref and adds no
mass to the drawn responses as a whole; what is not drawn is left to the parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Targets:
    """What stage 1 knows about each response of a set of whole groups.

    A group is some of the responses to one prompt. s = (r + <lam*, g - b>) / beta is the score of a response.

    Attributes:
        ref_logp: log pi_ref(y|x), nats, shape (n,).
        weight: tilted weight w_pk, shape (n,); all K weights of a prompt sum to 1.
        score: s, nats, shape (n,).
        label_noise: standard Gumbel noise of the response's drawn labels, shape (n,).
        n_samples: K, how many responses the prompt has in all, shape (n,).
        group: number of the row's group, 0 to the number of groups less 1, int64, shape (n,).
        beta: KL strength, reward per nat, no dimensions.
    """

    ref_logp: torch.Tensor
    weight: torch.Tensor
    score: torch.Tensor
    label_noise: torch.Tensor
    n_samples: torch.Tensor
    group: torch.Tensor
    beta: torch.Tensor


class RowLoss(Protocol):
    """The loss of each response, shape (n,), nats; gradients flow through ``logp`` = log pi_theta(y|x), shape (n,)."""

    def __call__(self, logp: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Loss of each response, shape (n,)."""


def tilted_nll(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Tilted maximum likelihood, -w log pi_theta(y|x).

    With y_1..y_K drawn from pi_ref, -sum_k w_k log pi_theta(y_k|x) estimates the forward KL(pi_lambda || pi_theta) up
    to a constant. Exact minimiser on exact weights: the tilted policy pi_lambda, proportional to
    pi_ref exp((r + <lambda, g>) / beta). On K samples: their reweighted empirical distribution, so that an
    unrestricted policy trained to the end forgets every response that was not drawn. Consistent: its error falls as
    K**-0.5.

    Source: the projection step of Peters and Schaal, "Reinforcement learning by reward-weighted regression" (2007),
    doi:10.1145/1273496.1273590.
    """
    return -targets.weight * logp


def tilted_pairwise(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Cross-entropy of the policy's choice between two responses to the tilted one, over all pairs of a group.

    Of two responses drawn from pi_ref, importance weighting keeps i with probability sigmoid(log rho_i - log rho_j)
    under pi_theta, and sigmoid(s_i - s_j) under pi_lambda. Exact minimiser: equal differences, hence log rho = s +
    constant, hence pi_lambda. Consistent for groups of any size from 2, and convex in log rho. The pull of a pair is
    bounded and fades where two scores lie several nats apart, so that a few responses of strange log-ratio do not
    outweigh the rest. Unchanged if r and beta are scaled together.

    Source: Burges et al., "Learning to rank using gradient descent" (ICML 2005), doi:10.1145/1102351.1102363, with
    log rho for the ranking score and the tilted choice for its target; at beta = 1 it is :func:`dpo` with every label
    replaced by its expectation.
    """
    return _pairwise_logistic(
        logp - targets.ref_logp,
        targets,
        lambda first, second: torch.sigmoid(targets.score[first] - targets.score[second]),
    )


def dpo(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Direct preference optimisation on drawn labels, over all pairs of a group.

    -log sigmoid(beta (log rho_chosen - log rho_rejected)) where i is chosen over j with the Bradley-Terry probability
    sigmoid(beta (s_i - s_j)) of the tilted scores. Each response holds its own Gumbel noise and the larger sum
    beta s + noise is chosen, which gives every pair that probability and the same label whenever the pair comes up. In
    groups of two it is the papers' objective. Exact minimiser of the mean over labels: log rho = s + constant, hence
    pi_lambda. Consistent, with error K**-0.5 from the noise of the labels: it is that of the scores thrown away.

    Source: Rafailov et al., "Direct preference optimization" (NeurIPS 2023), arXiv 2305.18290, eq. 7; pseudo-labels as
    in arXiv 2405.19544, eq. 5.
    """
    utility = targets.beta * targets.score + targets.label_noise
    return _pairwise_logistic(
        targets.beta * (logp - targets.ref_logp),
        targets,
        lambda first, second: (utility[first] > utility[second]).to(logp.dtype),
    )


def _pairwise_logistic(
    value: torch.Tensor,
    targets: Targets,
    label: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Mean over the pairs of each group of the logistic loss of their value difference, half to either row."""
    first, second = _pairs(targets.group)
    size = torch.bincount(targets.group)[targets.group]
    loss = functional.binary_cross_entropy_with_logits(
        value[first] - value[second], label(first, second), reduction="none"
    )
    # n (n - 1) / 2 pairs, the mean of which counts by the group's share n / K: 2 / (K (n - 1)) each.
    scaled = loss / targets.n_samples[first] / (size[first] - 1)
    return torch.zeros_like(value).index_add(0, first, scaled).index_add(0, second, scaled)


def _pairs(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of all pairs of a group, each pair once, shapes (number of pairs,)."""
    rows = torch.argsort(group, stable=True)
    counts = torch.bincount(group)
    largest = int(counts.max())
    place = (counts.cumsum(0) - counts)[:, None] + torch.arange(largest, device=rows.device)
    first, second = torch.triu_indices(largest, largest, 1, device=rows.device)
    present = second < counts[:, None]
    return rows[place[:, first][present]], rows[place[:, second][present]]
