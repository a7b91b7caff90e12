"""Hand-off tables by hand, and what is exported of them, without a run before them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from helpers.solutions import bound, build_solution
from helpers.tabular_policies import TabularWorld
from helpers.tiny_models import save_tiny_policy

from pipeline.config.loading import build_config
from pipeline.contracts.artifacts import Manifest, write_json, write_manifest
from pipeline.contracts.shards import write_table
from pipeline.contracts.tables import prompt_id, tilted_schema
from pipeline.formats.export_format import ExportSettings
from pipeline.formats.prompt_rows import PromptRows
from pipeline.run.run import Run

BETA, MULTIPLIER, THRESHOLD = 0.5, 0.7, 0.2
SETTINGS = ExportSettings(seed=3, pairs_per_prompt=20, lines_per_prompt=40)
N_TRAIN, N_TEST, N_SAMPLES = 12, 3, 16


def write_tilted(
    run: Run,
    *,
    seed: int = 0,
    completions: Sequence[str] | None = None,
    multi_turn: bool = True,
    first_role: str = "user",
) -> pa.Table:
    """A finished hand-off table of random scores with its dual."""
    texts = completions or [f"call a friend {k}" for k in range(12)]
    rng = np.random.default_rng(seed)
    rows = []
    for place in range(N_TRAIN + N_TEST):
        messages = [{"role": first_role, "content": f"walk {place}"}]
        if multi_turn and place % 3 == 0:
            messages = [*messages, {"role": "assistant", "content": "rest"}, {"role": "user", "content": "and then?"}]
        reward, harm = rng.normal(size=N_SAMPLES), rng.normal(size=N_SAMPLES)
        odds = np.exp((reward - MULTIPLIER * (harm - THRESHOLD)) / BETA)
        rows += [
            {
                "prompt_id": prompt_id(messages),
                "sample_index": k,
                "prompt": messages,
                "completion": texts[k % len(texts)],
                "reward": reward[k],
                "constraint_harm": harm[k],
                "weight": odds[k] / odds.sum(),
                "split": "train" if place < N_TRAIN else "test",
                "category": "",
            }
            for k in range(N_SAMPLES)
        ]
    table = pa.Table.from_pylist(rows, schema=tilted_schema(["harm"]))
    solution = build_solution(bound("harm", "<=", threshold=THRESHOLD, multiplier=MULTIPLIER), beta=BETA)
    write_json(run.folder / "dual" / "dual.json", solution.to_document())
    samples = Manifest(step="sample", run=run.name, settings={}, inputs={"reference": "0" * 64}, files={})
    write_manifest(run.samples, samples)
    shutil.rmtree(run.folder / "tilted", ignore_errors=True)
    files = write_table(run.folder / "tilted", table, metadata={})
    write_manifest(run.folder / "tilted", Manifest(step="export", run=run.name, settings={}, inputs={}, files=files))
    return table


def make_run(folder: Path, **reference: str) -> Run:
    """A run whose reference is in ``folder``; only its tokenizer is read."""
    if not (folder / "policy").exists():
        save_tiny_policy(folder / "policy", bos="template")
    tree = {
        "beta": BETA,
        "reference": {"model": str(folder / "policy"), **reference},
        "scorers": {name: {"model": "embedded:helpful"} for name in ("helpful", "harm")},
        "reward": "helpful",
        "constraints": {"harm": {"direction": "<=", "threshold": THRESHOLD}},
    }
    return Run(build_config(tree, source="the test"), "mine", folder, show_progress=False)


def tabular_rows(world: TabularWorld) -> list[PromptRows]:
    """The responses of a world that can be enumerated, each once."""
    return [
        PromptRows(
            prompt_id=f"p{prompt}",
            prompt=[],
            sample_index=np.arange(len(score)),
            completion=[f"y{place}" for place in range(len(score))],
            weight=torch.softmax(score, 0).numpy(),
            score=score.numpy(),
        )
        for prompt, score in enumerate(world.score)
    ]


def read_rows(folder: Path, split: str = "train") -> list[dict]:
    """Rows of a split of a Parquet table."""
    return pq.read_table(next((folder / "data").glob(f"{split}-*.parquet"))).to_pylist()


def read_lines(path: Path) -> list[dict]:
    """Rows of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
