"""Centred scores of some whole prompts, and what they are like before any tilt.

Nothing here depends on thresholds, multipliers or beta, and nothing knows where a block lies: partitions of blocks and
passes over them are in :mod:`stage1_dual.dual.samples`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, reduce

import numpy as np

from pipeline.contracts.errors import InputError
from stage1_dual.dual.segments import FloatArray, IntArray, Segments

# What one call of NumPy works on: its temporaries stay in a core's cache.
TILE_ROWS = 32_768

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

    def __getstate__(self) -> dict[str, object]:
        # Without what is cached: views would be sent as copies.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def facts(self) -> BlockFacts:
        """What the scores are like before any tilt; found once, then kept."""
        segments = self.segments
        pivot_i = self.shift_ip[:, 0].copy()
        moments = [tile.moments for _, tile in self.tiles]
        return BlockFacts(
            n_prompts=segments.n_prompts,
            n_samples=segments.n_rows,
            pivot_i=pivot_i,
            shift_sum_i=(self.shift_ip - pivot_i[:, np.newaxis]).sum(axis=1),
            largest_shift_i=np.abs(self.shift_ip).max(axis=1),
            moments=BlockMoments.combine(moments),
        )

    @cached_property
    def moments(self) -> BlockMoments:
        """The moments of the centred scores under the reference; found once, then kept."""
        segments = self.segments
        largest_i = np.maximum(self.values_in.max(axis=1), -self.values_in.min(axis=1))
        unit_i, scaled_in = np.ones(len(largest_i)), self.values_in
        # Squares of values below 1e-154 or above 1e154 would leave the range of float64.
        if largest_i.min() < _SMALLEST_SQUARED or largest_i.max() > _LARGEST_SQUARED:
            unit_i = np.where(largest_i > 0, largest_i, 1.0)
            scaled_in = scaled_in / unit_i[:, np.newaxis]
        mean_ip = segments.mean(scaled_in)
        covariance_ii = -mean_ip @ mean_ip.T
        share_p = 1.0 / segments.counts_p
        for i, scaled_n in enumerate(scaled_in):
            covariance_ii[i, : i + 1] += segments.dot(scaled_in[: i + 1], scaled_n) @ share_p
            covariance_ii[:i, i] = covariance_ii[i, :i]
        return BlockMoments(largest_i, unit_i, mean_ip.sum(axis=1) * unit_i, covariance_ii)

    @property
    def reward_n(self) -> FloatArray:
        """The reward minus its shift, reward units, shape (n,)."""
        reward_n: FloatArray = self.values_in[0]
        return reward_n

    @property
    def scores_mn(self) -> FloatArray:
        """The scores minus their shifts, score units, shape (m, n)."""
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

    @property
    def reference_means_mp(self) -> FloatArray:
        """E_{pi_ref}[g] of each prompt, score units, shape (m, p)."""
        return self.score_shift_mp + self.segments.mean(self.scores_mn)

    @classmethod
    def from_scores(
        cls, reward_n: FloatArray, scores_nm: FloatArray, counts_p: IntArray, *, out: FloatArray
    ) -> SampleBlock:
        """Centre rewards, shape (n,), and scores, shape (n, m), grouped by prompt, into ``out``, shape (1 + m, n).

        Raises:
            InputError: a value is not finite, or the scores of one prompt differ by more than float64 can hold.
        """
        segments = Segments.from_counts(counts_p)
        block = cls(segments, out, np.empty((len(out), segments.n_prompts)))
        # Near the largest float64 a mean may overflow; any value of the prompt serves as a shift.
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            start = 0
            for _, tile in block.tiles:
                rows = slice(start, start + tile.segments.n_rows)
                tile.values_in[0] = reward_n[rows]
                tile.values_in[1:] = scores_nm[rows].T
                tile._centre()
                start = rows.stop
            # Twice: so far apart may two responses be.
            if not np.isfinite(2.0 * block.facts.moments.largest_i).all():
                raise InputError("the scores of one prompt differ by more than float64 can hold; rescale them")
        return block

    def _centre(self) -> None:
        """Make raw values relative to shifts that are found here, both in place."""
        mean_ip = self.segments.mean(self.values_in)
        first_ip = self.values_in[:, self.segments.starts_p]
        # Equal values must centre to exactly zero, which their rounded mean does not promise.
        rounding_ip = np.finfo(np.float64).eps * self.segments.counts_p * np.abs(first_ip)
        is_mean_ip = np.isfinite(mean_ip) & (np.abs(mean_ip - first_ip) > rounding_ip)
        self.shift_ip[:] = np.where(is_mean_ip, mean_ip, first_ip)
        self.segments.subtract(self.values_in, self.shift_ip, out=self.values_in)
        # Asked for here because the scores are in the cache.
        _ = self.moments

    @cached_property
    def tiles(self) -> tuple[tuple[slice, SampleBlock], ...]:
        """Views of about ``TILE_ROWS`` rows with the place of their prompts in the block: for work on every row.

        What needs one number per prompt is better done for the whole block at once, in fewer calls.
        """
        tiles: list[tuple[slice, SampleBlock]] = []
        first = 0
        for tile in self.split(TILE_ROWS):
            tiles.append((slice(first, first + tile.segments.n_prompts), tile))
            first += tile.segments.n_prompts
        return tuple(tiles)

    def split(self, block_rows: int) -> Iterator[SampleBlock]:
        """Views of runs of whole prompts of about ``block_rows`` rows; a longer prompt is a block of its own."""
        ends_p = self.segments.starts_p + self.segments.counts_p
        first = 0
        while first < self.segments.n_prompts:
            start = int(self.segments.starts_p[first])
            last = max(first + 1, int(np.searchsorted(ends_p, start + block_rows, side="right")))
            yield self.run(first, last)
            first = last

    def with_scores(self, place: int, scores_n: FloatArray) -> SampleBlock:
        """A copy whose constraint score ``place`` is ``scores_n``, shape (n,), score units."""
        values_in, shift_ip = self.values_in.copy(), self.shift_ip.copy()
        row = slice(1 + place, 2 + place)
        values_in[row] = scores_n
        SampleBlock(self.segments, values_in[row], shift_ip[row])._centre()
        return SampleBlock(self.segments, values_in, shift_ip)

    def run(self, first: int, last: int) -> SampleBlock:
        """A view of the prompts from ``first`` to before ``last``."""
        starts_p, counts_p = self.segments.starts_p, self.segments.counts_p
        rows = slice(int(starts_p[first]), int(starts_p[last - 1] + counts_p[last - 1]))
        return SampleBlock(
            segments=self.segments.run(first, last),
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


@dataclass(frozen=True, eq=False)
class BlockMoments:
    """First and second moments of the centred scores of some prompts.

    Axis i is the reward, then the m constraint scores.

    Attributes:
        largest_i: largest size of a score, score units, shape (1 + m,).
        unit_i: what the covariances are in, score units, shape (1 + m,).
        mean_sum_i: sum over prompts of what centring left of their means, score units, shape (1 + m,).
        covariance_sum_ii: sum over prompts of the covariances under pi_ref, shape (1 + m, 1 + m).
    """

    largest_i: FloatArray
    unit_i: FloatArray
    mean_sum_i: FloatArray
    covariance_sum_ii: FloatArray

    @classmethod
    def combine(cls, parts: Sequence[BlockMoments]) -> BlockMoments:
        """The moments of all prompts from those of their blocks or tiles."""
        largest_i = reduce(np.maximum, [part.largest_i for part in parts])
        unit_i = np.ones_like(largest_i)
        covariances = [part.covariance_sum_ii for part in parts]
        if any((part.unit_i != 1.0).any() for part in parts):
            unit_i = np.where(largest_i > 0, largest_i, 1.0)
            ratios = [np.where(part.largest_i > 0, part.unit_i, 0.0) / unit_i for part in parts]
            covariances = [one_ii * np.outer(by_i, by_i) for one_ii, by_i in zip(covariances, ratios, strict=True)]
        return cls(largest_i, unit_i, reduce(np.add, [part.mean_sum_i for part in parts]), reduce(np.add, covariances))


@dataclass(frozen=True, eq=False)
class BlockFacts:
    """What the scores of one block are like: what :class:`~stage1_dual.dual.samples.SampleFacts` is combined from.

    Axis i is the reward, then the m constraint scores.

    Attributes:
        n_prompts: prompts in it.
        n_samples: responses in it.
        pivot_i: some shift, score units, shape (1 + m,).
        shift_sum_i: sum over prompts of their shifts relative to ``pivot_i``, score units, shape (1 + m,).
        largest_shift_i: largest size of a shift, score units, shape (1 + m,).
        moments: of the centred scores.
    """

    n_prompts: int
    n_samples: int
    pivot_i: FloatArray
    shift_sum_i: FloatArray
    largest_shift_i: FloatArray
    moments: BlockMoments
