"""What it takes to learn on a published model: how much of the score can be foreseen, and what training makes of it.

    python benchmarks/real_model_study.py --config smollm2 --run smollm2 [--only ROW ...] [--threads 1]

Needs a run whose stage 1 is done (`make stage1 CONFIG=smollm2`). Everything is judged on the same held-out train
prompts, from the reference's scored responses (:mod:`stage2_policy.held_out`): the closed fraction of a policy whose
log-ratios are what a row says. No policy is sampled, so that a row costs its training alone. Two kinds of rows:

- *foreseen*: the linear reading of :mod:`stage2_policy.foresight`, which is the forecast of a training run, by share
  of the response that is read, and by prompts and responses that it is fitted on. It has no network to train and no
  rate to miss.
- *trained*: stage 2 as it is, at some rate, with all weights or an adapter, or by one step of the natural gradient.

Rows already in `real_model_study/` of the run are kept, so a killed study continues.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import write_json
from pipeline.run.run import Run
from stage2_policy.adapters import AdapterSettings, attach_adapter
from stage2_policy.data import TrainingData, read_training_data
from stage2_policy.foresight import judge_reading, read_states
from stage2_policy.reference import ReferenceLogp, arithmetic, reference_store, score_reference
from stage2_policy.settings import TrainSettings
from stage2_policy.tilted_trainer import Policy
from stage2_policy.trainer import fit_by_optimizer

READ = (0.25, 0.5, 0.75, 1.0)
"""Shares of a response that a reading sees."""

Change = Mapping[str, Any]
"""What differs from one epoch of `tilted_pairwise`."""

_LORA = {"adapter": "lora", "lora_r": 16}
_NATURAL = {"optimizer": "natural_gradient", "adapter": "lora"}
_LAST_LAYERS = r".*\.layers\.2[5-9]\..*_proj"
"""Of the 30 of SmolLM2-135M, as peft reads it."""

TRAINED: dict[str, Change] = {
    "all weights, 1e-5": {"learning_rate": 1e-5},
    "all weights, 2e-5": {"learning_rate": 2e-5},
    "all weights, 5e-5": {"learning_rate": 5e-5},
    "all weights, 1e-4": {"learning_rate": 1e-4},
    "all weights, 2e-4": {"learning_rate": 2e-4},
    "all weights, 5e-5, 3 epochs": {"learning_rate": 5e-5, "epochs": 3.0},
    "LoRA of rank 16, 3e-5": {"learning_rate": 3e-5, **_LORA},
    "LoRA of rank 16, 1e-4": {"learning_rate": 1e-4, **_LORA},
    "LoRA of rank 16, 3e-4": {"learning_rate": 3e-4, **_LORA},
    "LoRA of rank 16, 1e-3": {"learning_rate": 1e-3, **_LORA},
    "LoRA of rank 16, 2e-3": {"learning_rate": 2e-3, **_LORA},
    "LoRA of rank 16, 1e-3, 3 epochs": {"learning_rate": 1e-3, "epochs": 3.0, **_LORA},
    "natural gradient, rank 2": {"lora_r": 2, **_NATURAL},
    "natural gradient, rank 2, last 5 layers": {"lora_r": 2, "lora_target_modules": _LAST_LAYERS, **_NATURAL},
    "natural gradient, LoRA of rank 12, last 5 layers": {
        "lora_r": 12,
        "lora_target_modules": _LAST_LAYERS,
        **_NATURAL,
    },
}


class Study:
    """What all rows share: the responses, the reference, its log-probabilities and its hidden states."""

    def __init__(self, run: Run, *, held_out: float, tokens_per_microbatch: int, dtype: str) -> None:
        self._dtype = dtype
        self._run = run
        self._tokens = tokens_per_microbatch
        self._reference = Path(run.model(run.config.reference, "reference"))
        self._held_out = held_out
        self.data: TrainingData = read_training_data(
            reference=self._reference,
            **{name: run.folder / name for name in ("samples", "tilted", "dual")},
            held_out_fraction=held_out,
        )

    @cached_property
    def ref_logp(self) -> ReferenceLogp:
        """Log-probabilities under the reference, which all trained rows share."""
        settings = self.settings({})
        store = reference_store(self._run.reference_logp, self.data, settings)
        return score_reference(self._load(), self.data, settings=settings, show_progress=True, store=store)

    def settings(self, row: Change) -> TrainSettings:
        """Of a training run."""
        return TrainSettings(
            **{
                "held_out_fraction": self._held_out,
                "epochs": 1.0,
                "tokens_per_step": 4096,
                "tokens_per_microbatch": self._tokens,
                "dtype": self._dtype,
                "evaluations": 3,
                "patience": 99,
                **row,
            }
        )

    def train(self, row: Change, folder: Path) -> dict[str, Any]:
        """Train one row; its curve on the held-out prompts."""
        settings, seed = self.settings(row), self._run.config.seed
        set_seed(seed)
        base = self._load()
        policy: Policy = base
        if settings.adapter == "lora":
            adapter = AdapterSettings(settings.lora_r, settings.lora_alpha, settings.lora_target_modules, seed)
            policy = attach_adapter(base, adapter)
        started = time.monotonic()
        fit = fit_by_optimizer(
            policy,
            self.data,
            ref_logp=self.ref_logp,
            settings=settings,
            seed=seed,
            checkpoints=folder,
            show_progress=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return {
            "closed_fraction": fit.held_out.closed_fraction,
            "closed_fraction_error": fit.held_out.closed_fraction_error,
            "kl": fit.held_out.kl,
            "n_prompts": len(self.data.train.prompt_ids),
            "n_responses": len(self.data.train),
            "steps": fit.steps,
            "seconds": time.monotonic() - started,
            "curve": [entry for entry in fit.curve if "eval_loss" in entry],
        }

    def foresee(self, states: Mapping[str, np.ndarray], *, prompts: float, responses: int) -> dict[str, Any]:
        """The reading fitted on some of the training responses, judged on the held-out prompts."""
        train, held_out = self.data.train, self.data.held_out
        place_n = np.arange(len(train)) - np.flatnonzero(np.diff(train.prompt_p, prepend=-1))[train.prompt_p]
        kept = np.flatnonzero((train.prompt_p < prompts * len(train.prompt_ids)) & (place_n < responses))
        reading = judge_reading(
            (states["train"][kept], self.data.columns("train", kept), train.prompt_p[kept]),
            (states["held_out"], self.data.columns("held_out", np.arange(len(held_out))), held_out.prompt_p),
            nats=self.data.nats,
        )
        return asdict(reading)

    def states(self) -> dict[str, np.ndarray]:
        """The reference's hidden states over each share of each response, by split, shape (shares, n, features)."""
        model = self._load()
        with arithmetic(self._dtype, model.device):
            return {
                name: read_states(
                    model, rows, np.arange(len(rows)), shares=READ, token_budget=self._tokens, show_progress=True
                )
                for name, rows in (("train", self.data.train), ("held_out", self.data.held_out))
            }

    def _load(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._reference, dtype=torch.float32)
        return model


