"""Work by the shard: what a task and its result are, and how tasks are performed.

Sampling and scoring both cut what is missing into tasks, each of which becomes one shard on disk. Where the worker
lives, in this process or as actors of a Ray cluster (:mod:`stage1_dual.ray_actors`), changes nothing of what is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pyarrow as pa

from pipeline.contracts.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Task(Generic[T]):
    """One shard to compute.

    Attributes:
        split: of all its rows.
        place: sorts the shard among those of its split.
        n_rows: rows asked for.
        payload: what the worker needs to know.
    """

    split: str
    place: int
    n_rows: int
    payload: T


@dataclass(frozen=True)
class Failure:
    """A row that could not be computed; it is not in the table, and is tried again on the next run."""

    prompt_id: str
    sample_index: int
    reason: str


@dataclass(frozen=True)
class ShardResult:
    """What a worker made of a task.

    Attributes:
        tables: rows of one shard for each table that the work writes, by name.
        seconds: the worker spent on it.
        failures: rows that are in none of them.
        counts: numbers to add up over the shards.
    """

    tables: Mapping[str, pa.Table]
    seconds: float
    failures: Sequence[Failure] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


OnProgress = Callable[[Mapping[str, float]], None]
"""Told of work as it is done, before the shard it belongs to: numbers to add to what was told before, by name."""


class Worker(Protocol[T]):
    """Performs tasks, with a model that was loaded once."""

    def perform(self, tasks: Iterable[Task[T]], *, on_progress: OnProgress) -> Iterator[tuple[Task[T], ShardResult]]:
        """Compute shards as they fill, in any order; the next task is taken when there is room for it.

        Args:
            tasks: what to do.
            on_progress: may be told of ``rows`` (a started row counts in part) and of other counts of the results.
        """
        ...

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the model at work, JSON-serialisable."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class WorkerPool(Protocol):
    """Where and how many workers perform tasks."""

    def perform(
        self, start: Callable[[], Worker[T]], tasks: Iterable[Task[T]], *, on_progress: OnProgress
    ) -> Iterator[tuple[Task[T], ShardResult, Mapping[str, object]]]:
        """Results as they are ready, in any order, each with the description of its worker.

        Args:
            start: starts a worker; picklable where workers live in other processes.
            tasks: what to do.
            on_progress: told of the workers' progress, from one thread at a time, though not always the caller's.
        """
        ...


class InProcess:
    """One worker, in this process."""

    def perform(
        self, start: Callable[[], Worker[T]], tasks: Iterable[Task[T]], *, on_progress: OnProgress
    ) -> Iterator[tuple[Task[T], ShardResult, Mapping[str, object]]]:
        """Perform the tasks here, as :meth:`WorkerPool.perform` says."""
        worker = start()
        try:
            for task, result in worker.perform(tasks, on_progress=on_progress):
                yield task, result, worker.describe()
        finally:
            worker.close()


class FailureLimit:
    """Stops a step in which too many rows fail, while what was computed is safe on disk.

    Args:
        n_rows: rows of the whole table.
        max_share: share of them that may fail.
        table: what they are rows of, for messages.
    """

    def __init__(self, n_rows: int, *, max_share: float, table: Path) -> None:
        self._n_rows = n_rows
        self._table = table
        self._max_share = max_share
        self.failures: list[Failure] = []

    def add(self, failures: Sequence[Failure]) -> None:
        """Count the failures of a shard.

        Raises:
            InputError: more rows have failed than may.
        """
        self.failures += failures
        if len(self.failures) > self._max_share * self._n_rows:
            raise InputError(
                f"{len(self.failures)} of {self._n_rows} rows of {self._table} failed so far, a larger share than "
                f"`max_failed_share`, {self._max_share:g} (first: {describe_failures(self.failures)}); "
                "finished shards are kept"
            )


def describe_failures(failures: Sequence[Failure]) -> str:
    """The first few failures, for a message."""
    return "; ".join(
        f"prompt {failure.prompt_id[:12]}, sample {failure.sample_index}: {failure.reason}" for failure in failures[:3]
    )
