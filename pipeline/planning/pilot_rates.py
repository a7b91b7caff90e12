"""What a response cost in a pilot: its tokens, the time to draw and score it, its bytes on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import SPLITS
from pipeline.run.run import Run


@dataclass(frozen=True)
class PilotRates:
    """Means over a pilot's responses; None where it does not tell.

    Attributes:
        tokens: of a response.
        prompt_tokens: of a prompt, with its template.
        tokens_per_second: drawn, all devices together.
        scoring_seconds: to score a response by all scorers, all devices together.
        bytes_per_response: of samples, scores and, where the pilot has it, the hand-off table.
        devices: that drew and scored at the same time: GPUs, or the CPU as one.
    """

    tokens: float | None
    prompt_tokens: float | None
    tokens_per_second: float | None
    scoring_seconds: float | None
    bytes_per_response: float | None
    devices: int = 1

    def costs(self, *, responses: int, drawn_only: int) -> dict[str, Any]:
        """What so many responses take.

        Args:
            responses: of the reference, drawn, scored and kept.
            drawn_only: of the trained policy, at the same length and rate: drawn, scored and kept too.
        """
        total = responses + drawn_only
        tokens = None if self.tokens is None else total * self.tokens
        seconds = None
        if tokens is not None and self.tokens_per_second is not None:
            seconds = tokens / self.tokens_per_second + total * (self.scoring_seconds or 0.0)
        return {
            "responses": total,
            "tokens": None if tokens is None else round(tokens),
            "hours": None if seconds is None else seconds / 3600,
            "devices": self.devices,
            "device_hours": None if seconds is None else seconds * self.devices / 3600,
            "bytes": None if self.bytes_per_response is None else round(total * self.bytes_per_response),
        }


UNKNOWN_RATES = PilotRates(None, None, None, None, None)


def rates_of_run(run: Run) -> PilotRates:
    """Of a run's samples and scores, by their manifests and tables."""
    table = run.samples_table(run.samples)
    read = [table.read(split, columns=["prompt_token_ids", "completion_token_ids"]) for split in SPLITS]
    rows = pa.concat_tables(read)
    tokens = _mean_length(rows["completion_token_ids"])
    called = read_manifest(run.samples).details.get("last_call", {})
    drawn, seconds = called.get("tokens_sampled", 0), called.get("sampling_seconds", 0.0)
    folders = [run.samples, *(path for path in run.scores.glob("*") if path.is_dir()), run.tilted]
    size = sum(path.stat().st_size for folder in folders for path in folder.glob("data/*.parquet"))
    execution, sampling = run.config.execution, run.config.sampling
    workers = execution.max_actors if execution.kind == "ray" else 1
    return PilotRates(
        tokens=tokens,
        prompt_tokens=_mean_length(rows["prompt_token_ids"]),
        tokens_per_second=drawn / seconds if drawn and seconds else None,
        scoring_seconds=_scoring_seconds(run),
        bytes_per_response=size / rows.num_rows if rows.num_rows else None,
        devices=workers * sampling.tensor_parallel_size,
    )


def rates_of_table(path: Path, *, rows: int, tokens: float | None, tokens_per_second: float | None) -> PilotRates:
    """Of a table of scores: its own size, and what its user says of responses.

    Args:
        path: the file, or the folder of files.
        rows: how many it has.
        tokens: of a response, or None.
        tokens_per_second: drawn, or None.

    Raises:
        InputError: a number of tokens is not positive and finite.
    """
    for option, value in (("--tokens-per-response", tokens), ("--tokens-per-second", tokens_per_second)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"`{option}` is {value:g}; it must be a positive, finite number")
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    size = sum(one.stat().st_size for one in files) / rows if rows else None
    return PilotRates(tokens, None, tokens_per_second, None, size)


def _mean_length(lists: pa.ChunkedArray) -> float | None:
    found = pc.mean(pc.list_value_length(lists)).as_py()
    return None if found is None else float(found)


def _scoring_seconds(run: Run) -> float | None:
    """Scorers that shared a pass have the same record of it, which counts once."""
    calls: dict[str, tuple[int, float]] = {}
    for name in run.config.used_scorers():
        folder = run.scores / name
        if not (folder / "manifest.json").is_file():
            continue
        called = read_manifest(folder).details.get("last_call", {})
        if called.get("rows_scored"):
            calls[json.dumps(called, sort_keys=True)] = (called["rows_scored"], called["scoring_seconds"])
    return sum(seconds / rows for rows, seconds in calls.values()) if calls else None
