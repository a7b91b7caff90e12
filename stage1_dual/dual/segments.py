"""Reductions over the responses of each prompt, for any number of responses per prompt."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.arrays import FloatArray as FloatArray

IntArray = NDArray[np.int64]


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

    def __getstate__(self) -> dict[str, object]:
        # Without what is cached.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_counts(cls, counts_p: IntArray) -> Segments:
        """Build from the number of responses of each prompt, shape (p,)."""
        counts_p = np.asarray(counts_p, dtype=np.int64)
        starts_p = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts_p)[:-1]])
        common = int(counts_p[0]) if bool(np.all(counts_p == counts_p[0])) else None
        return cls(starts_p=starts_p, counts_p=counts_p, common_count=common)

    def run(self, first: int, last: int) -> Segments:
        """The prompts from ``first`` to before ``last``, rows counted from the first of theirs."""
        starts_p, counts_p = self.starts_p[first:last], self.counts_p[first:last]
        if self.common_count is None:
            return Segments.from_counts(counts_p)
        return Segments(starts_p - starts_p[0], counts_p, self.common_count)

    @property
    def n_prompts(self) -> int:
        """The number of prompts."""
        return int(self.counts_p.shape[0])

    @property
    def n_rows(self) -> int:
        """The number of responses over all prompts."""
        return int(self.starts_p[-1] + self.counts_p[-1])

    @cached_property
    def _dense_shape(self) -> tuple[int, int]:
        return self.n_prompts, int(self.counts_p[0])

    @cached_property
    def _ones(self) -> FloatArray:
        return np.ones(self.counts_p[0])

    def sum(self, values_n: FloatArray) -> FloatArray:
        """Sum within each prompt; (..., n) to (..., p)."""
        if self.common_count is None:
            return self._reduce(np.add, values_n)
        # Three times as fast as a reduction over such short rows.
        sums_p: FloatArray = np.vecdot(self._dense(values_n), self._ones)
        return sums_p

    def mean(self, values_n: FloatArray) -> FloatArray:
        """Mean within each prompt; (..., n) to (..., p)."""
        return self.sum(values_n) / self.counts_p

    def max(self, values_n: FloatArray) -> FloatArray:
        """Largest value within each prompt; (..., n) to (..., p)."""
        return self._reduce(np.maximum, values_n)

    def subtract(self, values_n: FloatArray, values_p: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
        """Subtract one value per prompt from its rows; (..., n) minus (..., p) to (..., n)."""
        return self._spread(np.subtract, values_n, values_p, out)

    def divide(self, values_n: FloatArray, values_p: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
        """Divide the rows of each prompt by its value; (..., n) over (..., p) to (..., n)."""
        return self._spread(np.divide, values_n, values_p, out)

    def dot(self, left_n: FloatArray, right_n: FloatArray) -> FloatArray:
        """Sum of products within each prompt; (..., n) and (n,) to (..., p)."""
        if self.common_count is None:
            return self.sum(left_n * right_n)
        products_p: FloatArray = np.vecdot(self._dense(left_n), right_n.reshape(self._dense_shape))
        return products_p

    def argmax_rows(self, values_n: FloatArray) -> IntArray:
        """Row of the largest value of each prompt (the first of equals); (n,) to (p,)."""
        if self.common_count is not None:
            return np.asarray(self.starts_p + np.argmax(self._dense(values_n), axis=-1), dtype=np.int64)
        at_max = np.flatnonzero(values_n == np.repeat(self.max(values_n), self.counts_p))
        return np.asarray(at_max[np.searchsorted(at_max, self.starts_p)], dtype=np.int64)

    def _dense(self, values_n: FloatArray) -> FloatArray:
        return values_n.reshape(values_n.shape[:-1] + self._dense_shape)

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


def combine(coefficients_m: FloatArray, values_mn: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """sum_m c_m values_mn, (m,) and (m, n) to (n,), fresh or ``out``.

    A sum of so few terms is the same however many threads BLAS uses; on such flat shapes it was seen to use one.
    """
    return np.asarray(np.matmul(coefficients_m, values_mn, out=out), dtype=np.float64)


class _Scratch(threading.local):
    """Memory for the temporaries of one thread.

    Kept: the allocator returns arrays of this size to the system, and faulting them in again at every pass was
    measured to cost more than the arithmetic.
    """

    def __init__(self) -> None:
        self._values = np.empty(0)

    def rows(self, n_rows: int, length: int) -> FloatArray:
        """Uninitialised, shape (n_rows, length), this thread's until it asks again."""
        if n_rows * length > len(self._values):
            self._values = np.empty(n_rows * length)
        return self._values[: n_rows * length].reshape(n_rows, length)


scratch = _Scratch()


def weighted_products(
    segments: Segments, vectors_mn: FloatArray, weights_n: FloatArray, factor_p: FloatArray, *, work_n: FloatArray
) -> FloatArray:
    """Sum over prompts of their factor times the weighted sum of products of two vectors, shape (m, m)."""
    products_mm = np.empty((len(vectors_mn), len(vectors_mn)))
    for j, vector_n in enumerate(vectors_mn):
        np.multiply(vector_n, weights_n, out=work_n)
        products_mm[j, : j + 1] = products_mm[: j + 1, j] = segments.dot(vectors_mn[: j + 1], work_n) @ factor_p
    return products_mm
