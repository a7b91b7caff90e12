"""The scores of all samples, in partitions of whole prompts, and how a pass over them runs.

Every quantity of the dual is a sum, a maximum or a list over prompts, hence a function of blocks of whole prompts
followed by a reduction in a fixed order. Where the blocks lie (memory, disk) is a :class:`Partition`'s affair, where
the function runs (threads, a cluster) an :class:`Executor`'s; the mathematics sees neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, TypeVar

import numpy as np

from pipeline.contracts.errors import InputError
from stage1_dual.dual.execution import ThreadExecutor
from stage1_dual.dual.segments import FloatArray, IntArray, Segments

T = TypeVar("T")

# Temporaries of a block this long stay in the cache of a core, and the allocator reuses them instead of asking the
# system for fresh pages, which costs more than the arithmetic. Measured: twice as fast as whole arrays.
BLOCK_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """Scores of some whole prompts, relative to a shift of each prompt (its mean over the responses).

    A shift of r within a prompt cancels in the tilted weights, and one of g moves only its slack, so the centring is
    exact mathematics; it is what keeps scores of 1e6 plus or minus 1 as accurate as scores of 0 plus or minus 1.

    Attributes:
        segments: which rows belong to which prompt.
        reward_n: r minus its shift, shape (n,).
        scores_mn: g minus its shift, shape (m, n).
        reward_shift_p: what was subtracted, shape (p,).
        score_shift_mp: what was subtracted, shape (m, p).
    """

    segments: Segments
    reward_n: FloatArray
    scores_mn: FloatArray
    reward_shift_p: FloatArray
    score_shift_mp: FloatArray

    @classmethod
    def from_scores(cls, reward_n: FloatArray, scores_mn: FloatArray, counts_p: IntArray) -> SampleBlock:
        """Centre scores grouped by prompt.

        Raises:
            InputError: the scores of one prompt differ by more than float64 can hold.
        """
        segments = Segments.from_counts(counts_p)
        centred_n, reward_shift_p = _centre(reward_n, segments, "rewards")
        centred_mn, score_shift_mp = _centre(scores_mn, segments, "constraint scores")
        return cls(segments, centred_n, centred_mn, reward_shift_p, score_shift_mp)

    def split(self, block_rows: int) -> Iterator[SampleBlock]:
        """Views of runs of whole prompts of about ``block_rows`` rows; a longer prompt is a block of its own."""
        ends_p = self.segments.starts_p + self.segments.counts_p
        first = 0
        while first < self.segments.n_prompts:
            start = int(self.segments.starts_p[first])
            last = max(first + 1, int(np.searchsorted(ends_p, start + block_rows, side="right")))
            rows, prompts = slice(start, int(ends_p[last - 1])), slice(first, last)
            yield SampleBlock(
                segments=Segments.from_counts(self.segments.counts_p[prompts]),
                reward_n=self.reward_n[rows],
                scores_mn=self.scores_mn[:, rows],
                reward_shift_p=self.reward_shift_p[prompts],
                score_shift_mp=self.score_shift_mp[:, prompts],
            )
            first = last

    def every(self, step: int, offset: int) -> SampleBlock:
        """Every ``step``-th response of each prompt from its ``offset``-th on; shorter prompts are kept whole."""
        counts_p = self.segments.counts_p
        place_n = np.arange(self.segments.n_rows) - np.repeat(self.segments.starts_p, counts_p)
        keep_n = (place_n % step == offset) | np.repeat(counts_p < step, counts_p)
        return SampleBlock(
            segments=Segments.from_counts(np.add.reduceat(keep_n, self.segments.starts_p).astype(np.int64)),
            reward_n=self.reward_n[keep_n],
            scores_mn=np.ascontiguousarray(self.scores_mn[:, keep_n]),
            reward_shift_p=self.reward_shift_p,
            score_shift_mp=self.score_shift_mp,
        )


class Partition(Protocol):
    """Some of the blocks, read one after the other; can be sent to another process."""

    def blocks(self) -> Iterator[SampleBlock]:
        """The blocks in their fixed order."""

    def every(self, step: int, offset: int) -> Partition:
        """The same prompts with every ``step``-th response only; see :meth:`SampleBlock.every`."""


class Executor(Protocol):
    """Runs a function on every partition."""

    def run(self, function: Callable[[Partition], T], partitions: Sequence[Partition]) -> Iterator[T]:
        """Results in the order of ``partitions``; a bounded number of them waits at any time."""


@dataclass(frozen=True, eq=False)
class InMemoryPartition:
    """A block that is there already."""

    block: SampleBlock

    def blocks(self) -> Iterator[SampleBlock]:
        """The one block."""
        yield self.block

    def every(self, step: int, offset: int) -> InMemoryPartition:
        """The same prompts with every ``step``-th response only."""
        return InMemoryPartition(self.block.every(step, offset))


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of the samples of a problem: facts about them, and passes over them.

    Attributes:
        partitions: where the scores are, in the order in which results are combined.
        executor: what runs a pass.
        n_constraints: the number of constraint scores, m.
    """

    partitions: tuple[Partition, ...]
    executor: Executor
    n_constraints: int

    @classmethod
    def in_memory(cls, block: SampleBlock, *, executor: Executor | None = None) -> SampleScores:
        """Scores that fit in memory; by default a pass uses all cores."""
        partitions = tuple(InMemoryPartition(part) for part in block.split(BLOCK_ROWS))
        return cls(partitions, ThreadExecutor() if executor is None else executor, len(block.scores_mn))

    def map(self, function: Callable[[SampleBlock], T]) -> Iterator[T]:
        """``function`` of every block, in order. It must be picklable for executors of several processes."""
        for results in self.executor.run(partial(_map_partition, function), self.partitions):
            yield from results

    def every(self, step: int, offset: int) -> SampleScores:
        """The same prompts with every ``step``-th response only, from the ``offset``-th on.

        Prompts with fewer than ``step`` responses are kept whole, so that every prompt still counts.
        """
        parts = tuple(partition.every(step, offset) for partition in self.partitions)
        return replace(self, partitions=parts)

    @cached_property
    def facts(self) -> SampleFacts:
        """What the scores are like before any tilt; one pass, then kept."""
        return SampleFacts.combine(list(self.map(_describe_block)))

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
    is_constant_m: np.ndarray[tuple[int], np.dtype[np.bool_]]
    score_magnitude_m: FloatArray
    reward_shift: float
    largest_reward: float
    largest_score_m: FloatArray
    score_pivot_m: FloatArray
    score_shift_m: FloatArray

    @classmethod
    def combine(cls, parts: Sequence[_BlockFacts]) -> SampleFacts:
        """From the facts of all blocks."""
        n_prompts = sum(part.n_prompts for part in parts)
        pivot_i = parts[0].pivot_i
        shift_i = sum((part.shift_sum_i + part.n_prompts * (part.pivot_i - pivot_i) for part in parts), 0 * pivot_i)
        mean_shift_i = shift_i / n_prompts
        centred_i = sum((part.mean_sum_i for part in parts), 0 * pivot_i) / n_prompts
        largest_i = np.max([part.largest_i for part in parts], axis=0)
        # Scaled: squares of values below 1e-154 or above 1e154 would leave the range of float64.
        unit_i = np.where(largest_i > 0, largest_i, 1.0)
        ratios = [part.largest_i / unit_i for part in parts]
        variance_i = sum((part.scaled_variance_sum_i * ratio**2 for part, ratio in zip(parts, ratios, strict=True)))
        scale_i = unit_i * np.sqrt(np.maximum(variance_i / n_prompts, 0.0))
        reference_i = pivot_i + mean_shift_i + centred_i
        return cls(
            n_prompts=n_prompts,
            n_samples=sum(part.n_samples for part in parts),
            reference_reward=float(reference_i[0]),
            reference_means_m=reference_i[1:],
            reward_scale=float(scale_i[0]),
            score_scale_m=scale_i[1:],
            is_constant_m=largest_i[1:] == 0.0,
            score_magnitude_m=np.max([part.largest_shift_i for part in parts], axis=0)[1:] + largest_i[1:],
            reward_shift=float(pivot_i[0] + mean_shift_i[0]),
            largest_reward=float(largest_i[0]),
            largest_score_m=largest_i[1:],
            score_pivot_m=pivot_i[1:],
            score_shift_m=mean_shift_i[1:],
        )


