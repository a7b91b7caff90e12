"""Time and memory of training's data: from the tables of stage 1 to the first optimisation step.

    python benchmarks/stage2_data.py [--responses 1000000] [--tokens 256] [--prompt-tokens 64]

Writes a finished stage 1 of random tokens (samples, dual, tilted table), log pi_ref of every response as an earlier
training run leaves it, and a reference of one narrow layer, so that what is timed is the data and not a model. Then a
process of its own does what `dualign train` does up to the end of its first step, and a second one what a continued
run or another process of the same training does, which finds the mapped files there. Memory is the most that was
resident, and what was resident after the step: the process's own, and pages of mapped files, which the processes of a
machine share and the system takes back when it needs them. `--tokens 1` tries many rows on a small disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from typing_extensions import override

from pipeline.contracts.artifacts import (
    Manifest,
    checkpoint_sha256,
    content_sha256,
    file_sha256,
    read_manifest,
    write_json,
    write_manifest,
)
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.solution import (
    AppliedSafeguard,
    Demanded,
    Solution,
    SolvedConstraint,
    SolvedReward,
    StatedStatistic,
)
from pipeline.contracts.tables import SAMPLES, tilted_schema
from stage2_policy.adapters import load_reference
from stage2_policy.data import read_training_data, segment_softmax
from stage2_policy.fit import fit_policy
from stage2_policy.reference import SCHEMA, reference_store, score_reference
from stage2_policy.settings import TrainSettings

_SHARD_ROWS = 16_384
_RESPONSES = 128
_VOCABULARY = 1024
_SETTINGS = TrainSettings()


def write_run(folder: Path, *, n_rows: int, tokens: int, prompt_tokens: int) -> None:
    """A finished stage 1 of random tokens, and log pi_ref of its responses."""
    reference = _write_reference(folder / "reference", positions=tokens + prompt_tokens)
    schema = tilted_schema(["harm"])
    samples = ShardedTable(folder / "samples", SAMPLES, {})
    tilted = ShardedTable(folder / "tilted", schema, {})
    solution = _solution(n_prompts=-(-n_rows // _RESPONSES), n_samples=n_rows)
    rng = np.random.default_rng(0)
    for number, start in enumerate(tqdm(range(0, n_rows, _SHARD_ROWS), desc="tables", unit=" shards", leave=False)):
        n = min(_SHARD_ROWS, n_rows - start)
        prompt_n = np.arange(start, start + n) // _RESPONSES
        key = {
            "prompt_id": _ids(prompt_n),
            "sample_index": pa.array(np.arange(start, start + n) % _RESPONSES, pa.int32()),
        }
        prompts = rng.integers(3, _VOCABULARY, size=(prompt_n[-1] - prompt_n[0] + 1, prompt_tokens))
        row = {
            **key,
            "completion": pa.array([""] * n),
            "prompt_token_ids": _lists(prompts[prompt_n - prompt_n[0]]),
            "completion_token_ids": _lists(rng.integers(3, _VOCABULARY, size=(n, tokens))),
            "finish_reason": pa.array(["length"] * n),
            "seed": np.zeros(n, dtype=np.int64),
            "sampler_logp": np.zeros(n),
        }
        samples.write_shard(pa.table(row, schema=SAMPLES), split="train", order=f"{number:06d}")
        scores = {"reward": rng.normal(size=n), "constraint_harm": rng.normal(size=n)}
        tilt = solution.tilt(pa.table(scores))
        row = {
            **key,
            "prompt": pa.array([[{"role": "user", "content": ""}]] * n, schema.field("prompt").type),
            "completion": pa.array([""] * n),
            **scores,
            "weight": segment_softmax(tilt / solution.beta, prompt_n - prompt_n[0]),
            "split": pa.array(["train"] * n),
            "category": pa.array([""] * n),
        }
        tilted.write_shard(pa.table(row, schema=schema), split="train", order=f"{number:06d}")
    identity = _finish(folder / "samples", samples.finish(), {"reference": checkpoint_sha256(reference)})
    statistics = {"reward": {"reference": 0.0, "predicted": 0.0}, "kl": {"predicted": 0.0}, "constraints": [{}]}
    write_json(folder / "dual" / "dual.json", solution.to_document(statistics))
    dual = _finish(folder / "dual", {"dual.json": file_sha256(folder / "dual" / "dual.json")}, {"samples": identity})
    _finish(folder / "tilted", tilted.finish(), {"samples": identity, "dual": dual})
    _write_reference_logp(folder, n_rows=n_rows)


def _write_reference(folder: Path, *, positions: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    words = {f"w{place}": place for place in range(_VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))  # noqa: S106  # no password
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def _write_reference_logp(folder: Path, *, n_rows: int) -> None:
    """The table under the key that training asks for; its keys are read once for that."""
    data = read_training_data(**_folders(folder), held_out_fraction=_SETTINGS.held_out_fraction)
    store = reference_store(folder / "reference_logp", data, _SETTINGS)
    table = ShardedTable(store.table, SCHEMA, {"key": content_sha256(store.key)})
    for number, start in enumerate(range(0, n_rows, _SHARD_ROWS)):
        row_n = np.arange(start, min(start + _SHARD_ROWS, n_rows))
        columns = {
            "prompt_id": _ids(row_n // _RESPONSES),
            "sample_index": pa.array(row_n % _RESPONSES, pa.int32()),
            "ref_logp": np.full(len(row_n), -700.0),
        }
        table.write_shard(pa.table(columns, schema=SCHEMA), split="train", order=f"{number:06d}")
    _finish(store.table, table.finish(), {})


def _folders(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in ("reference", "samples", "tilted", "dual")}


def _finish(folder: Path, files: Mapping[str, str], inputs: Mapping[str, str]) -> str:
    write_manifest(folder, Manifest(step=folder.name, run="data", settings={}, inputs=inputs, files=files))
    return read_manifest(folder).identity


def _ids(prompt_n: np.ndarray) -> pa.Array:
    names = pa.array([f"{prompt:064x}" for prompt in range(prompt_n[0], prompt_n[-1] + 1)])
    return names.take(pa.array(prompt_n - prompt_n[0]))


def _lists(tokens: np.ndarray) -> pa.Array:
    offsets = np.arange(len(tokens) + 1) * tokens.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens.ravel(), pa.int32()))


def _solution(*, n_prompts: int, n_samples: int) -> Solution:
    bound = SolvedConstraint(
        name="harm",
        score="harm",
        statistic=StatedStatistic(),
        direction="<=",
        threshold=0.0,
        margin=None,
        demanded=Demanded(threshold=0.0, margin=None),
        safeguard=AppliedSafeguard(
            reserve=0.0, assurance=0.0, assurance_level=None, score_error=0.0, response_bias=0.0
        ),
        reference=0.0,
        certified_at=None,
        column_ratio=None,
        column_threshold=0.0,
        multiplier=0.5,
    )
    reward = SolvedReward(name="reward")
    return Solution(beta=1.0, n_prompts=n_prompts, n_samples=n_samples, reward=reward, constraints=(bound,))


class _FirstStepTakenError(Exception):
    pass


class _AfterFirstStep(TrainerCallback):
    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        raise _FirstStepTakenError


def take_first_step(folder: Path) -> dict[str, float]:
    """What `dualign train` does up to the end of its first step: seconds of each part, and memory in GiB."""
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    data = read_training_data(
        **_folders(folder), held_out_fraction=_SETTINGS.held_out_fraction, mapped=folder / "mapped"
    )
    mark("tables read and joined, or mapped")
    model = load_reference(folder / "reference", adapter="none", dtype="float32", device=torch.device("cpu"))
    store = reference_store(folder / "reference_logp", data, _SETTINGS)
    ref_logp = score_reference(model, data, settings=_SETTINGS, show_progress=False, store=store)
    mark("log pi_ref joined")
    try:
        fit_policy(
            model,
            data,
            ref_logp=ref_logp,
            settings=_SETTINGS,
            seed=0,
            checkpoints=folder / "checkpoints",
            show_progress=False,
            callbacks=[_AfterFirstStep()],
        )
    except _FirstStepTakenError:
        mark("first step")
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    memory = {name: int(status[name]) / 2**20 for name in ("VmHWM", "RssAnon", "RssFile")}
    seconds = {name: at - before for (_, before), (name, at) in itertools.pairwise(marks)}
    return {**seconds, "in all": marks[-1][1] - marks[0][1], **memory}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the run, and measure two processes on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=256, help="of a response")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="the figures as JSON")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.step is not None:
        print(json.dumps(take_first_step(args.step)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_run(folder, n_rows=args.responses, tokens=args.tokens, prompt_tokens=args.prompt_tokens)
        found: dict[str, dict[str, float]] = {}
        for which in ("first process", "next process"):
            command = [sys.executable, __file__, "--step", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # ourselves
            found[which] = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        size = sum(path.stat().st_size for path in (folder / "mapped").iterdir())
    print(f"{args.responses:,} responses of {args.tokens} tokens; mapped files {size / 1e9:.2f} GB")
    print("| |" + "|".join(found) + "|\n|---|---|---|")
    for label in next(iter(found.values())):
        unit = "GiB" if label in {"VmHWM", "RssAnon", "RssFile"} else "s"
        print(f"| {label} |" + "|".join(f" {row[label]:.2f} {unit} " for row in found.values()) + "|")
    if args.output is not None:
        args.output.write_text(json.dumps({"arguments": vars(args), "found": found}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
