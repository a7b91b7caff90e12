"""Scores that do not fit in memory: grouped by prompt once, then read partition by partition in every pass.

Rows come in any order and in chunks. They are dealt into buckets by their prompt's id, so that all rows of a prompt
meet in one bucket; each bucket, which fits in memory, is then sorted, centred and written as one partition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.errors import InputError
from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.grouping import (
    SPREAD,
    GroupedSamples,
    RepeatedRows,
    UngroupedScores,
    find_repeated,
    order_by_prompt,
)
from stage1_dual.dual.samples import PARTITION_ROWS, PassRunner, SampleScores
from stage1_dual.dual.segments import Segments
from stage1_dual.dual.threads import ThreadExecutor

# What a file holds: a few of them in memory at once are small, and each is long enough to be read at full speed.
_FILE_ROWS = 500_000


@dataclass(frozen=True)
class OnDiskPartition:
    """One partition in a file: counts, then centred rewards and scores, then shifts, all eight bytes wide.

    Attributes:
        path: the file.
        n_prompts: prompts in it.
        n_rows: responses in it.
        n_constraints: constraint scores of each response.
        step: one response in so many is read.
        offset: the first one read.
    """

    path: Path
    n_prompts: int
    n_rows: int
    n_constraints: int
    step: int = 1
    offset: int = 0

    def blocks(self) -> Iterator[SampleBlock]:
        """The prompts of the file in blocks.

        Raises:
            InputError: the file is not what was written.
        """
        block = self._read()
        if self.step > 1:
            block = block.every(self.step, self.offset)
        yield from block.split(PARTITION_ROWS)

    def every(self, step: int, offset: int) -> OnDiskPartition:
        """The same prompts with every ``step``-th response only."""
        if self.step > 1:
            raise InputError("responses that were thinned out cannot be thinned out again")
        return OnDiskPartition(self.path, self.n_prompts, self.n_rows, self.n_constraints, step, offset)

    def _read(self) -> SampleBlock:
        n_constraints, n_rows, n_prompts = self.n_constraints, self.n_rows, self.n_prompts
        width = 1 + n_constraints
        words = np.fromfile(self.path, dtype=np.float64)
        if len(words) != n_prompts + width * (n_rows + n_prompts):
            raise InputError(f"{self.path} has {8 * len(words)} bytes; it was cut off or changed since it was written")
        counts_p = words[:n_prompts].view(np.int64)
        values = words[n_prompts : n_prompts + width * n_rows].reshape(width, n_rows)
        shifts = words[n_prompts + width * n_rows :].reshape(width, n_prompts)
        return SampleBlock(Segments.from_counts(counts_p), values, shifts)


def group_on_disk(
    chunks: Iterable[UngroupedScores],
    *,
    folder: Path,
    n_rows: int,
    n_constraints: int,
    executor: PassRunner | None = None,
) -> GroupedSamples | None:
    """Group rows by prompt into partitions under ``folder``; None where there are no rows.

    Needs disk space for the rows twice while it works, and memory for a few partitions.

    Args:
        chunks: the rows; all of finite scores, and a sample index in all chunks or in none.
        folder: an empty folder.
        n_rows: how many rows there will be, about: it decides the number of partitions.
        n_constraints: the number of constraint scores, m.
        executor: runs the passes; the default uses all cores of this machine.

    Raises:
        InputError: scores that differ within a prompt by more than float64 can hold.
    """
    n_buckets = max(1, math.ceil(n_rows / _FILE_ROWS))
    buckets = [folder / f"bucket-{number:05d}" for number in range(n_buckets)]
    has_index = False
    for chunk in chunks:
        has_index = chunk.sample_index_n is not None
        _deal(chunk, buckets)
    grouped = [
        _group(bucket, folder / f"partition-{number:05d}", n_constraints, has_index=has_index)
        for number, bucket in enumerate(buckets)
        if bucket.exists()
    ]
    if not grouped:
        return None
    scores = SampleScores(
        tuple(group.partition for group in grouped),
        ThreadExecutor() if executor is None else executor,
        n_constraints,
    )
    repeated = RepeatedRows.combine([group.repeated for group in grouped])
    return GroupedSamples(scores, np.concatenate([group.prompt_p for group in grouped]), repeated)


@dataclass(frozen=True, eq=False)
class _Group:
    """The prompts of a bucket."""

    partition: OnDiskPartition
    prompt_p: NDArray[np.uint64]
    repeated: RepeatedRows


def _deal(chunk: UngroupedScores, buckets: list[Path]) -> None:
    with np.errstate(over="ignore"):
        spread_n = (chunk.prompt_n * SPREAD) >> np.uint64(32)
    bucket_n = (spread_n % np.uint64(len(buckets))).astype(np.int64)
    order_n = np.argsort(bucket_n, kind="stable")
    # As words: an id read as a float could be a NaN, whose bits need not survive.
    values_nv = np.column_stack([chunk.reward_n, chunk.scores_nm]).view(np.uint64)
    index = [] if chunk.sample_index_n is None else [chunk.sample_index_n.view(np.uint64)]
    record_nv = np.column_stack([chunk.prompt_n, values_nv, *index])[order_n]
    ends = np.cumsum(np.bincount(bucket_n, minlength=len(buckets)))
    for bucket, rows in zip(buckets, np.split(record_nv, ends[:-1]), strict=True):
        if len(rows):
            with bucket.open("ab") as file:
                rows.tofile(file)


def _group(bucket: Path, path: Path, n_constraints: int, *, has_index: bool) -> _Group:
    record_nv = np.fromfile(bucket, dtype=np.uint64).reshape(-1, 2 + n_constraints + has_index)
    bucket.unlink()
    values_nv = np.ascontiguousarray(record_nv[:, 1 : 2 + n_constraints]).view(np.float64)
    index_n = np.ascontiguousarray(record_nv[:, -1]).view(np.int64) if has_index else None
    rows = UngroupedScores(np.ascontiguousarray(record_nv[:, 0]), values_nv[:, 0], values_nv[:, 1:], index_n)
    order_n, counts_p, prompt_p = order_by_prompt(rows)
    repeated = find_repeated(rows, order_n)
    values_nv = values_nv[order_n]
    centred_in = np.empty(values_nv.shape[::-1])
    block = SampleBlock.from_scores(values_nv[:, 0], values_nv[:, 1:], counts_p, out=centred_in)
    with path.open("wb") as file:
        for array in (counts_p, block.values_in, block.shift_ip):
            array.tofile(file)
    partition = OnDiskPartition(path, block.segments.n_prompts, block.segments.n_rows, n_constraints)
    return _Group(partition, prompt_p, repeated)
