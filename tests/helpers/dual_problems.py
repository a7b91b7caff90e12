"""Problems for tests of the dual: a table of random ones, and populations with a known answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.contracts.arrays import FloatArray
from stage1_dual.dual import AttainableMeans, DualProblem


def draw_scores(
    *, n_prompts: int, n_responses: int, n_constraints: int, seed: int, conflict: float = 0.45
) -> tuple[FloatArray, FloatArray]:
    """Rewards (p, k) and constraint scores (p, k, m) that conflict with them, with spread between prompts."""
    rng = np.random.default_rng(seed)
    g_pkm = rng.normal(size=(n_prompts, n_responses, n_constraints))
    noise_pk = rng.normal(size=(n_prompts, n_responses))
    r_pk = -conflict * g_pkm.sum(axis=2) / np.sqrt(max(n_constraints, 1)) + np.sqrt(1 - conflict**2) * noise_pk
    r_pk += rng.normal(size=(n_prompts, 1))
    g_pkm += rng.normal(size=(n_prompts, 1, n_constraints))
    return r_pk, g_pkm


def problem_at_depth(r_pk: FloatArray, g_pkm: FloatArray, *, depth: float, beta: float) -> DualProblem:
    """Margins that are the fraction ``depth`` of the largest feasible ones in the direction of the best attainable."""
    loose = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm, axis=(0, 1)), beta=beta)
    attainable = AttainableMeans(loose)
    reference_m = loose.reference_means_m
    margin_m = attainable.best_attainable_m() - reference_m
    largest = attainable.largest_scale(loose.with_thresholds(reference_m + margin_m))
    assert largest is not None
    return loose.with_thresholds(reference_m + depth * largest * margin_m)


def problem_inside(r_pk: FloatArray, g_pkm: FloatArray, *, inside: float, beta: float, seed: int) -> DualProblem:
    """Thresholds ``inside`` standard deviations below what a random policy on the samples attains: always feasible."""
    logits_pk = 2.0 * np.random.default_rng(seed).normal(size=r_pk.shape)
    w_pk = np.exp(logits_pk) / np.exp(logits_pk).sum(axis=1, keepdims=True)
    attained_m = np.einsum("pk,pkm->m", w_pk, g_pkm) / len(r_pk)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=attained_m, beta=beta)
    return problem.with_thresholds(attained_m - inside * problem.score_scale_m)


def two_responses(*, rho: float, a: float, beta: float) -> DualProblem:
    """One prompt, rewards (0, rho), scores (a, -a), threshold 0: lam* = rho / 2a whatever beta."""
    return DualProblem.from_arrays(np.array([[0.0, rho]]), np.array([[a, -a]]), thresholds=0.0, beta=beta)


@dataclass(frozen=True)
class GaussianPopulation:
    """r and g jointly Gaussian given the prompt, with prompt means of g and r.

    Tilting moves the mean of g by (Cov(r, g) + Var(g) lam) / beta, so that for a threshold a margin above the
    reference mean lam* = (margin * beta - Cov(r, g)) / Var(g).
    """

    correlation: float = -0.5
    margin: float = 0.3
    beta: float = 1.0

    @property
    def lam_star(self) -> float:
        return self.margin * self.beta - self.correlation

    @property
    def reward(self) -> float:
        """E[r] under the tilt; the reference mean is 0."""
        return (1.0 + self.lam_star * self.correlation) / self.beta

    @property
    def kl(self) -> float:
        lam = self.lam_star
        return (1.0 + 2 * lam * self.correlation + lam**2) / (2 * self.beta**2)

    def draw(self, rng: np.random.Generator, *, n_prompts: int, n_responses: int) -> tuple[FloatArray, FloatArray]:
        g_pk = rng.normal(size=(n_prompts, n_responses))
        noise_pk = rng.normal(size=(n_prompts, n_responses))
        r_pk = self.correlation * g_pk + np.sqrt(1 - self.correlation**2) * noise_pk
        return r_pk + rng.normal(size=(n_prompts, 1)), g_pk + 0.5 * rng.normal(size=(n_prompts, 1))
