"""Reductions over the responses of each prompt, for any number of responses per prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Temporaries of a pass over this many rows stay in the cache of a core, and the allocator reuses them instead of
# asking the system for fresh pages, which costs more than the arithmetic. Measured: twice as fast as whole arrays.
BLOCK_ROWS = 32_768


@dataclass(frozen=True, eq=False)
class Block:
    """A run of whole prompts that a pass handles at once: its rows, its prompts and their segments."""

    rows: slice
    prompts: slice
    segments: Segments


@dataclass(frozen=True, eq=False)
class Segments:
    """Which rows of a flat array belong to which prompt.

    The last axis of every array handled here is the row axis n, grouped by prompt, C-contiguous. Equal counts take a
    dense path: a reshape instead of ``ufunc.reduceat``, about four times as fast.

    Attributes:
        starts_p: first row of each prompt, shape (p,).
        counts_p: responses of each prompt, shape (p,), at least 1.
    """

    starts_p: IntArray
    counts_p: IntArray
    common_count: int | None

    @classmethod
    def from_counts(cls, counts_p: IntArray) -> Segments:
        """Build from the number of responses of each prompt, shape (p,)."""
        counts_p = np.asarray(counts_p, dtype=np.int64)
        starts_p = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts_p)[:-1]])
        common = int(counts_p[0]) if bool(np.all(counts_p == counts_p[0])) else None
        return cls(starts_p=starts_p, counts_p=counts_p, common_count=common)

    @property
    def n_prompts(self) -> int:
        """The number of prompts."""
        return int(self.counts_p.shape[0])

    @property
    def n_rows(self) -> int:
        """The number of responses over all prompts."""
        return int(self.starts_p[-1] + self.counts_p[-1])

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The prompts in runs of about ``BLOCK_ROWS`` rows; a longer prompt is a block of its own."""
        ends_p = self.starts_p + self.counts_p
        blocks: list[Block] = []
        first = 0
        while first < self.n_prompts:
            reach = int(self.starts_p[first]) + BLOCK_ROWS
            last = max(first + 1, int(np.searchsorted(ends_p, reach, side="right")))
            blocks.append(
                Block(
                    rows=slice(int(self.starts_p[first]), int(ends_p[last - 1])),
                    prompts=slice(first, last),
                    segments=Segments.from_counts(self.counts_p[first:last]),
                )
            )
            first = last
        return tuple(blocks)

    @cached_property
    def _dense_shape(self) -> tuple[int, int]:
        return self.n_prompts, int(self.counts_p[0])

    def sum(self, values_n: FloatArray) -> FloatArray:
        """Sum within each prompt; (..., n) to (..., p)."""
        return self._reduce(np.add, values_n)

    def mean(self, values_n: FloatArray) -> FloatArray:
        """Mean within each prompt; (..., n) to (..., p)."""
        return self.sum(values_n) / self.counts_p

    def max(self, values_n: FloatArray) -> FloatArray:
        """Largest value within each prompt; (..., n) to (..., p)."""
        return self._reduce(np.maximum, values_n)

    def min(self, values_n: FloatArray) -> FloatArray:
        """Smallest value within each prompt; (..., n) to (..., p)."""
        return self._reduce(np.minimum, values_n)

    def subtract(self, values_n: FloatArray, values_p: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
        """Subtract one value per prompt from its rows; (..., n) minus (..., p) to (..., n)."""
        return self._spread(np.subtract, values_n, values_p, out)

    def divide(self, values_n: FloatArray, values_p: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
        """Divide the rows of each prompt by its value; (..., n) over (..., p) to (..., n)."""
        return self._spread(np.divide, values_n, values_p, out)

    def argmax_rows(self, values_n: FloatArray) -> IntArray:
        """Row of the largest value of each prompt (the first of equals); (n,) to (p,)."""
        if self.common_count is not None:
            return np.asarray(self.starts_p + np.argmax(self._dense(values_n), axis=-1), dtype=np.int64)
        at_max = np.flatnonzero(values_n == np.repeat(self.max(values_n), self.counts_p))
        return np.asarray(at_max[np.searchsorted(at_max, self.starts_p)], dtype=np.int64)

    def _dense(self, values_n: FloatArray) -> FloatArray:
        return values_n.reshape(*values_n.shape[:-1], *self._dense_shape)

    def _spread(
        self, ufunc: np.ufunc, values_n: FloatArray, values_p: FloatArray, out: FloatArray | None
    ) -> FloatArray:
        result = np.empty_like(values_n) if out is None else out
        if self.common_count is None:
            ufunc(values_n, np.repeat(values_p, self.counts_p, axis=-1), out=result)
        else:
            ufunc(self._dense(values_n), values_p[..., np.newaxis], out=self._dense(result))
        return result

    def _reduce(self, ufunc: np.ufunc, values_n: FloatArray) -> FloatArray:
        reduced: FloatArray
        if self.common_count is None:
            reduced = ufunc.reduceat(values_n, self.starts_p, axis=-1)
        else:
            reduced = ufunc.reduce(self._dense(values_n), axis=-1)
        return reduced


def weighted_products(weights_n: FloatArray, left_in: FloatArray, right_jn: FloatArray) -> FloatArray:
    """sum_n w_n left_in right_jn, (i, n) and (j, n) to (i, j).

    Row by row with einsum instead of a matrix product: the threads of BLAS cost more than they save on such flat
    shapes when cores are shared, and their sums depend on how many there are.
    """
    products = np.empty((len(left_in), len(right_jn)))
    weighted_n = np.empty_like(weights_n)
    for i, left_n in enumerate(left_in):
        np.multiply(left_n, weights_n, out=weighted_n)
        for j, right_n in enumerate(right_jn):
            products[i, j] = np.einsum("n,n->", weighted_n, right_n)
    return products


def combine(coefficients_m: FloatArray, values_mn: FloatArray) -> FloatArray:
    """sum_m c_m values_mn, (m,) and (m, n) to a fresh (n,); adding row by row, for the same reasons."""
    total_n = np.zeros(values_mn.shape[1])
    scaled_n = np.empty_like(total_n)
    for coefficient, values_n in zip(coefficients_m, values_mn, strict=True):
        np.multiply(values_n, coefficient, out=scaled_n)
        total_n += scaled_n
    return total_n
