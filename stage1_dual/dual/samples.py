"""The scores of all samples, in partitions of whole prompts, and how a pass over them runs.

Every quantity of the dual is a sum, a maximum or a list over prompts, hence a function of blocks of whole prompts
followed by a reduction in a fixed order. Where the blocks lie (memory, disk) is a :class:`Partition`'s affair, where
the function runs (threads, a cluster) a :class:`PassRunner`'s; the mathematics sees neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np

from stage1_dual.dual.blocks import BlockFacts, BlockMoments, SampleBlock
from stage1_dual.dual.segments import FloatArray, IntArray
from stage1_dual.dual.threads import ThreadExecutor

T = TypeVar("T")

# What a thread does at a time. Measured on 2 cores.
PARTITION_ROWS = 131_072

# A sketch holds at most one in so many prompts.
_SMALL_SHARE = 4


class Partition(Protocol):
    """Some of the blocks, read one after the other; can be sent to another process."""

    @property
    def n_prompts(self) -> int:
        """The number of prompts it holds."""

    def blocks(self) -> Iterator[SampleBlock]:
        """The blocks in their fixed order."""

    def every(self, step: int, offset: int) -> Partition:
        """The same prompts with every ``step``-th response only; see :meth:`SampleBlock.every`."""


class PassRunner(Protocol):
    """Runs a function on every partition."""

    def run(self, function: Callable[[Partition], T], partitions: Sequence[Partition]) -> Iterator[T]:
        """Results in the order of ``partitions``; a bounded number of them waits at any time."""


@dataclass(frozen=True, eq=False)
class InMemoryPartition:
    """One block that is there already."""

    block: SampleBlock

    @property
    def n_prompts(self) -> int:
        """The number of prompts it holds."""
        return self.block.segments.n_prompts

    def blocks(self) -> Iterator[SampleBlock]:
        """The one block there is."""
        yield self.block

    def every(self, step: int, offset: int) -> InMemoryPartition:
        """The same prompts with every ``step``-th response only."""
        return InMemoryPartition(self.block.every(step, offset))


@dataclass(frozen=True, eq=False)
class DerivedPartition:
    """A partition whose blocks are made from those of another whenever they are read."""

    source: Partition
    function: Callable[[SampleBlock], SampleBlock]

    @property
    def n_prompts(self) -> int:
        """The number of prompts it holds."""
        return self.source.n_prompts

    def blocks(self) -> Iterator[SampleBlock]:
        """The blocks of the source, made into others."""
        yield from map(self.function, self.source.blocks())

    def every(self, step: int, offset: int) -> DerivedPartition:
        """The same prompts with every ``step``-th response only."""
        return DerivedPartition(self.source, _Thinned(self.function, step, offset))


@dataclass(frozen=True)
class _Thinned:
    """Makes a block, then keeps every ``step``-th response of it."""

    function: Callable[[SampleBlock], SampleBlock]
    step: int
    offset: int

    def __call__(self, block: SampleBlock) -> SampleBlock:
        return self.function(block).every(self.step, self.offset)


def _derive(partition: Partition, function: Callable[[SampleBlock], SampleBlock]) -> Partition:
    if isinstance(partition, InMemoryPartition):
        return InMemoryPartition(function(partition.block))
    return DerivedPartition(partition, function)


@dataclass(frozen=True, eq=False)
class _RawBlock:
    """Scores as the caller gave them, and where the centred ones go."""

    reward_n: FloatArray
    scores_nm: FloatArray
    counts_p: IntArray
    out: FloatArray


def _build_partition(raw: _RawBlock) -> InMemoryPartition:
    return InMemoryPartition(SampleBlock.from_scores(raw.reward_n, raw.scores_nm, raw.counts_p, out=raw.out))


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of the samples of a problem: facts about them, and passes over them.

    Attributes:
        partitions: where the scores are, in the order in which results are combined.
        executor: what runs a pass.
        n_constraints: the number of constraint scores, m.
    """

    partitions: tuple[Partition, ...]
    executor: PassRunner
    n_constraints: int

    def __repr__(self) -> str:
        """Sizes only: what the scores are like is :attr:`facts`."""
        n_prompts = sum(partition.n_prompts for partition in self.partitions)
        return f"SampleScores({n_prompts:,} prompts, {self.n_constraints} constraints, {len(self.partitions):,} parts)"

    @classmethod
    def in_memory(
        cls, reward_n: FloatArray, scores_nm: FloatArray, counts_p: IntArray, *, executor: PassRunner | None = None
    ) -> SampleScores:
        """Scores that fit in memory; they are copied. By default a pass uses all cores.

        Args:
            reward_n: rewards, grouped by prompt, reward units, shape (n,).
            scores_nm: constraint scores of the same rows, score units, higher better, shape (n, m).
            counts_p: responses of each prompt, shape (p,).
            executor: runs the passes.

        Raises:
            InputError: a value is not finite, or the scores of one prompt differ by more than float64 can hold.
        """
        ends_p = np.cumsum(counts_p)
        # One array for all: a large one comes in huge pages, and faulting in small ones costs more than centring.
        centred_in = np.empty((1 + scores_nm.shape[1], len(reward_n)))
        # Cut where whole prompts fill a partition; a longer prompt is one of its own.
        cuts = np.flatnonzero(np.diff((ends_p - counts_p) // PARTITION_ROWS)) + 1
        raw: list[_RawBlock] = []
        for first, last in zip([0, *cuts], [*cuts, len(counts_p)], strict=True):
            rows = slice(ends_p[first] - counts_p[first], ends_p[last - 1])
            raw.append(_RawBlock(reward_n[rows], scores_nm[rows], counts_p[first:last], centred_in[:, rows]))
        build = ThreadExecutor().run(_build_partition, raw)
        return cls(tuple(build), ThreadExecutor() if executor is None else executor, scores_nm.shape[1])

    def map(self, function: Callable[[SampleBlock], T]) -> Iterator[T]:
        """``function`` of every block, in order. It must be picklable for executors of several processes."""
        for results in self.executor.run(partial(_map_partition, function), self.partitions):
            yield from results

    def derive(self, function: Callable[[SampleBlock], SampleBlock]) -> SampleScores:
        """Other scores of the same responses, made block by block; of scores in memory once, of others in every pass.

        Args:
            function: from a block to one of the same prompts and responses; picklable for executors of several
                processes.
        """
        return replace(self, partitions=tuple(_derive(partition, function) for partition in self.partitions))

    def every(self, step: int, offset: int) -> SampleScores:
        """The same prompts with every ``step``-th response only, from the ``offset``-th on.

        Prompts with fewer than ``step`` responses are kept whole, so that every prompt still counts.
        """
        parts = tuple(partition.every(step, offset) for partition in self.partitions)
        return replace(self, partitions=parts)

    def sketch(self, n_prompts: int) -> SampleScores | None:
        """The first ``n_prompts`` prompts, in memory; None where that is no small share of all."""
        if n_prompts * _SMALL_SHARE > self.facts.n_prompts:
            return None
        parts: list[InMemoryPartition] = []
        wanted = n_prompts
        for block in chain.from_iterable(partition.blocks() for partition in self.partitions):
            part = block.run(0, min(wanted, block.segments.n_prompts))
            parts.append(InMemoryPartition(part))
            wanted -= part.segments.n_prompts
            if wanted == 0:
                break
        return SampleScores(tuple(parts), ThreadExecutor(), self.n_constraints)

    @cached_property
    def facts(self) -> SampleFacts:
        """What the scores are like before any tilt; one pass, then kept."""
        parts = list(self.map(_block_facts))
        with np.errstate(under="ignore"):
            return SampleFacts.combine(parts)

    def reference_means_mp(self) -> FloatArray:
        """E_{pi_ref}[g] of each prompt, score units, shape (m, p); one pass."""
        return np.concatenate(list(self.map(_block_reference_means)), axis=1)

    @cached_property
    def counts_p(self) -> IntArray:
        """Responses of each prompt, shape (p,)."""
        return np.concatenate(list(self.map(_block_counts)))


@dataclass(frozen=True, eq=False)
class SampleFacts:
    """Facts about the scores that depend on neither thresholds nor beta.

    Attributes:
        n_prompts: the number of prompts.
        n_samples: the number of responses over all prompts.
        reference_reward: E_x E_{pi_ref}[r], reward units.
        reference_means_m: E_x E_{pi_ref}[g_j], score units, shape (m,). A threshold is a margin plus this.
        reward_scale: standard deviation of the reward within prompts, sqrt(E_x Var_{pi_ref}[r]), reward units.
        score_scale_m: s_j, that of g_j: sqrt(E_x Var_{pi_ref}[g_j]), score units, shape (m,). The spread between
            prompts is left out on purpose: no multiplier can move it, and it would make the dimensionless KKT
            residual lax. Zero exactly where ``is_constant_m``.
        correlation_ii: correlation within prompts of the reward, then the m scores, under pi_ref, from the covariances
            E_x Cov_{pi_ref}, shape (1 + m, 1 + m); zero with what is constant.
        is_constant_m: constraints whose score is the same for all responses of each prompt, shape (m,): no policy
            changes them.
        score_magnitude_m: largest |g_j|, score units, shape (m,): the scale of rounding in the data.
        reward_shift: mean over prompts of the rewards' shifts, reward units.
        largest_reward: largest |r - shift|, reward units.
        largest_score_m: largest |g_j - shift|, score units, shape (m,).
        score_pivot_m: some value near the scores' shifts, score units, shape (m,).
        score_shift_m: mean over prompts of the shifts relative to ``score_pivot_m``: the difference is taken prompt
            by prompt, so that it is exact when scores carry a large common offset.
    """

    n_prompts: int
    n_samples: int
    reference_reward: float
    reference_means_m: FloatArray
    reward_scale: float
    score_scale_m: FloatArray
    correlation_ii: FloatArray
    is_constant_m: np.ndarray[tuple[int], np.dtype[np.bool_]]
    score_magnitude_m: FloatArray
    reward_shift: float
    largest_reward: float
    largest_score_m: FloatArray
    score_pivot_m: FloatArray
    score_shift_m: FloatArray

    def largest_exponent(self, lam_m: FloatArray, beta: float) -> float:
        """Bound on |(r + <lam, g>) / beta|, of centred scores, nats."""
        with np.errstate(over="ignore"):
            return float((self.largest_reward + np.abs(lam_m) @ self.largest_score_m) / beta)

    @classmethod
    def combine(cls, parts: Sequence[BlockFacts]) -> SampleFacts:
        """The facts about all samples from those of their blocks, in order."""
        n_prompts = sum(part.n_prompts for part in parts)
        moments = BlockMoments.combine([part.moments for part in parts])
        largest_i = moments.largest_i
        pivot_i = parts[0].pivot_i
        shift_i = sum((part.shift_sum_i + part.n_prompts * (part.pivot_i - pivot_i) for part in parts), 0 * pivot_i)
        mean_shift_i, centred_i = shift_i / n_prompts, moments.mean_sum_i / n_prompts
        spread_i = np.sqrt(np.maximum(np.diagonal(moments.covariance_sum_ii), 0.0))
        scale_i = moments.unit_i * (spread_i / math.sqrt(n_prompts))
        divisor_i = np.where(spread_i > 0, spread_i, np.inf)
        reference_i = pivot_i + mean_shift_i + centred_i
        return cls(
            n_prompts=n_prompts,
            n_samples=sum(part.n_samples for part in parts),
            reference_reward=float(reference_i[0]),
            reference_means_m=reference_i[1:],
            reward_scale=float(scale_i[0]),
            score_scale_m=scale_i[1:],
            correlation_ii=moments.covariance_sum_ii / np.outer(divisor_i, divisor_i),
            is_constant_m=largest_i[1:] == 0.0,
            score_magnitude_m=reduce(np.maximum, [part.largest_shift_i for part in parts])[1:] + largest_i[1:],
            reward_shift=float(pivot_i[0] + mean_shift_i[0]),
            largest_reward=float(largest_i[0]),
            largest_score_m=largest_i[1:],
            score_pivot_m=pivot_i[1:],
            score_shift_m=mean_shift_i[1:],
        )


def _block_facts(block: SampleBlock) -> BlockFacts:
    with np.errstate(under="ignore"):
        return block.facts


def _map_partition(function: Callable[[SampleBlock], T], partition: Partition) -> list[T]:
    return [function(block) for block in partition.blocks()]


def _block_counts(block: SampleBlock) -> IntArray:
    # A copy: a view would keep the whole partition it was read with.
    return block.segments.counts_p.copy()


def _block_reference_means(block: SampleBlock) -> FloatArray:
    return block.reference_means_mp
