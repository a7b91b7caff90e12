"""A finished stage 1 on a tiny random policy: samples, dual and tilted table as real artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.solutions import bound, build_solution
from helpers.tiny_models import save_tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.contracts.artifacts import (
    Manifest,
    checkpoint_sha256,
    file_sha256,
    read_manifest,
    write_json,
    write_manifest,
)
from pipeline.contracts.shards import ShardedTable, write_table
from pipeline.contracts.tables import SAMPLES, prompt_id, tilted_schema

Rows = Sequence[Mapping[str, Any]]

MULTIPLIER, THRESHOLD = 0.7, 0.2
N_SAMPLES = (6, 9, 6, 4, 6, 6, 12, 6)
"""Responses of each prompt: not all the same."""


_RECIPE = """
beta: 0.5
prompts: {source: prompts.jsonl}
reference: {model: REFERENCE}
scorers: {helpful: {model: REFERENCE}, harm: {model: REFERENCE}}
reward: helpful
constraints: {harm: {direction: "<=", threshold: 0.2}}
training: {epochs: 1, tokens_per_step: 300, tokens_per_microbatch: 120, held_out_fraction: 0.25, evaluations: 1}
"""


@dataclass(frozen=True)
class StageOne:
    """Folders of the artifacts, named as the arguments of what reads them."""

    reference: Path
    samples: Path
    tilted: Path
    dual: Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors are tiny: a second thread only waits


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("models") / "reference")


@pytest.fixture(scope="session")
def reference_model(reference: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)


@pytest.fixture(scope="session")
def rows(reference: Path, reference_model: PreTrainedModel) -> Rows:
    return _draw_rows(reference, reference_model)


@pytest.fixture(scope="session")
def taught_stage_one(
    reference: Path,
    reference_model: PreTrainedModel,
    write_stage_one: Callable[..., StageOne],
    tmp_path_factory: pytest.TempPathFactory,
) -> StageOne:
    """Of 96 prompts with 8 responses, whose reward can be learnt: a sum over tokens, linear in their embeddings."""
    rows = _draw_rows(reference, reference_model, [8] * 96)
    embeddings = reference_model.get_input_embeddings().weight.detach().double().numpy()
    worth = embeddings @ np.random.default_rng(0).standard_normal(embeddings.shape[1])
    worth = (worth - worth.mean()) / worth.std() / 8
    taught = [
        {
            **row,
            "reward": float(worth[row["completion_token_ids"]].sum()),
            "constraint_harm": row["constraint_harm"] / 10,
        }
        for row in rows
    ]
    return write_stage_one(tmp_path_factory.mktemp("taught"), taught)


@pytest.fixture(scope="session")
def write_stage_one(reference: Path) -> Callable[..., StageOne]:
    """Writes every file and manifest as the pipeline does; what the tilted table holds can be changed."""

    def write(
        run: Path, rows: Rows, *, tilted_rows: Rows | None = None, beta: float = 0.5, n_unscored: int = 0
    ) -> StageOne:
        _write_samples(run / "samples", rows, reference=reference)
        _write_dual(run / "dual", samples=run / "samples", beta=beta, n_samples=len(rows) - n_unscored)
        tilted = _tilt(rows, beta=beta) if tilted_rows is None else tilted_rows
        _write_tilted(run / "tilted", tilted, samples=run / "samples", dual=run / "dual")
        return StageOne(reference, run / "samples", run / "tilted", run / "dual")

    return write


@pytest.fixture(scope="session")
def tilted_rows(rows: Rows) -> Rows:
    return _tilt(rows, beta=0.5)


@pytest.fixture(scope="session")
def stage_one(
    rows: Rows, write_stage_one: Callable[..., StageOne], tmp_path_factory: pytest.TempPathFactory
) -> StageOne:
    return write_stage_one(tmp_path_factory.mktemp("run"), rows)


@pytest.fixture
def stage_one_run(stage_one: StageOne, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe, and a data folder with a run of its name whose stage 1 is done."""
    run = tmp_path / "data" / "runs" / "test"
    for name in ("samples", "tilted", "dual"):
        shutil.copytree(getattr(stage_one, name), run / name)
    write_manifest(run / "prompts", Manifest(step="prepare", run="test", settings={}, inputs={}, files={}))
    (run / "scores").mkdir()
    recipe = tmp_path / "test.yaml"
    recipe.write_text(_RECIPE.replace("REFERENCE", str(stage_one.reference)))
    return recipe, tmp_path / "data"


