"""A progress bar for passes over many partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from stage1_dual.dual import Executor, Partition

T = TypeVar("T")


class ShownPasses:
    """Runs passes on another executor and shows how far each is.

    How many passes an answer takes is not known beforehand; the number of the current one is shown.

    Args:
        executor: what runs them.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._n_passes = 0

    def run(self, function: Callable[[Partition], T], partitions: Sequence[Partition]) -> Iterator[T]:
        """Results in the order of ``partitions``."""
        self._n_passes += 1
        results = self._executor.run(function, partitions)
        bar = tqdm(results, total=len(partitions), desc=f"pass {self._n_passes} over the scores", leave=False)
        yield from bar
