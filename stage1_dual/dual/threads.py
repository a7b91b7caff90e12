"""Passes over partitions on the cores of this machine.

NumPy releases the interpreter's lock inside its loops, so threads share the scores without copying them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from pipeline.contracts.cores import usable_cores

S = TypeVar("S")
T = TypeVar("T")

# Results that may wait beyond those being computed: enough to keep all threads busy, few enough to bound memory.
_AHEAD = 2


class ThreadExecutor:
    """Runs partitions on a pool of threads, results in order.

    Attributes:
        n_threads: how many; by default as many as the cores this process may use.
    """

    def __init__(self, n_threads: int | None = None) -> None:
        self.n_threads = usable_cores() if n_threads is None else n_threads

    def run(self, function: Callable[[S], T], partitions: Sequence[S]) -> Iterator[T]:
        """Results in the order of ``partitions``."""
        if self.n_threads == 1 or len(partitions) == 1:
            yield from map(function, partitions)
            return
        waiting: deque[Future[T]] = deque()
        pool = _pool(self.n_threads)
        try:
            for partition in partitions:
                waiting.append(pool.submit(function, partition))
                if len(waiting) >= self.n_threads + _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="dual")


# A forked child inherits the pool but not its threads: waiting on it would never end.
os.register_at_fork(after_in_child=_pool.cache_clear)
