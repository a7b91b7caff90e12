"""Seconds and memory of stage 1's tables: writing, joining and scoring rows by the million.

    python benchmarks/stage1_tables.py [--rows 10000000] [--score-rows 1000000]

Writes a samples table of short responses and two score tables in shards of 4,096 rows, as sampling and scoring do,
joins them on their key as `dualign solve` does, and scores a smaller table with a Python function, resuming included.
Memory is the process's own: what it holds after a tenth of the work and at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, SCORES
from pipeline.scoring.joined import read_scores
from stage1_dual.scoring.python_function import PythonScorer
from stage1_dual.scoring.score_tables import score_tables

_SHARD_ROWS = 4096
_RESPONSES = 128
_TOKENS = 24


def memory_gib() -> float:
    """Memory of this process that is in use now, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def keys(start: int, stop: int) -> tuple[pa.Array, pa.Array]:
    """prompt_id and sample_index of rows in table order."""
    row = np.arange(start, stop)
    names = [f"{prompt:064x}" for prompt in np.unique(row // _RESPONSES)]
    place = row // _RESPONSES - row[0] // _RESPONSES
    ids = pa.DictionaryArray.from_arrays(pa.array(place, pa.int32()), pa.array(names)).cast(pa.string())
    return ids, pa.array(row % _RESPONSES, pa.int32())


def samples_shard(start: int, stop: int, rng: np.random.Generator) -> pa.Table:
    """Short responses of random tokens."""
    n = stop - start
    ids, index = keys(start, stop)
    offsets = pa.array(np.arange(n + 1) * _TOKENS, pa.int32())
    tokens = rng.integers(3, 1000, size=(2, n * _TOKENS)).astype(np.int32)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(row)) for row in tokens]
    words = np.char.mod("%d", tokens[1].reshape(n, _TOKENS)[:, :8])
    return pa.table(
        {
            "prompt_id": ids,
            "sample_index": index,
            "completion": [" ".join(row) for row in words],
            "prompt_token_ids": lists[0],
            "completion_token_ids": lists[1],
            "finish_reason": pa.array(["stop"] * n),
            "seed": np.arange(start, stop),
            "sampler_logp": rng.normal(-40, 5, size=n),
        },
        schema=SAMPLES,
    )


def scores_shard(start: int, stop: int, rng: np.random.Generator) -> pa.Table:
    """Random scores."""
    ids, index = keys(start, stop)
    n = stop - start
    columns = {"value": rng.normal(size=n), "scored_sha256": ["0" * 64] * n, "truncated": np.zeros(n, dtype=bool)}
    return pa.table({"prompt_id": ids, "sample_index": index, **columns}, schema=SCORES)


def write(table: ShardedTable, shard: Callable[..., pa.Table], n_rows: int, *, seed: int, name: str) -> dict[str, Any]:
    """Write a table in shards; time of making the rows excluded."""
    rng = np.random.default_rng(seed)
    seconds, early = 0.0, 0.0
    starts = range(0, n_rows, _SHARD_ROWS)
    for number, start in enumerate(tqdm(starts, desc=name, unit=" shards", leave=False)):
        rows = shard(start, min(start + _SHARD_ROWS, n_rows), rng)
        began = time.perf_counter()
        table.write_shard(rows, split="train", order=f"{number:06d}")
        seconds += time.perf_counter() - began
        if number == len(starts) // 10:
            early = memory_gib()
    began = time.perf_counter()
    table.finish()
    seconds += time.perf_counter() - began
    size = sum(path.stat().st_size for path in table.paths("train")) / n_rows
    return {
        "work": name,
        "rows": n_rows,
        "seconds": seconds,
        "early_gib": early,
        "gib": memory_gib(),
        "bytes_a_row": size,
    }


def rule(rows: Sequence[Any]) -> list[float]:
    """A scorer in a few words: how many digits a response has."""
    return [float(sum(map(str.isdigit, row.completion))) for row in rows]


def score(folder: Path, n_rows: int) -> Iterator[dict[str, Any]]:
    """Score a samples table with a Python function, then call again with nothing left to do."""
    samples = ShardedTable(folder / "few", SAMPLES, {})
    write(samples, samples_shard, n_rows, seed=3, name="samples for the scorer")
    messages = {f"{prompt:064x}": [{"role": "user", "content": "?"}] for prompt in range(-(-n_rows // _RESPONSES))}
    for name in ("score by a Python function", "the same, nothing left to do"):
        began, early = time.perf_counter(), memory_gib()
        counts = score_tables(
            scorer_factory=partial(PythonScorer, "benchmarks.stage1_tables:rule", folders=(".",)),
            samples=samples,
            splits=("train",),
            messages=messages,
            tables={"rule": ShardedTable(folder / "rule", SCORES, {})},
            show_progress=True,
        )
        rows = counts.rows_scored + counts.rows_present
        seconds = time.perf_counter() - began
        yield {"work": name, "rows": rows, "seconds": seconds, "early_gib": early, "gib": memory_gib()}


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--score-rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="the rows as JSON")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.score_rows = args.rows // 100, args.score_rows // 100
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        samples = ShardedTable(folder / "samples", SAMPLES, {})
        scores = {score: ShardedTable(folder / score, SCORES, {}) for score in ("reward", "harmless")}
        results.append(write(samples, samples_shard, args.rows, seed=0, name="write samples"))
        for seed, (score_name, table) in enumerate(scores.items(), start=1):
            results.append(write(table, scores_shard, args.rows, seed=seed, name=f"write scores of {score_name}"))
        began, early = time.perf_counter(), memory_gib()
        rows, _ = read_scores(
            samples, scores, reward="reward", constraints=["harmless"], split="train", max_unscored=0
        )
        seconds = time.perf_counter() - began
        results.append(
            {
                "work": "join both on the key",
                "rows": rows.n_samples,
                "seconds": seconds,
                "early_gib": early,
                "gib": memory_gib(),
            }
        )
        del rows
        results.extend(score(folder, args.score_rows))
    print("| work | rows | seconds | rows/s | GiB early | GiB at the end | bytes a row |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        size = f"{row['bytes_a_row']:.0f}" if "bytes_a_row" in row else ""
        print(
            f"| {row['work']} | {row['rows']:,} | {row['seconds']:.1f} | {row['rows'] / row['seconds']:,.0f} "
            f"| {row['early_gib']:.2f} | {row['gib']:.2f} | {size} |"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {peak:.2f} GiB")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
