"""Samplers and scorers as actors of a Ray cluster, fed by Ray Data.

Ray Data keeps the actors busy, starts more of them while there is work for them, and gives the task of an actor that
died to another one. What it does not know is what a shard is: each task is one row of its data set and becomes one
shard, written by the process that started the run. So a run that is killed continues here as it does in one process.
"""

from __future__ import annotations

import logging
import math
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data

from pipeline.contracts.errors import DualignError, InputError, WorkerFailedError
from stage1_dual.ray_cluster import LOCAL, connect
from stage1_dual.work import OnProgress, ShardResult, Task, Worker

T = TypeVar("T")

_CPUS_OF_RAY_DATA = 2
"""Logical processors that Ray Data's own tasks need beside the actors; without them it waits for ever, silently."""

_RETRIES_OF_A_TASK = 3
"""A task whose actor died is given to another actor this often: what kills every actor it meets is no accident."""


_GROUPS_PER_ACTOR = 4
"""At least so many turns for each actor, so that none waits long for the last one ..."""

_MOST_SHARDS_AT_ONCE = 16
"""... and not more shards in one, which an actor that dies leaves to be begun anew."""

_SECONDS_BETWEEN_NEWS = 2.0


@dataclass(frozen=True)
class RayActors:
    """Workers as actors of a Ray cluster.

    Attributes:
        address: of a running cluster (``auto``, ``ray://host:port``, ``host:port``), or None to start one here.
        min_actors: workers at the start.
        max_actors: workers at most.
        gpus_per_actor: accelerators of each, or a share of one.
        cpus_per_actor: logical processors of each.
    """

    address: str | None = None
    min_actors: int = 1
    max_actors: int = 1
    gpus_per_actor: float = 0.0
    cpus_per_actor: float = 1.0

    def perform(
        self, start: Callable[[], Worker[T]], tasks: Iterable[Task[T]], *, on_progress: OnProgress
    ) -> Iterator[tuple[Task[T], ShardResult, Mapping[str, object]]]:
        """Perform the tasks on the actors, as :meth:`stage1_dual.work.WorkerPool.perform` says.

        Raises:
            InputError: no cluster answers, or it is too small for ``min_actors``.
            WorkerFailedError: a task killed every actor it was given to.
        """
        self._connect()
        waiting = dict(enumerate(tasks))
        rows = [{"tasks": pickle.dumps(group)} for group in _groups(list(waiting.items()), self.max_actors)]
        told = ray.remote(num_cpus=0)(_Told).remote()
        with warnings.catch_warnings(action="ignore"):  # of what Ray uses, which its users cannot change
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Actor,
                fn_constructor_args=(start, told),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=min(self.min_actors, len(rows)), max_size=min(self.max_actors, len(rows))
                ),
                num_gpus=self.gpus_per_actor,
                num_cpus=self.cpus_per_actor,
                max_task_retries=_RETRIES_OF_A_TASK,
            )
            try:
                with _passed_on(told, on_progress):
                    for batch in results.iter_batches(batch_size=1, batch_format="pyarrow"):
                        place, result, description = pickle.loads(batch["result"][0].as_py())  # noqa: S301  # our own
                        if (task := waiting.pop(place, None)) is not None:  # else done twice, its first actor dead
                            yield task, result, description
            except ray.exceptions.RayError as error:
                raise _own_error(error) from error

    def _connect(self) -> None:
        needed = self.min_actors * self.cpus_per_actor + _CPUS_OF_RAY_DATA
        # Logical processors: a cluster of our own has as many as the actors and Ray Data ask for.
        connect(
            self.address or LOCAL,
            local_cpus=math.ceil(self.max_actors * self.cpus_per_actor + _CPUS_OF_RAY_DATA),
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the run shows its own, in samples
        context.target_max_block_size = 1  # a shard is handed over when it is full, not when its group is done
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        there = ray.cluster_resources()
        for resource, least in (("CPU", needed), ("GPU", self.min_actors * self.gpus_per_actor)):
            if there.get(resource, 0.0) < least:
                raise InputError(
                    f"the Ray cluster has {there.get(resource, 0.0):g} {resource}, and {least:g} are needed: "
                    f"`execution.min_actors` is {self.min_actors}"
                    + (f", and Ray Data itself takes {_CPUS_OF_RAY_DATA}" if resource == "CPU" else "")
                )


def _groups(tasks: Sequence[T], n_actors: int) -> Iterator[Sequence[T]]:
    """Tasks that an actor is given at once: it begins the next shard before the last completion of one is done."""
    size = max(1, min(_MOST_SHARDS_AT_ONCE, len(tasks) // (_GROUPS_PER_ACTOR * n_actors)))
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]


class _Actor:
    """A worker as Ray Data wants it: called with a batch, which here is one row with a group of tasks."""

    def __init__(self, start: Callable[[], Worker[Any]], told: Any) -> None:
        self._worker = start()
        self._told = told
        self._untold: Counter[str] = Counter()
        self._told_at = time.monotonic()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        group = pickle.loads(batch["tasks"][0].as_py())  # noqa: S301  # of the process that started the run
        place_of = {id(task): place for place, task in group}
        for task, result in self._worker.perform([task for _, task in group], on_progress=self._tell):
            answer = (place_of[id(task)], result, self._worker.describe())
            yield pa.table({"result": pa.array([pickle.dumps(answer)], pa.large_binary())})

    def _tell(self, counts: Mapping[str, float]) -> None:
        self._untold.update(counts)
        if time.monotonic() - self._told_at >= _SECONDS_BETWEEN_NEWS:
            self._told.add.remote(dict(self._untold))
            self._untold.clear()
            self._told_at = time.monotonic()


class _Told:
    """An actor that adds up what the workers tell of their progress."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, counts: Mapping[str, float]) -> None:
        """Add numbers."""
        self._counts.update(counts)

    def take(self) -> dict[str, float]:
        """What came since the last time."""
        counts, self._counts = self._counts, Counter()
        return dict(counts)


@contextmanager
def _passed_on(told: Any, on_progress: OnProgress) -> Iterator[None]:
    """Hand the workers' progress on, from a thread of its own, while the block runs."""
    over = Event()

    def pass_on() -> None:
        while not over.wait(_SECONDS_BETWEEN_NEWS):
            with suppress(ray.exceptions.RayError):  # the block's own error says more
                on_progress(ray.get(told.take.remote()))

    thread = Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _own_error(error: BaseException) -> DualignError:
    """The error of this project that caused one of Ray's, or one that says that a worker failed."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, DualignError):
            return cause
        cause = inner
    return WorkerFailedError(f"a worker of the Ray cluster failed: {error}; finished shards are kept")
