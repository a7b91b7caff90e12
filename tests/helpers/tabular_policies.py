"""Worlds small enough to sum over every response: what an objective does can be computed instead of estimated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class TabularWorld:
    """Prompts with the same few responses each.

    Attributes:
        ref_logp: log pi_ref(y|x), nats, shape (p, y).
        score: (r + <lam, g - b>) / beta, nats, shape (p, y).
    """

    ref_logp: torch.Tensor
    score: torch.Tensor

    @property
    def tilted(self) -> torch.Tensor:
        """pi_lambda, the Gibbs policy, shape (p, y)."""
        return torch.softmax(self.ref_logp + self.score, dim=1)


def build_tabular_world(*, n_prompts: int, n_responses: int, seed: int) -> TabularWorld:
    """A world with random reference policy and scores of about one nat."""
    rng = np.random.default_rng(seed)
    return TabularWorld(
        ref_logp=torch.log_softmax(torch.from_numpy(rng.normal(size=(n_prompts, n_responses))), dim=1),
        score=torch.from_numpy(rng.normal(size=(n_prompts, n_responses))),
    )


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, *, steps: int = 500) -> torch.Tensor:
    """Policy of the softmax logits, shape (p, y), that minimise ``loss(log pi)``, from the policy ``start``."""
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=steps, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss(torch.log_softmax(logits, dim=1))
        value.backward()
        return value

    optimiser.step(closure)
    return torch.softmax(logits.detach(), dim=1)


def total_variation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest total variation distance over the prompts."""
    return float(0.5 * (first - second).abs().sum(dim=1).max())
