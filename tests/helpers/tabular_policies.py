"""Worlds small enough to sum over every response: what an objective does can be computed instead of estimated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from stage2_policy.losses import Targets


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


@dataclass(frozen=True)
class Draws:
    """Responses of a tabular world with what stage 1 knows of them.

    Attributes:
        cell: place of each row in the flattened table (p, y), shape (n,).
        targets: of the rows.
    """

    cell: torch.Tensor
    targets: Targets

    def logp(self, table: torch.Tensor) -> torch.Tensor:
        """Entries of a table (p, y) at the rows, shape (n,)."""
        return table.flatten()[self.cell]


def enumerate_shares(world: TabularWorld) -> Draws:
    """Every response once, standing for a share pi_ref(y) of the draws: its tilted weight is pi_lambda(y)."""
    shares = 1.0 / world.ref_logp.exp()
    return _draws(world, world.tilted.flatten(), n_samples=shares.flatten())


def enumerate_once(world: TabularWorld) -> Draws:
    """Every response once, each counting the same: what objectives need that compare the responses of a prompt."""
    weight = world.score.softmax(1)
    n_samples = torch.full_like(weight, weight.shape[1])
    return _draws(world, weight.flatten(), n_samples=n_samples.flatten())


def draw_responses(world: TabularWorld, *, n_samples: int, group_size: int, seed: int) -> Draws:
    """K draws from the reference to each prompt, in groups of equal size, with self-normalised tilted weights."""
    generator = torch.Generator().manual_seed(seed)
    n_prompts, n_responses = world.score.shape
    drawn = torch.multinomial(world.ref_logp.exp(), n_samples, replacement=True, generator=generator)
    weight = world.score.gather(1, drawn).softmax(1)
    uniform = torch.rand(drawn.numel(), generator=generator, dtype=torch.float64)
    cell = (drawn + n_responses * torch.arange(n_prompts)[:, None]).flatten()
    return Draws(
        cell=cell,
        targets=Targets(
            ref_logp=world.ref_logp.flatten()[cell],
            weight=weight.flatten(),
            score=world.score.flatten()[cell],
            label_noise=-torch.log(-torch.log(uniform)),
            n_samples=torch.full(cell.shape, n_samples, dtype=torch.float64),
            group=torch.arange(len(cell)) // group_size,
            beta=torch.tensor(1.0, dtype=torch.float64),
        ),
    )


def pair_neighbours(world: TabularWorld) -> Draws:
    """Each response twice, in a pair with the next and in one with the one before: pairs that no reference drew."""
    n_prompts, n_responses = world.score.shape
    first = torch.arange(n_responses)
    pair = torch.stack([first, first.roll(-1)], dim=1).flatten()
    cell = (pair + n_responses * torch.arange(n_prompts)[:, None]).flatten()
    score = world.score.flatten()[cell]
    weight = score.view(-1, 2).softmax(1)
    return Draws(
        cell=cell,
        targets=Targets(
            ref_logp=world.ref_logp.flatten()[cell],
            weight=weight.flatten(),
            score=score,
            label_noise=torch.zeros_like(score),
            n_samples=torch.full_like(score, 2.0),
            group=torch.arange(len(cell)) // 2,
            beta=torch.tensor(1.0, dtype=torch.float64),
        ),
    )


def _draws(world: TabularWorld, weight: torch.Tensor, *, n_samples: torch.Tensor) -> Draws:
    n_prompts, n_responses = world.score.shape
    return Draws(
        cell=torch.arange(n_prompts * n_responses),
        targets=Targets(
            ref_logp=world.ref_logp.flatten(),
            weight=weight,
            score=world.score.flatten(),
            label_noise=torch.zeros_like(weight),
            n_samples=n_samples,
            group=torch.arange(n_prompts).repeat_interleave(n_responses),
            beta=torch.tensor(1.0, dtype=torch.float64),
        ),
    )


def build_tabular_world(*, n_prompts: int, n_responses: int, seed: int) -> TabularWorld:
    """A world with random reference policy and scores of about one nat."""
    rng = np.random.default_rng(seed)
    return TabularWorld(
        ref_logp=torch.log_softmax(torch.from_numpy(rng.normal(size=(n_prompts, n_responses))), dim=1),
        score=torch.from_numpy(rng.normal(size=(n_prompts, n_responses))),
    )


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, *, steps: int = 100) -> torch.Tensor:
    """Policy of the softmax logits, shape (p, y), that minimise ``loss(log pi)``, from the policy ``start``."""
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=steps,
        history_size=10,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

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