@dataclass(frozen=True, eq=False)
class _BlockFacts:
    """Of one block; axis i is the reward, then the m constraint scores."""

    n_prompts: int
    n_samples: int
    pivot_i: FloatArray
    shift_sum_i: FloatArray
    mean_sum_i: FloatArray
    largest_i: FloatArray
    largest_shift_i: FloatArray
    scaled_variance_sum_i: FloatArray


def _describe_block(block: SampleBlock) -> _BlockFacts:
    segments = block.segments
    values_in = [block.reward_n, *block.scores_mn]
    shift_ip = np.vstack([block.reward_shift_p, block.score_shift_mp])
    pivot_i = shift_ip[:, 0].copy()
    largest_i = np.array([np.max(np.abs(values_n)) for values_n in values_in])
    unit_i = np.where(largest_i > 0, largest_i, 1.0)
    variance_sum_i = np.empty(len(values_in))
    mean_sum_i = np.empty(len(values_in))
    for i, (values_n, unit) in enumerate(zip(values_in, unit_i, strict=True)):
        scaled_n = values_n / unit
        mean_p = segments.mean(scaled_n)
        variance_sum_i[i] = np.sum(segments.mean(scaled_n * scaled_n) - mean_p**2)
        mean_sum_i[i] = np.sum(mean_p) * unit
    return _BlockFacts(
        n_prompts=segments.n_prompts,
        n_samples=segments.n_rows,
        pivot_i=pivot_i,
        shift_sum_i=np.sum(shift_ip - pivot_i[:, np.newaxis], axis=1),
        mean_sum_i=mean_sum_i,
        largest_i=largest_i,
        largest_shift_i=np.max(np.abs(shift_ip), axis=1),
        scaled_variance_sum_i=variance_sum_i,
    )


def _map_partition(function: Callable[[SampleBlock], T], partition: Partition) -> list[T]:
    return [function(block) for block in partition.blocks()]


def _block_counts(block: SampleBlock) -> IntArray:
    return block.segments.counts_p


def _centre(values: FloatArray, segments: Segments, what: str) -> tuple[FloatArray, FloatArray]:
    """Subtract each prompt's mean; (..., n) to the centred values and the shifts (..., p)."""
    low, high = segments.min(values), segments.max(values)
    # Near the largest float64 the sum inside a mean overflows; any value between low and high serves as a shift.
    with np.errstate(over="ignore", invalid="ignore"):
        shift = np.clip(np.nan_to_num(segments.mean(values)), low, high)
        # A rounded mean of equal values may differ from them; constants must centre to exactly zero.
        shift = np.where(low == high, low, shift)
        centred = segments.subtract(values, shift)
    if not bool(np.all(np.isfinite(centred))):
        raise InputError(f"the {what} of one prompt differ by more than float64 can hold; rescale them")
    return centred, shift
