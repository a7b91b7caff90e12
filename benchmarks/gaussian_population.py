"""A population of prompts whose dual has a closed form: scores are jointly Gaussian given the prompt.

Given a prompt, (r, g_1 .. g_m) is Gaussian with a mean of the prompt's own and covariance s S, s a positive factor of
the prompt with mean 1. Tilting a Gaussian moves its mean and nothing else:

    E_lam[g] = mu_g + s (c + V lam) / beta ,   E_lam[r] = mu_r + s (v + <c, lam>) / beta ,
    KL = s (v + 2 <c, lam> + lam' V lam) / (2 beta**2) ,   with S = [[v, c'], [c, V]]

and means over prompts put s = 1. With margins a above the reference and all constraints active, V lam* = beta a - c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from typing import TypeVar

import numpy as np

from pipeline.contracts.arrays import FloatArray

T = TypeVar("T")


@dataclass(frozen=True)
class GaussianPopulation:
    """Standard deviations of one within a prompt, unless ``scale`` says otherwise.

    Attributes:
        margin: of every constraint over the reference mean, in standard deviations of its score.
        beta: KL strength, reward per nat.
        n_constraints: m.
        correlation: of the reward with every constraint score.
        between: correlation of the constraint scores with one another.
        reward_effect: standard deviation of the prompts' mean rewards.
        score_effect: standard deviation of the prompts' mean constraint scores.
        spread: coefficient of variation of the prompts' variance factor s, which is Gamma distributed.
        scale: multiplies all scores, and so the margins.
    """

    margin: float = 0.5
    beta: float = 1.0
    n_constraints: int = 1
    correlation: float = -0.46
    between: float = 0.2
    reward_effect: float = 1.0
    score_effect: float = 0.5
    spread: float = 0.0
    scale: float = 1.0

    @property
    def covariance(self) -> FloatArray:
        """Of (r, g) within a prompt at s = 1, shape (1 + m, 1 + m)."""
        size = 1 + self.n_constraints
        matrix = np.full((size, size), self.between)
        matrix[0, :] = matrix[:, 0] = self.correlation
        np.fill_diagonal(matrix, 1.0)
        return matrix * self.scale**2

    @property
    def margins_m(self) -> FloatArray:
        """Margins over the reference mean, score units, shape (m,). The reference means of the population are 0."""
        return np.full(self.n_constraints, self.margin * self.scale)

    @property
    def lam_star(self) -> FloatArray:
        """The population's multipliers, shape (m,).

        Raises:
            ValueError: a constraint is inactive, for which the closed form does not hold.
        """
        covariance = self.covariance
        lam_m = np.linalg.solve(covariance[1:, 1:], self.beta * self.margins_m - covariance[1:, 0])
        if np.any(lam_m <= 0):
            raise ValueError(f"not all constraints are active: {lam_m}")
        return np.asarray(lam_m, dtype=np.float64)

    def reward(self, lam_m: FloatArray) -> float:
        """E[r] under the tilt by ``lam_m``, shape (m,)."""
        return float(self.covariance[0] @ np.append(1.0, lam_m)) / self.beta

    def scores(self, lam_m: FloatArray) -> FloatArray:
        """E[g] under the tilt by ``lam_m``, shape (m,)."""
        return np.asarray(self.covariance[1:] @ np.append(1.0, lam_m) / self.beta, dtype=np.float64)

    def kl(self, lam_m: FloatArray) -> float:
        """KL from the reference under the tilt by ``lam_m``, nats."""
        direction = np.append(1.0, lam_m)
        return float(direction @ self.covariance @ direction) / (2 * self.beta**2)

    def draw(self, rng: np.random.Generator, *, n_prompts: int, n_responses: int) -> tuple[FloatArray, FloatArray]:
        """Rewards, shape (p, k), and constraint scores, shape (p, k, m)."""
        size = 1 + self.n_constraints
        root = np.linalg.cholesky(self.covariance)
        scores_pki = rng.normal(size=(n_prompts, n_responses, size)) @ root.T
        if self.spread > 0:
            shape = 1 / self.spread**2
            scores_pki *= np.sqrt(rng.gamma(shape, 1 / shape, size=(n_prompts, 1, 1)))
        effects_i = np.append(self.reward_effect, np.full(self.n_constraints, self.score_effect)) * self.scale
        scores_pki += rng.normal(size=(n_prompts, 1, size)) * effects_i
        return scores_pki[:, :, 0], scores_pki[:, :, 1:]


def over_datasets(run: Callable[[int], T], *, entropy: Sequence[int], n_datasets: int, processes: int) -> list[T]:
    """``run`` of the seed of every data set, in order; the seeds follow from ``entropy``."""
    seeds = np.random.SeedSequence(entropy).generate_state(n_datasets).tolist()
    if processes == 1:
        return [run(seed) for seed in seeds]
    with Pool(processes) as pool:
        return pool.map(run, seeds, chunksize=4)
