"""The table that stage 1 hands on: every response with its scores and its weight under the tilted policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, StrictUndefined

from pipeline.contracts.artifacts import atomic_write_bytes
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SAMPLE_KEY, tilted_schema
from pipeline.scores import ScoredRows
from pipeline.solving import tilted_weights

_CARD = Path(__file__).parent / "dataset_card.md.jinja"


def build_tilted_table(
    prompts: pa.Table, samples: pa.Table, scored: ScoredRows, *, dual: Mapping[str, Any], split: str
) -> pa.Table:
    """Join prompts, completions, scores and weights of one split by key.

    Args:
        prompts: the prompts table.
        samples: key and completion of this split's samples.
        scored: scores of the same samples, sorted by key.
        dual: content of ``dual.json``.
        split: the split.
    """
    names = [entry["name"] for entry in dual["constraints"]]
    scores = pa.table(
        {
            "prompt_id": pa.array(scored.prompt_id_n, pa.string()),
            "sample_index": pa.array(scored.sample_index_n, pa.int32()),
            "reward": scored.reward_n,
            **{CONSTRAINT_PREFIX + name: scored.constraints_nm[:, place] for place, name in enumerate(names)},
            "weight": tilted_weights(scored, dual),
            "split": pa.array([split] * scored.n_samples, pa.string()),
        }
    )
    key = list(SAMPLE_KEY)
    completions = scores.join(samples, keys=key, join_type="inner")
    texts = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
    joined = completions.sort_by([(name, "ascending") for name in key])
    schema = tilted_schema(names)
    messages = pa.array([texts[prompt] for prompt in joined["prompt_id"].to_pylist()], schema.field("prompt").type)
    return joined.append_column("prompt", messages).select(schema.names).cast(schema)


def write_dataset_card(
    folder: Path, *, dual: Mapping[str, Any], n_rows: int, run: str, inputs: Mapping[str, str]
) -> None:
    """Write the card that Hugging Face tools and people read first."""
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701  # Markdown, not HTML
    template = environment.from_string(_CARD.read_text(encoding="utf-8"))
    text = template.render(dual=dual, n_rows=n_rows, run=run, inputs=inputs)
    atomic_write_bytes(folder / "README.md", text.encode())
