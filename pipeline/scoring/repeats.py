"""Rows that are scored twice: what another rating of the same response would not repeat."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.artifacts import file_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.shards import ShardedTable, read_parquet, write_parquet
from pipeline.contracts.tables import SAMPLE_KEY, SAMPLES, SCORES, SPLITS
from pipeline.run.prompt_info import PromptInfo
from pipeline.run.run import Run
from pipeline.run.step import log
from pipeline.scoring.groups import ScorerGroup
from stage1_dual.scoring.protocol import RepeatableScorer, Score, ScoreRequest
from stage1_dual.scoring.score_tables import request_of

_FILE = "repeats.parquet"
_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("again", pa.float64(), nullable=False),
    ]
)
_BATCH = 4096
_FEWEST = 30
"""Rows below which a standard deviation is not used: at 30 its own standard error is an eighth of it."""


@dataclass(frozen=True)
class ScoreNoise:
    """What differs between two independent scores of the same response.

    Attributes:
        sigma: standard deviation of one score around its mean over such calls, score units.
        standard_error: of ``sigma``, score units.
        rows: responses that were scored twice.
        failed: of those chosen, how many have no second score.
    """

    sigma: float
    standard_error: float
    rows: int
    failed: int = 0


def is_repeated(prompt_id: str, sample_index: int, share: float) -> bool:
    """Whether a row is among the share that is scored twice: by a hash of its key, so that more rows change none."""
    digest = hashlib.sha256(f"repeat:{prompt_id}:{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def estimate_noise(value_n: np.ndarray, again_n: np.ndarray, *, failed: int = 0) -> ScoreNoise:
    """The noise of one score from two of each row, shape (n,) both.

    With independent noise the difference of the two has variance 2 sigma^2, whatever the true score is. The standard
    error of sigma^2 is that of the mean of the squares, and sigma's that over 2 sigma (delta method).
    """
    half_squares = 0.5 * (value_n - again_n) ** 2
    n = len(half_squares)
    if n == 0:
        return ScoreNoise(0.0, 0.0, 0, failed)
    sigma = math.sqrt(float(half_squares.mean()))
    error = float(half_squares.std()) / math.sqrt(n)
    return ScoreNoise(sigma, error / (2 * sigma) if sigma > 0 else 0.0, n, failed)


def measure_noise(
    run: Run,
    group: ScorerGroup,
    name: str,
    *,
    start: Callable[[], Any],
    messages: Mapping[str, Sequence[Mapping[str, str]]],
    info: PromptInfo,
) -> ScoreNoise:
    """Score a share of the run's own samples a second time and write both scores to ``repeats.parquet``.

    Args:
        run: the run, whose samples are scored.
        group: the scorer's pass, whose scorer can score again.
        name: of the scorer.
        start: starts it.
        messages: of each prompt, by prompt id.
        info: what it reads of each prompt besides.
    """
    folder = run.scores / name
    values: dict[tuple[str, int], float] = {}
    requests: list[ScoreRequest] = []
    for split in SPLITS:
        scores = ShardedTable(folder=folder, schema=SCORES, metadata={}).read(split, columns=[*SAMPLE_KEY, "value"])
        for row in scores.to_pylist():
            if is_repeated(row["prompt_id"], row["sample_index"], group.repeated_share):
                values[row["prompt_id"], row["sample_index"]] = row["value"]
        for path in run.samples_table(run.samples).paths(split):
            samples = read_parquet(path, columns=[*SAMPLE_KEY, "completion", *group.reads], schema=SAMPLES)
            requests += [
                request_of(row, messages=messages, reads=group.reads, info=info)
                for row in samples.to_pylist()
                if (row["prompt_id"], row["sample_index"]) in values
            ]
    again: dict[tuple[str, int], float] = {}
    scorer: RepeatableScorer = start()
    try:
        for place in range(0, len(requests), _BATCH):
            batch = requests[place : place + _BATCH]
            for row, score in zip(batch, scorer.score_again(batch), strict=True):
                if isinstance(score, Score):
                    again[row.prompt_id, row.sample_index] = score.values[0]
    finally:
        scorer.close()
    rows = [(*key, values[key], again[key]) for key in sorted(again)]
    columns = (
        dict(zip(_SCHEMA.names, zip(*rows, strict=True), strict=True)) if rows else {n: [] for n in _SCHEMA.names}
    )
    write_parquet(folder / _FILE, pa.table(columns, schema=_SCHEMA), metadata=run.table_metadata())
    noise = read_noise(folder, failed=len(requests) - len(again))
    assert noise is not None
    log.info(
        "score: %d samples scored twice by %s; noise of one score %.3g ± %.2g",
        noise.rows,
        name,
        noise.sigma,
        1.96 * noise.standard_error,
    )
    return noise


def noise_files(folder: Path) -> dict[str, str]:
    """The file of the rows that were scored twice, with its sha256; nothing where none were."""
    path = folder / _FILE
    return {_FILE: file_sha256(path)} if path.is_file() else {}


def read_noise(folder: Path, *, failed: int = 0) -> ScoreNoise | None:
    """The noise of the scores in a folder, None where no row was scored twice.

    Raises:
        CorruptArtifactError: the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    table = read_parquet(path, schema=_SCHEMA)
    return estimate_noise(table["value"].to_numpy(), table["again"].to_numpy(), failed=failed)


def measured_sigma(folder: Path) -> float:
    """The standard deviation that ``score_noise: measured`` uses, score units.

    Raises:
        InputError: too few rows were scored twice.
    """
    noise = read_noise(folder)
    if noise is None or noise.rows < _FEWEST:
        raise InputError(
            f"`constraints.{folder.name}.score_noise` is 'measured', and {0 if noise is None else noise.rows} rows of "
            f"{folder} were scored twice; it needs {_FEWEST}: raise `scorers.{folder.name}.repeat_share`, or give a "
            "number"
        )
    return noise.sigma
