"""The one loop of sampling and scoring: perform tasks, write each result as a shard, count, and stop on failures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.contracts.shards import ShardedTable
from pipeline.progress import progress_bar
from stage1_dual.shard_plan import written_order
from stage1_dual.work import Failure, FailureLimit, InProcess, ShardResult, Task, Worker, WorkerPool

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

_SECONDS_BETWEEN = 2.0
"""Between two times that a bar is drawn, where no shard is finished in between."""


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
    ready: float | None = None
    with progress_bar(total=n_rows, initial=n_present, doing=doing, unit="samples", shown=show_progress) as bar:
        seen = _Seen(bar, n_rows - n_present, rate_of)
        performed = (execution or InProcess()).perform(start, tasks, on_progress=seen.on_progress)
        for task, result, its_description in performed:
            for name, rows in result.tables.items():
                if rows.num_rows:
                    tables[name].write_shard(rows, split=task.split, order=written_order(task.place, rows))
            if ready is None:
                ready = time.monotonic() - result.seconds
            description = its_description
            counts.update(result.counts)
            seen.on_result(result)
            limit.add(result.failures)
    ready = ready or time.monotonic()
    return ShardsWritten(
        counts=counts,
        failures=tuple(limit.failures),
        start_seconds=ready - started,
        working_seconds=time.monotonic() - ready,
        description=description,
    )


class _Seen:
    """What a bar shows: work told of as it is done, or where nothing is told, shard by shard.

    Args:
        bar: the bar.
        n_rows: that are to be computed.
        rate_of: a count whose rate it shows beside that of the rows.
    """

    def __init__(self, bar: tqdm[Any], n_rows: int, rate_of: str | None) -> None:
        self._bar = bar
        self._rate_of = rate_of
        self._all = n_rows
        self._told: Counter[str] = Counter()
        self._before_first: Counter[str] = Counter()
        self._written: Counter[str] = Counter()
        self._rows_shown = 0
        self._first = self._shown = time.monotonic()
        self._lock = Lock()

    def on_progress(self, counts: Mapping[str, float]) -> None:
        """Take progress into account; draw the bar where the last time is some seconds ago."""
        with self._lock:
            if not self._told:  # the rate is from here on: when these began is not known
                self._first = self._shown = time.monotonic()  # and of nothing there is none to show yet
                self._before_first = Counter(counts)
                self._bar.unpause()  # nor does the time left count what loading and compiling took
            self._told.update(counts)
            if time.monotonic() - self._shown >= _SECONDS_BETWEEN:
                self._show()

    def on_result(self, result: ShardResult) -> None:
        """Take a shard into account."""
        with self._lock:
            if not self._told and not self._written:
                self._first = time.monotonic() - result.seconds
            self._written.update(result.counts)
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        # Rows told of may be lost to a sampler that broke down, and drawn again: the bar waits for them at its end.
        rows = max(min(int(self._told["rows"] + 1e-6), self._all), self._written["rows"])
        if self._rate_of is not None:
            done = max(self._told[self._rate_of], self._written[self._rate_of]) - self._before_first[self._rate_of]
            rate = done / max(self._shown - self._first, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} {self._rate_of}/s", refresh=False)
        self._bar.update(max(rows - self._rows_shown, 0))
        self._rows_shown = max(rows, self._rows_shown)
        self._bar.refresh()
