"""The table that stage 1 hands on: every response with its scores and its weight under the tilted policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, StrictUndefined

from pipeline.contracts.artifacts import atomic_write_bytes
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SAMPLE_KEY, tilted_schema
from pipeline.scores import ScoredRows
from pipeline.solving import tilted_weights

_CARD = Path(__file__).parent / "dataset_card.md.jinja"
_ROWS_PER_FILE = 100_000


def write_tilted_table(
    folder: Path,
    *,
    prompts: pa.Table,
    samples: ShardedTable,
    scored: Mapping[str, ScoredRows],
    dual: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> tuple[dict[str, str], int]:
    """Join prompts, completions, scores and weights by key and write them, one file of samples in memory at a time.

    Args:
        folder: of the table.
        prompts: the prompts table.
        samples: the samples table.
        scored: the scored samples of each split.
        dual: content of ``dual.json``.
        metadata: key-value metadata of every file.

    Returns:
        The path of each file relative to the folder and its sha256, and the number of rows.
    """
    names = [entry["name"] for entry in dual["constraints"]]
    table = ShardedTable(folder=folder, schema=tilted_schema(names), metadata=metadata)
    about = {row["prompt_id"]: row for row in prompts.select(["prompt_id", "prompt", "category"]).to_pylist()}
    n_rows = 0
    for split, rows in scored.items():
        weight_n = tilted_weights(rows, dual)
        pieces = (
            _tilted_rows(read_parquet(path, columns=[*SAMPLE_KEY, "completion"]), rows, weight_n, about, names, split)
            for path in samples.paths(split)
        )
        for number, piece in enumerate(_regrouped(pieces)):
            n_rows += piece.num_rows
            table.write_shard(piece, split=split, order=f"{number:06d}")
    return table.finish(), n_rows


def write_dataset_card(
    folder: Path, *, dual: Mapping[str, Any], n_rows: int, run: str, inputs: Mapping[str, str]
) -> None:
    """Write the card that Hugging Face tools and people read first."""
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701  # Markdown, not HTML
    template = environment.from_string(_CARD.read_text(encoding="utf-8"))
    text = template.render(dual=dual, n_rows=n_rows, run=run, inputs=inputs)
    atomic_write_bytes(folder / "README.md", text.encode())


def _tilted_rows(
    samples: pa.Table,
    scored: ScoredRows,
    weight_n: np.ndarray,
    about: Mapping[str, Mapping[str, Any]],
    names: list[str],
    split: str,
) -> pa.Table:
    found, row_n = scored.find_in(samples)
    texts = samples.take(found)
    schema = tilted_schema(names)
    prompts = [about[prompt_id] for prompt_id in texts["prompt_id"].to_pylist()]
    return pa.table(
        {
            "prompt_id": texts["prompt_id"],
            "sample_index": texts["sample_index"],
            "prompt": pa.array([prompt["prompt"] for prompt in prompts], schema.field("prompt").type),
            "completion": texts["completion"],
            "reward": scored.reward_n[row_n],
            **{CONSTRAINT_PREFIX + name: scored.constraints_nm[row_n, place] for place, name in enumerate(names)},
            "weight": weight_n[row_n],
            "split": [split] * len(row_n),
            "category": [prompt["category"] for prompt in prompts],
        },
        schema=schema,
    )


def _regrouped(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(table.num_rows for table in waiting) >= _ROWS_PER_FILE:
            yield pa.concat_tables(waiting)
            waiting = []
    if any(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting)
