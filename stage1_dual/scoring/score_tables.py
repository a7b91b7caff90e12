"""The tables of scores, made shard by shard: what is on disk is kept, what is missing is scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.errors import DualignError, InputError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.tables import SAMPLES, SCORES, TOKEN_IDS
from stage1_dual.scoring.protocol import RowFailure, Score, Scorer, ScoreRequest
from stage1_dual.shard_loop import write_shards
from stage1_dual.work import Failure, ShardResult, Task, WorkerPool

_COLUMNS = ("prompt_id", "sample_index", "completion")

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class ScoringCounts:
    """What :func:`score_tables` did.

    Attributes:
        rows_scored: scored now.
        rows_present: samples of which all scores were found on disk.
        rows_truncated: scored now from the end of their text only.
        failures: samples that could not be scored.
        start_seconds: time until the first shard was begun; 0 where nothing was missing.
        scoring_seconds: from then on, to score and write.
        scorer: the scorer's own description; empty where nothing was missing.
    """

    rows_scored: int
    rows_present: int
    rows_truncated: int
    failures: tuple[Failure, ...]
    start_seconds: float
    scoring_seconds: float
    scorer: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreShard:
    """What a scoring worker needs to know: a file of samples, and which of its rows to score.

    Attributes:
        path: of the file, absolute; workers on other machines must see it.
        row_n: rows to score, shape (n,).
        missing: by score table, which of these rows it lacks, shape (n,) each.
    """

    path: Path
    row_n: np.ndarray
    missing: Mapping[str, np.ndarray]


class ScoreWorker:
    """Scores the rows of a shard; a row that the scorer cannot take becomes a failure and harms no other.

    Args:
        scorer_factory: starts the scorer.
        names: the score table of each of the scorer's values.
        messages: the messages of each prompt, by prompt id.
        reads: columns of the samples table that the scorer needs besides key and completion.
        info: what it reads of each prompt besides its messages, by prompt id.
    """

    def __init__(
        self,
        scorer_factory: Callable[[], Scorer],
        names: Sequence[str],
        messages: Mapping[str, Messages],
        reads: Sequence[str],
        info: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._scorer = scorer_factory()
        self._names = tuple(names)
        self._messages = messages
        self._reads = tuple(reads)
        self._info = info

    def perform(self, payload: ScoreShard) -> ShardResult:
        """Score one shard."""
        started = time.monotonic()
        samples = read_parquet(payload.path, columns=[*_COLUMNS, *self._reads], schema=SAMPLES).take(payload.row_n)
        rows = [
            request_of(row, messages=self._messages, reads=self._reads, info=self._info) for row in samples.to_pylist()
        ]
        scores = [_checked(score, len(self._names)) for score in self._score(rows)]
        failures = [
            Failure(row.prompt_id, row.sample_index, score.reason)
            for row, score in zip(rows, scores, strict=True)
            if isinstance(score, RowFailure)
        ]
        tables = {}
        for head, name in enumerate(self._names):
            tables[name] = _rows(
                [
                    (row, score, score.values[head])
                    for row, score, missing in zip(rows, scores, payload.missing[name].tolist(), strict=True)
                    if missing and isinstance(score, Score)
                ]
            )
        scored = [score for score in scores if isinstance(score, Score)]
        return ShardResult(
            tables=tables,
            seconds=time.monotonic() - started,
            failures=failures,
            counts={"rows": len(scored), "truncated": sum(score.truncated for score in scored)},
        )

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer."""
        return self._scorer.describe()

    def close(self) -> None:
        """Free the model."""
        self._scorer.close()

    def _score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row; where the scorer fails as a whole, by halves down to the rows at fault."""
        if not rows:
            return []
        try:
            return self._scorer.score(rows)
        except DualignError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a model or a user's function does: it is recorded
            if len(rows) == 1:
                return [RowFailure(f"{type(error).__name__}: {error}")]
            middle = len(rows) // 2
            return self._score(rows[:middle]) + self._score(rows[middle:])


def request_of(
    row: Mapping[str, Any],
    *,
    messages: Mapping[str, Messages],
    reads: Sequence[str],
    info: Mapping[str, Mapping[str, Any]],
) -> ScoreRequest:
    """A row of the samples table as a scorer takes it; the arguments are those of :class:`ScoreWorker`."""
    return ScoreRequest(
        prompt_id=row["prompt_id"],
        sample_index=row["sample_index"],
        messages=messages[row["prompt_id"]],
        completion=row["completion"],
        prompt_token_ids=row.get("prompt_token_ids", ()),
        completion_token_ids=row.get("completion_token_ids", ()),
        columns={name: row[name] for name in reads if name not in TOKEN_IDS},
        info=info.get(row["prompt_id"], {}),
    )


def score_tables(
    *,
    scorer_factory: Callable[[], Scorer],
    samples: ShardedTable,
    splits: Sequence[str],
    messages: Mapping[str, Messages],
    tables: Mapping[str, ShardedTable],
    show_progress: bool,
    reads: Sequence[str] = (),
    info: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    max_failed_share: float = 0.0,
    execution: WorkerPool | None = None,
) -> ScoringCounts:
    """Score every sample that lacks a score in one of the tables and write it; the caller finishes the tables.

    A file of samples is one call of the scorer and one atomic write a table; continued after a kill it gives the rows
    that an uninterrupted run gives.

    Args:
        scorer_factory: starts the scorer; called only if a row is missing.
        samples: the finished table of samples.
        splits: splits to score.
        messages: the messages of each prompt, by prompt id.
        tables: a table of schema ``SCORES`` for each of the scorer's values, in their order.
        show_progress: whether to show a progress bar.
        reads: columns of the samples table that the scorer needs besides key and completion.
        info: what it reads of each prompt besides its messages, by prompt id.
        max_failed_share: share of the samples that may fail before the call stops.
        execution: where the scorer lives; in this process where None.

    Raises:
        InputError: a sample's prompt is not in ``messages``, or more samples failed than may; what was scored is kept.
    """
    prompts = PromptPlaces(list(messages))
    n_rows, tasks = _plan(samples, splits, prompts, tables)
    rows_missing = sum(task.n_rows for task in tasks)
    if not tasks:
        return ScoringCounts(0, n_rows, 0, (), 0.0, 0.0)

    written = write_shards(
        partial(ScoreWorker, scorer_factory, tuple(tables), messages, tuple(reads), dict(info)),
        tasks,
        tables=tables,
        n_rows=n_rows,
        n_present=n_rows - rows_missing,
        failing=samples.folder,
        max_failed_share=max_failed_share,
        execution=execution,
        doing="scoring",
        show_progress=show_progress,
    )
    return ScoringCounts(
        rows_scored=written.counts["rows"],
        rows_present=n_rows - rows_missing,
        rows_truncated=written.counts["truncated"],
        failures=written.failures,
        start_seconds=written.start_seconds,
        scoring_seconds=written.working_seconds,
        scorer=written.description,
    )


def _plan(
    samples: ShardedTable, splits: Sequence[str], prompts: PromptPlaces, tables: Mapping[str, ShardedTable]
) -> tuple[int, list[Task[ScoreShard]]]:
    """Number of samples, and a task for each of their files that is not wholly scored.

    By file, because a file of samples never changes: a top-up adds others.
    """
    n_rows = 0
    tasks: list[Task[ScoreShard]] = []
    for split in splits:
        files = [(path, *samples.keys(path, prompts)) for path in samples.paths(split)]
        for path, place, _ in files:
            _require_messages(path, place)
        width = 1 + max((int(sample.max(initial=-1)) for _, _, sample in files), default=-1)
        presence = {name: table.presence(split, prompts, n_samples=width) for name, table in tables.items()}
        for number, (path, place, sample) in enumerate(files):
            n_rows += len(place)
            lacking = {name: ~grid[place, sample] for name, grid in presence.items()}
            row_n = np.flatnonzero(np.logical_or.reduce(list(lacking.values())))
            if len(row_n) == 0:
                continue
            missing = {name: rows[row_n] for name, rows in lacking.items()}
            tasks.append(Task(split, number, len(row_n), ScoreShard(path.absolute(), row_n, missing)))
    return n_rows, tasks


def _require_messages(path: Path, place: np.ndarray) -> None:
    unknown = np.flatnonzero(place < 0)
    if len(unknown):
        prompt_id = read_parquet(path, columns=["prompt_id"], schema=SAMPLES)["prompt_id"][int(unknown[0])].as_py()
        raise InputError(f"{path}: {len(unknown)} rows are of prompts that are not in the run (first: {prompt_id})")


def _checked(score: Score | RowFailure, n_values: int) -> Score | RowFailure:
    if isinstance(score, RowFailure):
        return score
    assert len(score.values) == n_values
    if not all(math.isfinite(value) for value in score.values):
        shown = ", ".join(str(value) for value in score.values)
        return RowFailure(f"the score is {shown}; it must be a finite number")
    return score


def _rows(scored: Sequence[tuple[ScoreRequest, Score, float]]) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [row.prompt_id for row, _, _ in scored],
            "sample_index": [row.sample_index for row, _, _ in scored],
            "value": [value for _, _, value in scored],
            "scored_sha256": [score.scored_sha256 for _, score, _ in scored],
            "truncated": [score.truncated for _, score, _ in scored],
        },
        schema=SCORES,
    )