def _write_samples(folder: Path, rows: Rows, *, reference: Path) -> None:
    table = ShardedTable(folder=folder, schema=SAMPLES, metadata={})
    for order, half in enumerate((rows[1::2], rows[::2])):
        columns = [{name: row[name] for name in SAMPLES.names} for row in half]
        table.write_shard(pa.Table.from_pylist(columns, schema=SAMPLES), split="train", order=str(order))
    _finish(folder, "sample", files=table.finish(), inputs={"reference": checkpoint_sha256(reference)})


def _write_dual(folder: Path, *, samples: Path, beta: float, n_samples: int) -> None:
    solution = build_solution(
        bound("harm", "<=", threshold=THRESHOLD, multiplier=MULTIPLIER, reference=0.5),
        beta=beta,
        n_prompts=len(N_SAMPLES),
        n_samples=n_samples,
    )
    statistics = {
        "reward": {"reference": 0.0, "predicted": 0.6},
        "kl": {"predicted": 0.3},
        "constraints": [{"predicted": 0.2}],
    }
    write_json(folder / "dual.json", solution.to_document(statistics))
    files = {"dual.json": file_sha256(folder / "dual.json")}
    _finish(folder, "solve", files=files, inputs={"samples": read_manifest(samples).identity})


def _write_tilted(folder: Path, rows: Rows, *, samples: Path, dual: Path) -> None:
    schema = tilted_schema(["harm"])
    columns = [{name: row[name] for name in schema.names} for row in [{**row, "category": ""} for row in rows]]
    shuffled = [columns[place] for place in np.random.default_rng(5).permutation(len(columns))]
    files = write_table(folder, pa.Table.from_pylist(shuffled, schema=schema), metadata={})
    inputs = {"samples": read_manifest(samples).identity, "dual": read_manifest(dual).identity}
    _finish(folder, "export", files=files, inputs=inputs)


def _finish(folder: Path, step: str, *, files: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    write_manifest(folder, Manifest(step=step, run="test", settings={}, inputs=inputs, files=files))


def _tilt(rows: Rows, *, beta: float) -> Rows:
    odds = [np.exp((row["reward"] - MULTIPLIER * (row["constraint_harm"] - THRESHOLD)) / beta) for row in rows]
    total: dict[str, float] = {}
    for row, odd in zip(rows, odds, strict=True):
        total[row["prompt_id"]] = total.get(row["prompt_id"], 0.0) + odd
    return [
        {**row, "weight": odd / total[row["prompt_id"]], "split": "train"} for row, odd in zip(rows, odds, strict=True)
    ]


def _draw_rows(reference: Path, model: PreTrainedModel, n_samples: Sequence[int] = N_SAMPLES) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(reference)
    rng = np.random.default_rng(3)
    rows = []
    for place, count in enumerate(n_samples):
        text = " ".join(["rest", "walk", "call a friend"][: 1 + place % 3])
        messages = [{"role": "user", "content": f"{text} {place}"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.random.fork_rng():
            torch.manual_seed(place)
            drawn = model.generate(
                torch.tensor([prompt] * count),
                attention_mask=torch.ones(count, len(prompt), dtype=torch.long),
                do_sample=True,
                top_k=0,
                max_new_tokens=12,
                pad_token_id=tokenizer.pad_token_id,
            )
        for index, ids in enumerate(drawn[:, len(prompt) :].tolist()):
            stopped = tokenizer.eos_token_id in ids
            completion = ids[: ids.index(tokenizer.eos_token_id) + 1] if stopped else ids
            rows.append(
                {
                    "prompt_id": prompt_id(messages),
                    "sample_index": index,
                    "prompt": messages,
                    "completion": tokenizer.decode(completion, skip_special_tokens=True),
                    "prompt_token_ids": prompt,
                    "completion_token_ids": completion,
                    "finish_reason": "stop" if stopped else "length",
                    "seed": place,
                    "sampler_logp": -float(len(completion)),
                    "reward": float(rng.normal(-0.2 * len(completion), 0.1)),  # short is good: easily learnt
                    "constraint_harm": float(rng.normal(0.5)),
                }
            )
    return rows
