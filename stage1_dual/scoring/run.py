"""The table of scores, made shard by shard: what is on disk is kept, what is missing is scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from tqdm import tqdm

from pipeline.contracts.errors import InputError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SCORES, SPLITS
from stage1_dual.scoring.protocol import Score, Scorer, ScoreRow
from stage1_dual.shard_plan import missing_shards


@dataclass(frozen=True)
class ScoringCounts:
    """What :func:`score_table` did.

    Attributes:
        rows_scored: scored now.
        rows_present: found on disk among those asked for.
        rows_truncated: scored now from the end of their text only.
        start_seconds: time to start the scorer; 0 where nothing was missing.
        scoring_seconds: time to score and write.
        scorer: the scorer's own description; empty where nothing was missing.
    """

    rows_scored: int
    rows_present: int
    rows_truncated: int
    start_seconds: float
    scoring_seconds: float
    scorer: Mapping[str, object] = field(default_factory=dict)


def score_table(
    *,
    scorer_factory: Callable[[], Scorer],
    samples: Mapping[str, pa.Table],
    messages: Mapping[str, Sequence[Mapping[str, str]]],
    table: ShardedTable,
    shard_rows: int,
    show_progress: bool,
) -> ScoringCounts:
    """Score every sample that has no score yet and write it; the caller finishes the table.

    A shard is one call of the scorer and one atomic write; continued after a kill it gives the rows that an
    uninterrupted run gives.

    Args:
        scorer_factory: starts the scorer; called once, and only if a row is missing.
        samples: by split, a table with the columns ``prompt_id``, ``sample_index`` and ``completion``.
        messages: the messages of each prompt, by prompt_id.
        table: of schema ``SCORES``.
        shard_rows: rows of a full shard.
        show_progress: whether to show a progress bar.

    Raises:
        InputError: a sample's prompt is not in ``messages``, or a score is NaN or infinite; names the rows.
    """
    missing: list[tuple[str, str, list[ScoreRow]]] = []
    rows_present = 0
    for split in SPLITS:
        if split not in samples:
            continue
        columns = samples[split].select(["prompt_id", "sample_index", "completion"]).to_pydict()
        completions = dict(
            zip(zip(columns["prompt_id"], columns["sample_index"], strict=True), columns["completion"], strict=True)
        )
        _require_messages(columns["prompt_id"], messages)
        # By key, not as they lie: a top-up of the samples appends, and must not change what a shard holds.
        keys = sorted(completions)
        present = table.present_keys(split)
        rows_present += len(present.intersection(keys))
        for order, wanted in missing_shards(keys, present, shard_rows=shard_rows):
            rows = [ScoreRow(prompt_id, k, messages[prompt_id], completions[prompt_id, k]) for prompt_id, k in wanted]
            missing.append((split, order, rows))
    if not missing:
        return ScoringCounts(0, rows_present, 0, 0.0, 0.0)

    started = time.monotonic()
    scorer = scorer_factory()
    ready = time.monotonic()
    rows_scored = rows_truncated = 0
    try:
        description = scorer.describe()
        with tqdm(
            total=sum(len(rows) for _, _, rows in missing), desc="scoring", unit=" samples", disable=not show_progress
        ) as bar:
            for split, order, rows in missing:
                scores = scorer.score(rows)
                _require_finite(rows, scores, description)
                table.write_shard(_rows(rows, scores), split=split, order=order)
                rows_scored += len(rows)
                rows_truncated += sum(score.truncated for score in scores)
                bar.update(len(rows))
        finished = time.monotonic()
    finally:
        scorer.close()
    return ScoringCounts(
        rows_scored=rows_scored,
        rows_present=rows_present,
        rows_truncated=rows_truncated,
        start_seconds=ready - started,
        scoring_seconds=finished - ready,
        scorer=description,
    )


def _require_messages(prompt_ids: Sequence[str], messages: Mapping[str, object]) -> None:
    unknown = sorted(set(prompt_ids) - messages.keys())
    if unknown:
        raise InputError(f"{len(unknown)} prompts of the samples are not among the prompts (first: {unknown[0]})")


def _require_finite(rows: Sequence[ScoreRow], scores: Sequence[Score], description: Mapping[str, object]) -> None:
    bad = [(row, score.value) for row, score in zip(rows, scores, strict=True) if not math.isfinite(score.value)]
    if bad:
        shown = "; ".join(
            f"prompt_id {row.prompt_id}, sample_index {row.sample_index}: {value}" for row, value in bad[:3]
        )
        raise InputError(
            f"{len(bad)} scores of {description['model']} are not finite (first: {shown}); a score must be a number"
        )


def _rows(rows: Sequence[ScoreRow], scores: Sequence[Score]) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [row.prompt_id for row in rows],
            "sample_index": [row.sample_index for row in rows],
            "value": [score.value for score in scores],
            "scored_sha256": [score.scored_sha256 for score in scores],
            "truncated": [score.truncated for score in scores],
        },
        schema=SCORES,
    )
