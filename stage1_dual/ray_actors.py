"""Samplers and scorers as actors of a Ray cluster, fed by Ray Data.

Ray Data keeps the actors busy, starts more of them while there is work for them, and gives the task of an actor that
died to another one. What it does not know is what a shard is: each task is one row of its data set and becomes one
shard, written by the process that started the run. So a run that is killed continues here as it does in one process.
"""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data

from pipeline.contracts.errors import DualignError, InputError, WorkerFailedError
from stage1_dual.ray_cluster import LOCAL, connect
from stage1_dual.work import ShardResult, Task, Worker

T = TypeVar("T")

_CPUS_OF_RAY_DATA = 2
"""Logical processors that Ray Data's own tasks need beside the actors; without them it waits for ever, silently."""

_RETRIES_OF_A_TASK = 3
"""A task whose actor died is given to another actor this often: what kills every actor it meets is no accident."""


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
        self, start: Callable[[], Worker[T]], tasks: Iterable[Task[T]]
    ) -> Iterator[tuple[Task[T], ShardResult, Mapping[str, object]]]:
        """Perform the tasks on the actors, as :meth:`stage1_dual.work.WorkerPool.perform` says.

        Raises:
            InputError: no cluster answers, or it is too small for ``min_actors``.
            WorkerFailedError: a task killed every actor it was given to.
        """
        self._connect()
        waiting = list(tasks)
        rows = [{"task": place, "payload": pickle.dumps(task.payload)} for place, task in enumerate(waiting)]
        with warnings.catch_warnings(action="ignore"):  # of what Ray uses, which its users cannot change
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Actor,
                fn_constructor_args=(start,),
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
                for batch in results.iter_batches(batch_size=1, batch_format="pyarrow"):
                    result, description = pickle.loads(batch["result"][0].as_py())  # noqa: S301  # of our own actor
                    yield waiting[batch["task"][0].as_py()], result, description
            except ray.exceptions.RayError as error:
                raise _own_error(error) from error

    def _connect(self) -> None:
        needed = self.min_actors * self.cpus_per_actor + _CPUS_OF_RAY_DATA
        # Logical processors: a cluster of our own has as many as the actors and Ray Data ask for.
        connect(
            self.address or LOCAL,
            local_cpus=math.ceil(self.max_actors * self.cpus_per_actor + _CPUS_OF_RAY_DATA),
        )
        ray.data.DataContext.get_current().enable_progress_bars = False  # the run shows its own, in samples
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        there = ray.cluster_resources()
        for resource, least in (("CPU", needed), ("GPU", self.min_actors * self.gpus_per_actor)):
            if there.get(resource, 0.0) < least:
                raise InputError(
                    f"the Ray cluster has {there.get(resource, 0.0):g} {resource}, and {least:g} are needed: "
                    f"`execution.min_actors` is {self.min_actors}"
                    + (f", and Ray Data itself takes {_CPUS_OF_RAY_DATA}" if resource == "CPU" else "")
                )


class _Actor:
    """A worker as Ray Data wants it: called with a batch, which here is one task."""

    def __init__(self, start: Callable[[], Worker[Any]]) -> None:
        self._worker = start()

    def __call__(self, batch: pa.Table) -> pa.Table:
        payload = pickle.loads(batch["payload"][0].as_py())  # noqa: S301  # of the process that started the run
        answer = (self._worker.perform(payload), self._worker.describe())
        return pa.table({"task": batch["task"], "result": pa.array([pickle.dumps(answer)], pa.large_binary())})


def _own_error(error: BaseException) -> DualignError:
    """The error of this project that caused one of Ray's, or one that says that a worker failed."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, DualignError):
            return cause
        cause = inner
    return WorkerFailedError(f"a worker of the Ray cluster failed: {error}; finished shards are kept")
