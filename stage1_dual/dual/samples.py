"""The scores of all samples, in partitions of whole prompts, and how a pass over them runs.

Every quantity of the dual is a sum, a maximum or a list over prompts, hence a function of blocks of whole prompts
followed by a reduction in a fixed order. Where the blocks lie (memory, disk) is a :class:`Partition`'s affair, where
the function runs (threads, a cluster) an :class:`Executor`'s; the mathematics sees neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np

from pipeline.contracts.errors import InputError
from stage1_dual.dual.execution import ThreadExecutor
from stage1_dual.dual.segments import FloatArray, IntArray, Segments

T = TypeVar("T")

# What a thread does at a time, in one block: each call of NumPy is long enough for threads not to stand in each
# other's way. Measured on 2 cores.
PARTITION_ROWS = 131_072
# A thread that works alone is quicker with blocks whose temporaries stay in its core's cache.
BLOCK_ROWS = 32_768


# A sketch holds at most one in so many prompts.
_SMALL_SHARE = 4

# Between these a square and a sum of squares stay within float64.
_SMALLEST_SQUARED, _LARGEST_SQUARED = 1e-100, 1e100


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """Scores of some whole prompts, relative to a shift of each prompt (its mean over the responses).

    A shift of r within a prompt cancels in the tilted weights, and one of g moves only its slack, so the centring is
    exact mathematics; it is what keeps scores of 1e6 plus or minus 1 as accurate as scores of 0 plus or minus 1.

    Attributes:
        segments: which rows belong to which prompt.
        values_in: r minus its shift, then the m scores g minus theirs, shape (1 + m, n).
        shift_ip: what was subtracted, shape (1 + m, p).
    """

    segments: Segments
    values_in: FloatArray
    shift_ip: FloatArray

    @cached_property
    def facts(self) -> BlockFacts:
        """What the scores are like before any tilt."""
        segments = self.segments
        pivot_i = self.shift_ip[:, 0].copy()
        largest_i = np.maximum(self.values_in.max(axis=1), -self.values_in.min(axis=1))
        # Squares of values below 1e-154 or above 1e154 would leave the range of float64.
        is_square_safe_i = (largest_i > _SMALLEST_SQUARED) & (largest_i < _LARGEST_SQUARED) | (largest_i == 0)
        unit_i = np.where(is_square_safe_i, 1.0, largest_i)
        scaled_in = self.values_in
        if not bool(np.all(is_square_safe_i)):
            scaled_in = scaled_in / unit_i[:, np.newaxis]
        mean_ip = segments.mean(scaled_in)
        covariance_ii = -mean_ip @ mean_ip.T
        share_p = 1.0 / segments.counts_p
        for i, scaled_n in enumerate(scaled_in):
            covariance_ii[i, : i + 1] += segments.dot(scaled_in[: i + 1], scaled_n) @ share_p
            covariance_ii[:i, i] = covariance_ii[i, :i]
        relative_i = unit_i / np.where(largest_i > 0, largest_i, 1.0)
        return BlockFacts(
            n_prompts=segments.n_prompts,
            n_samples=segments.n_rows,
            pivot_i=pivot_i,
            shift_sum_i=np.sum(self.shift_ip - pivot_i[:, np.newaxis], axis=1),
            mean_sum_i=np.sum(mean_ip, axis=1) * unit_i,
            largest_i=largest_i,
            largest_shift_i=np.max(np.abs(self.shift_ip), axis=1),
            scaled_covariance_sum_ii=covariance_ii * np.outer(relative_i, relative_i),
        )

    @property
    def reward_n(self) -> FloatArray:
        """R minus its shift, reward units, shape (n,)."""
        reward_n: FloatArray = self.values_in[0]
        return reward_n

    @property
    def scores_mn(self) -> FloatArray:
        """G minus its shift, score units, shape (m, n)."""
        return self.values_in[1:]

    @property
    def reward_shift_p(self) -> FloatArray:
        """Shift of the rewards, reward units, shape (p,)."""
        shift_p: FloatArray = self.shift_ip[0]
        return shift_p

    @property
    def score_shift_mp(self) -> FloatArray:
        """Shift of the scores, score units, shape (m, p)."""
        return self.shift_ip[1:]

    @classmethod
    def from_scores(
        cls, reward_n: FloatArray, scores_nm: FloatArray, counts_p: IntArray, *, out: FloatArray
    ) -> SampleBlock:
        """Centre rewards, shape (n,), and scores, shape (n, m), grouped by prompt, into ``out``, shape (1 + m, n).

        Raises:
            InputError: a value is not finite, or the scores of one prompt differ by more than float64 can hold.
        """
        segments = Segments.from_counts(counts_p)
        shift_ip = np.empty((len(out), segments.n_prompts))
        block = cls(segments, out, shift_ip)
        # Near the largest float64 a mean may overflow; any value of the prompt serves as a shift.
        with np.errstate(over="ignore", invalid="ignore"):
            for values_n, centred_n, shift_p in zip((reward_n, *scores_nm.T), out, shift_ip, strict=True):
                # Relative to one of the prompt's own values: equal values then centre to exactly zero.
                first_p = values_n[segments.starts_p]
                segments.subtract(values_n, first_p, out=centred_n)
                mean_p = segments.mean(centred_n)
                mean_p[~np.isfinite(mean_p)] = 0.0
                shift_p[:] = first_p + mean_p
                # Not ``mean_p``: what is left must be relative to the shift as rounded.
                segments.subtract(centred_n, shift_p - first_p, out=centred_n)
            # Facts are asked for here because the scores are in the cache.
            if not bool(np.all(np.isfinite(block.facts.largest_i))):
                raise InputError("the scores of one prompt differ by more than float64 can hold; rescale them")
        return block

    def split(self, block_rows: int) -> Iterator[SampleBlock]:
        """Views of runs of whole prompts of about ``block_rows`` rows; a longer prompt is a block of its own."""
        ends_p = self.segments.starts_p + self.segments.counts_p
        first = 0
        while first < self.segments.n_prompts:
            start = int(self.segments.starts_p[first])
            last = max(first + 1, int(np.searchsorted(ends_p, start + block_rows, side="right")))
            yield self.run(first, last)
            first = last

    def run(self, first: int, last: int) -> SampleBlock:
        """A view of the prompts from ``first`` to before ``last``."""
        starts_p, counts_p = self.segments.starts_p, self.segments.counts_p
        rows = slice(int(starts_p[first]), int(starts_p[last - 1] + counts_p[last - 1]))
        return SampleBlock(
            segments=Segments.from_counts(counts_p[first:last]),
            values_in=self.values_in[:, rows],
            shift_ip=self.shift_ip[:, first:last],
        )

    def every(self, step: int, offset: int) -> SampleBlock:
        """Every ``step``-th response of each prompt from its ``offset``-th on; shorter prompts are kept whole."""
        counts_p = self.segments.counts_p
        place_n = np.arange(self.segments.n_rows) - np.repeat(self.segments.starts_p, counts_p)
        keep_n = (place_n % step == offset) | np.repeat(counts_p < step, counts_p)
        return SampleBlock(
            segments=Segments.from_counts(np.add.reduceat(keep_n, self.segments.starts_p).astype(np.int64)),
            values_in=np.ascontiguousarray(self.values_in[:, keep_n]),
            shift_ip=self.shift_ip,
        )


class Partition(Protocol):
    """Some of the blocks, read one after the other; can be sent to another process."""

    @property
    def n_prompts(self) -> int:
        """Prompts in it."""

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
    """Blocks that are there already."""

    in_memory: tuple[SampleBlock, ...]

    @property
    def n_prompts(self) -> int:
        """Prompts in it."""
        return sum(block.segments.n_prompts for block in self.in_memory)

    def blocks(self) -> Iterator[SampleBlock]:
        """The blocks."""
        yield from self.in_memory

    def every(self, step: int, offset: int) -> InMemoryPartition:
        """The same prompts with every ``step``-th response only."""
        return InMemoryPartition(tuple(block.every(step, offset) for block in self.in_memory))


@dataclass(frozen=True, eq=False)
class _RawBlock:
    """Scores as the caller gave them, and where the centred ones go."""

    reward_n: FloatArray
    scores_nm: FloatArray
    counts_p: IntArray
    out: FloatArray


def _build_partition(raw: Sequence[_RawBlock]) -> InMemoryPartition:
    return InMemoryPartition(
        tuple(SampleBlock.from_scores(part.reward_n, part.scores_nm, part.counts_p, out=part.out) for part in raw)
    )


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
    def in_memory(
        cls, reward_n: FloatArray, scores_nm: FloatArray, counts_p: IntArray, *, executor: Executor | None = None
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
        # Cut where whole prompts fill a block or a partition; a longer prompt is one of its own.
        block_rows = PARTITION_ROWS if len(reward_n) > PARTITION_ROWS else BLOCK_ROWS
        partition_of_p, block_of_p = ((ends_p - counts_p) // rows for rows in (PARTITION_ROWS, block_rows))
        firsts = np.flatnonzero(np.diff(partition_of_p, prepend=-1) | np.diff(block_of_p, prepend=-1))
        raw: dict[int, list[_RawBlock]] = {}
        for first, last in zip(firsts, np.append(firsts[1:], len(counts_p)), strict=True):
            rows = slice(ends_p[first] - counts_p[first], ends_p[last - 1])
            block = _RawBlock(reward_n[rows], scores_nm[rows], counts_p[first:last], centred_in[:, rows])
            raw.setdefault(int(partition_of_p[first]), []).append(block)
        build = ThreadExecutor().run(_build_partition, list(raw.values()))
        return cls(tuple(build), ThreadExecutor() if executor is None else executor, scores_nm.shape[1])

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

    def sketch(self, n_prompts: int) -> SampleScores | None:
        """The first ``n_prompts`` prompts, in memory; None where that is no small share of all."""
        if n_prompts * _SMALL_SHARE > self.facts.n_prompts:
            return None
        parts: list[InMemoryPartition] = []
        wanted = n_prompts
        for block in chain.from_iterable(partition.blocks() for partition in self.partitions):
            part = block.run(0, min(wanted, block.segments.n_prompts))
            parts.append(InMemoryPartition((part,)))
            wanted -= part.segments.n_prompts
            if wanted == 0:
                break
        return SampleScores(tuple(parts), ThreadExecutor(), self.n_constraints)

    @cached_property
    def facts(self) -> SampleFacts:
        """What the scores are like before any tilt; one pass, then kept."""
        return SampleFacts.combine(list(self.map(_block_facts)))

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
        covariance_ii = (
            sum(
                part.scaled_covariance_sum_ii * np.outer(ratio_i, ratio_i)
                for part, ratio_i in zip(parts, ratios, strict=True)
            )
            / n_prompts
        )
        spread_i = np.sqrt(np.maximum(np.diag(covariance_ii), 0.0))
        scale_i = unit_i * spread_i
        spread_ii = np.outer(spread_i, spread_i)
        reference_i = pivot_i + mean_shift_i + centred_i
        return cls(
            n_prompts=n_prompts,
            n_samples=sum(part.n_samples for part in parts),
            reference_reward=float(reference_i[0]),
            reference_means_m=reference_i[1:],
            reward_scale=float(scale_i[0]),
            score_scale_m=scale_i[1:],
            correlation_ii=np.divide(covariance_ii, spread_ii, out=np.zeros_like(spread_ii), where=spread_ii > 0),
            is_constant_m=largest_i[1:] == 0.0,
            score_magnitude_m=np.max([part.largest_shift_i for part in parts], axis=0)[1:] + largest_i[1:],
            reward_shift=float(pivot_i[0] + mean_shift_i[0]),
            largest_reward=float(largest_i[0]),
            largest_score_m=largest_i[1:],
            score_pivot_m=pivot_i[1:],
            score_shift_m=mean_shift_i[1:],
        )


@dataclass(frozen=True, eq=False)
class BlockFacts:
    """Of one block; axis i is the reward, then the m constraint scores; covariances are in units of ``largest_i``."""

    n_prompts: int
    n_samples: int
    pivot_i: FloatArray
    shift_sum_i: FloatArray
    mean_sum_i: FloatArray
    largest_i: FloatArray
    largest_shift_i: FloatArray
    scaled_covariance_sum_ii: FloatArray


def _block_facts(block: SampleBlock) -> BlockFacts:
    return block.facts


def _map_partition(function: Callable[[SampleBlock], T], partition: Partition) -> list[T]:
    return [function(block) for block in partition.blocks()]


def _block_counts(block: SampleBlock) -> IntArray:
    # A copy: a view would keep the whole partition it was read with.
    return block.segments.counts_p.copy()
