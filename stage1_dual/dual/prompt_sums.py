"""Sums by prompt at lam*, and the units that are drawn with replacement.

What an interval is made of, in one pass over the samples: the tilted means of each prompt and their derivatives,
thrown together into at most 20,000 units. Nothing here is an interval: how intervals follow from these sums is in
:mod:`stage1_dual.dual.inference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_dual.dual.arguments import validate_relative
from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray, IntArray, Segments
from stage1_dual.dual.tilting import weigh_and_tilt_block

# At most this many multinomial counts are in memory at a time.
_COUNTS_AT_ONCE = 4_000_000
# Beyond this many prompts, groups of them are drawn instead of single ones: groups of independent units are
# independent units, and this many leave nothing to be seen of their being groups.
_MOST_UNITS = 20_000


@dataclass(frozen=True, eq=False)
class PromptSums:
    """Values by prompt at lam* and their first two derivatives with respect to lam, on which every interval rests.

    A field's first axis is that of the prompts, or of what stands in their place: units, replicates. With weights w
    proportional to exp(s / beta), s = r + <lam, g>, derivatives of tilted means are joint cumulants:
    d E[f] = Cov(f, g) / beta and d^2 E[f] = K3(f, g, g) / beta^2. The KL is E[s] / beta - log Z, so that
    d KL = Cov(s, g) / beta^2 and d^2 KL = Cov(g, g) / beta^2 + K3(s, g, g) / beta^3.

    Attributes:
        reward_p: tilted mean of the reward, reward units, shape (p,).
        scores_pm: tilted means of the constraint scores, score units, shape (p, m).
        kl_p: KL from the reference policy, nats, shape (p,).
        psi_pm: tilted means minus the thresholds, and minus the prompt's share of the reference mean's error where
            the threshold is a margin over that mean, score units, shape (p, m).
        reach_pm: ``psi_pm`` of the best response to the prompt for each constraint alone, score units, shape (p, m).
        depth_pe: ``psi_pm`` of the worst response to the prompt for each equality alone, score units, shape (p, e).
        reward_slope_pm: d reward / d lam, shape (p, m).
        scores_slope_pmm: d scores / d lam, shape (p, m, m): the Hessian of the dual is its mean.
        kl_slope_pm: d KL / d lam, shape (p, m).
        reward_bend_pmm: second derivative of the reward, shape (p, m, m).
        scores_bend_pmmm: second derivative of the scores, shape (p, m, m, m).
        kl_bend_pmm: second derivative of the KL, shape (p, m, m).
        reward_cumulants_pc: of problems with a KL budget, whose beta moves too, what beta's derivatives need besides:
            Var(r), K3(r, r, r), K3(r, r, g_j), under the tilted policy, shape (p, 2 + m); of others shape (p, 0).
    """

    reward_p: FloatArray
    scores_pm: FloatArray
    kl_p: FloatArray
    psi_pm: FloatArray
    reach_pm: FloatArray
    depth_pe: FloatArray
    reward_slope_pm: FloatArray
    scores_slope_pmm: FloatArray
    kl_slope_pm: FloatArray
    reward_bend_pmm: FloatArray
    scores_bend_pmmm: FloatArray
    kl_bend_pmm: FloatArray
    reward_cumulants_pc: FloatArray


@dataclass(frozen=True, eq=False)
class PromptUnits:
    """What is drawn with replacement: prompts, or where they are very many, groups of them thrown together at random.

    Attributes:
        sums_uv: sums over the prompts of each unit of all fields of :class:`PromptSums`, less ``pivot_v`` a prompt,
            one field after the other, shape (u, v).
        sizes_u: the number of prompts in each unit, shape (u,).
        pivot_v: values near the means, shape (v,): means of large offsets would lose digits.
        shapes: shapes of the fields without their first axis, in the order of the fields.
    """

    sums_uv: FloatArray
    sizes_u: IntArray
    pivot_v: FloatArray
    shapes: tuple[tuple[int, ...], ...]

    @property
    def mean_v(self) -> FloatArray:
        """Means over all prompts of all fields, less ``pivot_v``, shape (v,)."""
        return np.asarray(np.sum(self.sums_uv, axis=0) / np.sum(self.sizes_u), dtype=np.float64)

    def means(self) -> PromptSums:
        """Means over all prompts, with a first axis of length 1 in place of that of the prompts."""
        return self._fields((self.mean_v + self.pivot_v)[np.newaxis])

    def deviations(self) -> PromptSums:
        """Sums over each unit of what its prompts differ from the means by: units in place of prompts."""
        return self._fields(self.sums_uv - self.sizes_u[:, np.newaxis] * self.mean_v)

    def replicate_means(self, rng: np.random.Generator, n_replicates: int) -> PromptSums:
        """Means over as many units as there are, drawn with replacement: replicates in place of prompts."""
        n_units = len(self.sizes_u)
        means_bv = np.empty((n_replicates, len(self.pivot_v)))
        at_once = max(1, _COUNTS_AT_ONCE // n_units)
        for first in range(0, n_replicates, at_once):
            size = min(at_once, n_replicates - first)
            counts_bu = rng.multinomial(n_units, np.full(n_units, 1.0 / n_units), size=size)
            sizes_b1 = (counts_bu @ self.sizes_u)[:, np.newaxis]
            means_bv[first : first + size] = counts_bu @ self.sums_uv / sizes_b1
        return self._fields(means_bv + self.pivot_v)

    def standard_error(self, deviation_u: FloatArray) -> FloatArray:
        """The standard error of a mean over prompts from its units' deviations, shape (u, ...) to (...).

        Units are independent, prompts within one are not told apart: the cluster-robust variance with its factor
        u / (u - 1).
        """
        n_units = len(self.sizes_u)
        square = np.sum(deviation_u**2, axis=0) * n_units / (n_units - 1)
        return np.asarray(np.sqrt(square) / np.sum(self.sizes_u), dtype=np.float64)

    def _fields(self, values_xv: FloatArray) -> PromptSums:
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = zip(np.split(values_xv, ends[:-1], axis=1), self.shapes, strict=True)
        return PromptSums(*(part_xv.reshape(len(values_xv), *shape) for part_xv, shape in parts))


def gather_units(problem: DualProblem, solution: DualSolution, relative: ArrayLike | None) -> PromptUnits:
    """The units of a problem at its solution, in one pass over the samples.

    Up to 20,000 prompts are units of their own. More are thrown together at random into 20,000, always into the same.

    Args:
        problem: the problem solved.
        solution: its solution.
        relative: shape (m,), true where the threshold is a margin over the reference mean; None where none is.

    Raises:
        InputError: ``relative`` is not m booleans.
    """
    relative_m = validate_relative(relative, problem.n_constraints)
    function = partial(
        _block_sums,
        lam_m=solution.multipliers,
        beta=solution.beta,
        thresholds_m=problem.thresholds_m,
        is_equality_m=problem.is_equality_m,
        reference_m=np.where(relative_m, problem.reference_means_m, np.nan),
        is_beta_fixed=problem.kl_budget is None,
    )
    n_units = min(problem.n_prompts, _MOST_UNITS)
    unit_p = np.arange(problem.n_prompts)
    if n_units < problem.n_prompts:
        # Thrown together at random: neighbours may be alike. Which ones meet does not matter: a fixed seed does.
        unit_p = np.random.default_rng(0).permutation(problem.n_prompts) % n_units
    done = 0
    sums_uv = pivot_v = np.zeros(0)
    shapes: tuple[tuple[int, ...], ...] = ()
    for part in problem.samples.map(function):
        fields = list(vars(part).values())
        n_prompts = len(part.reward_p)
        values_pv = np.column_stack([field.reshape(n_prompts, -1) for field in fields if field.size])
        if done == 0:
            shapes = tuple(field.shape[1:] for field in fields)
            pivot_v = np.mean(values_pv, axis=0)
            sums_uv = np.zeros((n_units, len(pivot_v)))
        np.add.at(sums_uv, unit_p[done : done + n_prompts], values_pv - pivot_v)
        done += n_prompts
    return PromptUnits(sums_uv, np.bincount(unit_p, minlength=n_units), pivot_v, shapes)


def _block_sums(
    block: SampleBlock,
    *,
    lam_m: FloatArray,
    beta: float,
    thresholds_m: FloatArray,
    is_equality_m: NDArray[np.bool_],
    reference_m: FloatArray,
    is_beta_fixed: bool,
) -> PromptSums:
    """The sums of one block's prompts; ``reference_m`` is NaN where the threshold is absolute."""
    segments, n_constraints = block.segments, len(block.scores_mn)
    weights_n, tilted = weigh_and_tilt_block(block, lam_m=lam_m, beta=beta, thresholds_m=thresholds_m)
    with np.errstate(under="ignore"):
        deviation_mn = segments.subtract(block.scores_mn, tilted.scores_mp - block.score_shift_mp)
        weighted_mn = deviation_mn * weights_n
        reward_deviation_n = segments.subtract(block.reward_n, tilted.reward_p - block.reward_shift_p)
        reward_slope_mp = segments.sum(weighted_mn * reward_deviation_n) / beta
        scores_slope_mmp = _seconds(segments, weighted_mn, deviation_mn) / beta
        reward_bend_mmp = _seconds(segments, weighted_mn * reward_deviation_n, deviation_mn) / beta**2
        scores_bend_mmmp = np.empty((n_constraints, n_constraints, n_constraints, segments.n_prompts))
        for row_n, bend_mmp in zip(deviation_mn, scores_bend_mmmp, strict=True):
            bend_mmp[:] = _seconds(segments, weighted_mn * row_n, deviation_mn) / beta**2
        cumulants_cp = np.empty((0, segments.n_prompts))
        if not is_beta_fixed:
            squared_n = weights_n * reward_deviation_n**2
            powers_cn = np.vstack([np.ones_like(squared_n), reward_deviation_n, deviation_mn])
            cumulants_cp = segments.sum(powers_cn * squared_n)
    reference_error_mp = np.nan_to_num(block.reference_means_mp - reference_m[:, np.newaxis], nan=0.0)
    lowest_ep = -segments.max(-block.scores_mn[is_equality_m])
    depth_ep = lowest_ep + (block.score_shift_mp - thresholds_m[:, np.newaxis] - reference_error_mp)[is_equality_m]
    kl_slope_mp = (reward_slope_mp + np.einsum("i,ijp->jp", lam_m, scores_slope_mmp)) / beta
    kl_bend_mmp = (scores_slope_mmp + reward_bend_mmp + np.einsum("i,ijkp->jkp", lam_m, scores_bend_mmmp)) / beta
    return PromptSums(
        reward_p=tilted.reward_p,
        scores_pm=tilted.scores_mp.T,
        kl_p=tilted.kl_p,
        psi_pm=(tilted.slack_mp - reference_error_mp).T,
        reach_pm=(
            segments.max(block.scores_mn) + block.score_shift_mp - thresholds_m[:, np.newaxis] - reference_error_mp
        ).T,
        depth_pe=depth_ep.T,
        reward_slope_pm=reward_slope_mp.T,
        scores_slope_pmm=np.moveaxis(scores_slope_mmp, -1, 0),
        kl_slope_pm=kl_slope_mp.T,
        reward_bend_pmm=np.moveaxis(reward_bend_mmp, -1, 0),
        scores_bend_pmmm=np.moveaxis(scores_bend_mmmp, -1, 0),
        kl_bend_pmm=np.moveaxis(kl_bend_mmp, -1, 0),
        reward_cumulants_pc=cumulants_cp.T,
    )


def _seconds(segments: Segments, weighted_in: FloatArray, deviation_jn: FloatArray) -> FloatArray:
    """Sums within prompts of products, (i, n) and (j, n) to (i, j, p)."""
    products_ijp = np.empty((len(weighted_in), len(deviation_jn), segments.n_prompts))
    for row_n, products_jp in zip(weighted_in, products_ijp, strict=True):
        products_jp[:] = segments.sum(deviation_jn * row_n)
    return products_ijp