def write_table(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One line a row, Markdown."""
    head = ("row", "prompts", "responses", "closed fraction, held out", "KL", "variance of s explained", "steps", "s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in results.items():
        error = row["closed_fraction_error"]
        cells = (
            name,
            f"{row['n_prompts']}",
            f"{row['n_responses']}",
            f"{row['closed_fraction']:.3f}" + (f" ± {error:.3f}" if error is not None else ""),
            f"{row['kl']:.3f}" if "kl" in row else "",
            f"{row['explained']:.3f}" if "explained" in row else "",
            f"{row['steps']}" if "steps" in row else "",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _foreseen_rows(n_responses: int) -> dict[str, tuple[float, float, int]]:
    """Rows of the reading: share of the response read, share of the prompts, responses a prompt."""
    rows = {f"foreseen, {share:.0%} of the response read": (share, 1.0, n_responses) for share in READ}
    rows |= {f"foreseen, whole, {part:.0%} of the prompts": (1.0, part, n_responses) for part in (0.25, 0.5)}
    some = (n_responses // 4, n_responses // 2)
    return rows | {f"foreseen, whole, {k} responses a prompt": (1.0, 1.0, k) for k in some if k > 1}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows that are not there yet, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2")
    parser.add_argument("--run", default="smollm2", help="name of a run whose stage 1 is done")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("SETTING", "VALUE"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="*", choices=["foreseen", *TRAINED], default=["foreseen", *TRAINED])
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the train prompts that judge")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a microbatch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the arithmetic")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    config = load_config(Path(args.config), dict(args.set))
    study = Study(
        Run(config, args.run, args.data_dir),
        held_out=args.held_out,
        tokens_per_microbatch=args.tokens,
        dtype=args.dtype,
    )
    folder = args.data_dir / "runs" / args.run / "real_model_study"
    folder.mkdir(exist_ok=True)
    kept = folder / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def keep(name: str, row: dict[str, Any]) -> None:
        results[name] = row
        write_json(kept, results)
        write_table(results, folder / "table.md")
        print(f"{name}: closed fraction {row['closed_fraction']:.3f}", flush=True)

    rows = _foreseen_rows(config.sampling.samples_per_prompt)
    missing = {name: row for name, row in rows.items() if name not in results} if "foreseen" in args.only else {}
    states = study.states() if missing else {}
    for name, (share, prompts, responses) in missing.items():
        read = {split: by_share[READ.index(share)] for split, by_share in states.items()}
        keep(name, study.foresee(read, prompts=prompts, responses=responses))
    for name in (name for name in TRAINED if name in args.only and name not in results):
        keep(name, study.train(TRAINED[name], folder / "checkpoints"))


if __name__ == "__main__":
    main()
