"""Runs of which only some artifacts exist, with rows by hand: for what reads artifacts and computes a number."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.config.recipe import RunConfig
from pipeline.contracts.artifacts import Manifest, write_manifest
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, SCORES
from pipeline.run.run import Run

Values = Mapping[str, Sequence[float]]
"""The scores of each prompt's responses, in the order of their indices."""


def written_run(data_dir: Path, config: RunConfig, *, name: str = "written") -> Run:
    """A run with nothing in it."""
    return Run(config=config, name=name, data_dir=data_dir, show_progress=False)


def write_scores(folder: Path, by_split: Mapping[str, Values]) -> None:
    """A finished score table, in a folder that has the scorer's name."""
    table = ShardedTable(folder=folder, schema=SCORES, metadata={})
    for split, by_prompt in by_split.items():
        rows = [
            {"prompt_id": prompt, "sample_index": k, "value": value, "scored_sha256": "0" * 64, "truncated": False}
            for prompt, values in by_prompt.items()
            for k, value in enumerate(values)
        ]
        table.write_shard(pa.Table.from_pylist(rows, schema=SCORES), split=split, order="000000")
    files = table.finish()
    write_finished(folder, step="score", files=files, counts={"failed": 0})


def write_samples(
    folder: Path,
    by_split: Mapping[str, Mapping[str, Sequence[int]]],
    *,
    prompt_length: int,
    cut_off: Collection[tuple[str, int]] = (),
) -> None:
    """A finished samples table: for each prompt the lengths of its completions, tokens; by key those cut off."""
    table = ShardedTable(folder=folder, schema=SAMPLES, metadata={})
    for split, by_prompt in by_split.items():
        rows = [
            {
                "prompt_id": prompt,
                "sample_index": k,
                "completion": f"response {k}",
                "prompt_token_ids": [1] * prompt_length,
                "completion_token_ids": [2] * length,
                "finish_reason": "length" if (prompt, k) in cut_off else "stop",
                "seed": k,
                "sampler_logp": -1.0,
            }
            for prompt, lengths in by_prompt.items()
            for k, length in enumerate(lengths)
        ]
        table.write_shard(pa.Table.from_pylist(rows, schema=SAMPLES), split=split, order="000000")
    write_finished(folder, step="sample", files=table.finish(), counts={"failed": 0})


def write_finished(
    folder: Path,
    *,
    step: str,
    seconds: float = 0.0,
    files: Mapping[str, str] | None = None,
    counts: Mapping[str, int] | None = None,
    details: Mapping[str, object] | None = None,
) -> None:
    """The manifest of a step that took so long, and counted this."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        step=step,
        run="written",
        settings={},
        inputs={},
        files=files or {},
        counts=counts or {},
        details=details or {},
        wall_seconds=seconds,
    )
    write_manifest(folder, manifest)
