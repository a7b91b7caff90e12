"""The one loop of sampling and scoring: perform tasks, write each result as a shard, count, and stop on failures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.contracts.shards import ShardedTable
from pipeline.progress import progress_bar
from stage1_dual.shard_plan import written_order
from stage1_dual.work import Failure, FailureLimit, InProcess, Task, Worker, WorkerPool

T = TypeVar("T")


@dataclass(frozen=True)
class ShardsWritten:
    """What :func:`write_shards` did.

    Attributes:
        counts: sums of the counts of all shards, ``rows`` among them.
        failures: rows that could not be computed.
        start_seconds: time until the first shard was begun.
        working_seconds: from then on, to compute and write.
        description: the model's own description, as of the last shard.
    """

    counts: Mapping[str, int]
    failures: tuple[Failure, ...]
    start_seconds: float
    working_seconds: float
    description: Mapping[str, object]


def write_shards(
    start: Callable[[], Worker[T]],
    tasks: Iterable[Task[T]],
    *,
    tables: Mapping[str, ShardedTable],
    n_rows: int,
    n_present: int,
    failing: Path,
    max_failed_share: float,
    execution: WorkerPool | None,
    doing: str,
    show_progress: bool,
    rate_of: str | None = None,
) -> ShardsWritten:
    """Perform tasks and write what comes back, one atomic write a shard and table; the caller finishes the tables.

    A killed call loses the shards that were not written; the caller plans them again.

    Args:
        start: starts a worker, whose results count their ``rows``.
        tasks: one for each shard that is not wholly on disk.
        tables: the tables that the results' rows belong to, by name.
        n_rows: rows of the whole table, those on disk too.
        n_present: rows on disk.
        failing: folder of the table whose rows fail, for messages.
        max_failed_share: share of ``n_rows`` that may fail before the call stops.
        execution: where the workers live; in this process where None.
        doing: what the progress bar says.
        show_progress: whether to show it.
        rate_of: a count whose rate it shows beside that of the rows.

    Raises:
        InputError: more rows failed than may; what was computed is kept.
    """
    limit = FailureLimit(n_rows, max_share=max_failed_share, table=failing)
    counts: Counter[str] = Counter()
    description: Mapping[str, object] = {}
    started = time.monotonic()
    ready = started
    with progress_bar(total=n_rows, initial=n_present, doing=doing, unit="samples", shown=show_progress) as bar:
        for task, result, its_description in (execution or InProcess()).perform(start, tasks):
            for name, rows in result.tables.items():
                if rows.num_rows:
                    tables[name].write_shard(rows, split=task.split, order=written_order(task.place, rows))
            if not description:
                ready = time.monotonic() - result.seconds
            description = its_description
            counts.update(result.counts)
            bar.update(result.counts["rows"])
            if rate_of is not None:
                rate = counts[rate_of] / max(time.monotonic() - ready, 1e-9)
                bar.set_postfix_str(f"{rate:,.0f} {rate_of}/s")
            limit.add(result.failures)
    return ShardsWritten(
        counts=counts,
        failures=tuple(limit.failures),
        start_seconds=ready - started,
        working_seconds=time.monotonic() - ready,
        description=description,
    )
