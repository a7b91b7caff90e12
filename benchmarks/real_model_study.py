"""What it takes to learn on a published model: how much of the score can be foreseen, and what training makes of it.

    python benchmarks/real_model_study.py --config smollm2 --run smollm2 [--only ROW ...] [--threads 1]

Needs a run whose stage 1 is done (`make stage1 CONFIG=smollm2`). Everything is judged on the same held-out train
prompts, from the reference's scored responses (:mod:`stage2_policy.held_out`): the closed fraction of a policy whose
log-ratios are what a row says. No policy is sampled, so that a row costs its training alone. Two kinds of rows:

- *foreseen*: a ridge regression of s = (r + <lam*, g - b>) / beta on the reference's own hidden states of a response,
  fitted on the training prompts; its prediction is taken for the log-ratio. It has no network to train and no rate to
  miss, and says what those responses teach about unseen prompts. The penalty is chosen on a tenth of the training
  prompts. By share of the response that is read, and by prompts and responses.
- *trained*: stage 2 as it is, at some rate, with all weights or an adapter.

Rows already in `real_model_study/` of the run are kept, so a killed study continues.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import write_json
from pipeline.progress import progress_bar
from pipeline.run.run import Run
from stage2_policy.adapters import AdapterSettings, attach_adapter
from stage2_policy.data import TrainingData, TrainingResponses, read_training_data, segment_softmax
from stage2_policy.fit import fit_policy
from stage2_policy.held_out import HeldOutEstimate, estimate_held_out
from stage2_policy.reference import ReferenceLogp, reference_store, score_reference
from stage2_policy.settings import TrainSettings
from stage2_policy.tilted_trainer import Policy

READ = (0.25, 0.5, 0.75, 1.0)
"""Shares of a response that a regressor has read."""
PENALTIES = tuple(10.0**power for power in range(-1, 7))
_LAYERS = (0.5, 1.0)
"""Depths whose hidden states a regressor reads, as shares of all layers."""


@dataclass(frozen=True)
class Trained:
    """A way of training: what differs from one epoch of `tilted_pairwise`, and how much of the data it gets."""

    change: Mapping[str, Any]
    prompts: float = 1.0
    responses: int | None = None


_LORA = {"adapter": "lora", "lora_r": 16}

TRAINED: dict[str, Trained] = {
    "all weights, 2e-5": Trained({"learning_rate": 2e-5}),
    "all weights, 5e-5": Trained({"learning_rate": 5e-5}),
    "all weights, 1e-4": Trained({"learning_rate": 1e-4}),
    "all weights, 2e-4": Trained({"learning_rate": 2e-4}),
    "all weights, 5e-5, 3 epochs": Trained({"learning_rate": 5e-5, "epochs": 3.0}),
    "LoRA of rank 16, 3e-4": Trained({"learning_rate": 3e-4, **_LORA}),
    "LoRA of rank 16, 1e-3": Trained({"learning_rate": 1e-3, **_LORA}),
    "LoRA of rank 16, 2e-3": Trained({"learning_rate": 2e-3, **_LORA}),
    "LoRA of rank 16, 1e-3, 3 epochs": Trained({"learning_rate": 1e-3, "epochs": 3.0, **_LORA}),
    "LoRA of rank 16, 1e-3, half the prompts": Trained({"learning_rate": 1e-3, **_LORA}, prompts=0.5),
    "LoRA of rank 16, 1e-3, half the responses": Trained({"learning_rate": 1e-3, **_LORA}, responses=8),
}


class Study:
    """What all rows share: the responses, the reference, its log-probabilities and its hidden states."""

    def __init__(self, run: Run, *, held_out: float, tokens_per_microbatch: int) -> None:
        self._run = run
        self._tokens = tokens_per_microbatch
        self._reference = Path(run.model(run.config.reference, "reference"))
        self._held_out = held_out
        self.data: TrainingData = read_training_data(
            reference=self._reference,
            **{name: run.folder / name for name in ("samples", "tilted", "dual")},
            held_out_fraction=held_out,
        )
        settings = self.settings(Trained({}))
        self.ref_logp: ReferenceLogp = score_reference(
            self._load(),
            self.data,
            settings=settings,
            show_progress=True,
            store=reference_store(run.reference_logp, self.data, settings),
        )

    def settings(self, row: Trained) -> TrainSettings:
        """Of a training run."""
        return TrainSettings(
            **{
                "held_out_fraction": self._held_out,
                "epochs": 1.0,
                "tokens_per_step": 4096,
                "tokens_per_microbatch": self._tokens,
                "evaluations": 3,
                "patience": 99,
                **row.change,
            }
        )

    def train(self, row: Trained, folder: Path) -> dict[str, Any]:
        """Train one row; its curve on the held-out prompts."""
        data, ref_logp = self._thin(row.prompts, row.responses)
        settings, seed = self.settings(row), self._run.config.seed
        set_seed(seed)
        base = self._load()
        policy: Policy = base
        if settings.adapter == "lora":
            adapter = AdapterSettings(settings.lora_r, settings.lora_alpha, settings.lora_target_modules, seed)
            policy = attach_adapter(base, adapter)
        started = time.monotonic()
        fit = fit_policy(
            policy,
            data,
            ref_logp=ref_logp,
            settings=settings,
            seed=seed,
            checkpoints=folder,
            show_progress=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return {
            "held_out": asdict(fit.held_out),
            "n_prompts": len(data.train.prompt_ids),
            "n_responses": len(data.train),
            "steps": fit.steps,
            "seconds": time.monotonic() - started,
            "curve": [entry for entry in fit.curve if "eval_loss" in entry],
        }

    def foresee(self, features: Mapping[str, np.ndarray], *, prompts: float, responses: int | None) -> dict[str, Any]:
        """The regression on some of the training responses; its closed fraction on the held-out prompts."""
        data, _ = self._thin(prompts, responses)
        rows = {key: place for place, key in enumerate(self.data.train.row_keys())}
        chosen = np.array([rows[key] for key in data.train.row_keys()])
        score = data.train.tilt / data.beta
        x = _centred(features["train"][chosen], data.train.prompt_p)
        y = _centred(score[:, None], data.train.prompt_p)[:, 0]
        x_held = features["held_out"]
        n_prompts = len(data.train.prompt_ids)
        tenth = data.train.prompt_p >= n_prompts - max(1, n_prompts // 10)
        errors = [
            float(np.sum((y[tenth] - x[tenth] @ _ridge(x[~tenth], y[~tenth], penalty)) ** 2)) for penalty in PENALTIES
        ]
        penalty = PENALTIES[int(np.argmin(errors))]
        weights = _ridge(x, y, penalty)
        held_out = self.data.held_out
        found: HeldOutEstimate = estimate_held_out(
            held_out,
            logp=self.ref_logp.held_out + x_held @ weights,
            ref_logp=self.ref_logp.held_out,
            beta=self.data.beta,
        )
        own = _centred((held_out.tilt / self.data.beta)[:, None], held_out.prompt_p)[:, 0]
        left = own - _centred((x_held @ weights)[:, None], held_out.prompt_p)[:, 0]
        return {
            "held_out": asdict(found),
            "explained": 1 - float(left @ left) / float(own @ own),
            "penalty": penalty,
            "n_prompts": n_prompts,
            "n_responses": len(data.train),
        }

    def hidden_states(self) -> dict[str, dict[float, np.ndarray]]:
        """Mean and last of the reference's hidden states over the part of each response that is read, by split and
        share of it, shape (n, features).
        """
        model = self._load()
        return {
            name: _read_hidden(model, responses, name)
            for name, responses in (("train", self.data.train), ("held_out", self.data.held_out))
        }

    def _load(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._reference, dtype=torch.float32)
        return model

    def _thin(self, prompts: float, responses: int | None) -> tuple[TrainingData, ReferenceLogp]:
        """The first prompts, and of each the first responses, with weights that are theirs."""
        train = self.data.train
        n_prompts = max(2, round(prompts * len(train.prompt_ids)))
        first = np.flatnonzero(np.diff(train.prompt_p, prepend=-1))
        place = np.arange(len(train)) - first[train.prompt_p]
        kept = np.flatnonzero((train.prompt_p < n_prompts) & (place < (responses or len(train))))
        thinned: TrainingResponses = replace(
            train,
            prompt_ids=train.prompt_ids[:n_prompts],
            prompt_p=train.prompt_p[kept],
            sequences=[train.sequences[row] for row in kept],
            weight=segment_softmax(train.tilt[kept] / self.data.beta, train.prompt_p[kept]),
            tilt=train.tilt[kept],
            sampler_logp=train.sampler_logp[kept],
            sample_index=train.sample_index[kept],
        )
        return replace(self.data, train=thinned), replace(self.ref_logp, train=self.ref_logp.train[kept])


def _read_hidden(model: Any, responses: TrainingResponses, name: str) -> dict[float, np.ndarray]:
    n_layers = model.config.get_text_config().num_hidden_layers
    places = [round(share * n_layers) for share in _LAYERS]
    found: dict[float, list[np.ndarray]] = {share: [] for share in READ}
    order = np.argsort(responses.lengths, kind="stable")
    batches = [order[place : place + 16] for place in range(0, len(order), 16)]
    bar = progress_bar(total=len(batches), doing=f"hidden states, {name}", unit=" batches")
    with bar, torch.no_grad():
        for batch in batches:
            sequences = [responses.sequences[row] for row in batch]
            width = max(len(prompt) + len(done) for prompt, done in sequences)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            for row, (prompt, done) in enumerate(sequences):
                ids[row, : len(prompt) + len(done)] = torch.from_numpy(np.concatenate([prompt, done]).astype(np.int64))
            # Padding stands behind what is read: causal attention does not see it.
            layers = model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states
            for row, (prompt, done) in enumerate(sequences):
                for share in READ:
                    stop = len(prompt) + max(1, round(share * len(done)))
                    states = [layers[place][row, len(prompt) : stop] for place in places]
                    parts = [part for state in states for part in (state.mean(0), state[-1])]
                    found[share].append(torch.cat(parts).numpy())
            bar.update(1)
    back = np.argsort(order, kind="stable")
    return {share: np.stack(rows)[back].astype(np.float64) for share, rows in found.items()}


def _centred(values: np.ndarray, prompt_p: np.ndarray) -> np.ndarray:
    """Less the mean of each prompt: log-ratios are compared within prompts alone."""
    counts = np.bincount(prompt_p)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, prompt_p, values)
    return np.asarray(values - (sums / counts[:, None])[prompt_p])


def _ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Least squares with a penalty on each feature in units of its own spread, shape (features,)."""
    spread = x.std(axis=0) + 1e-12
    scaled = x / spread
    # By the rows, of which there are fewer than features.
    return np.asarray(scaled.T @ np.linalg.solve(scaled @ scaled.T + penalty * np.eye(len(y)), y) / spread)


def write_table(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One line a row, Markdown."""
    head = ("row", "prompts", "responses", "closed fraction, held out", "KL", "variance of s explained", "steps", "s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in results.items():
        held_out = row["held_out"]
        error = held_out["closed_fraction_error"]
        cells = (
            name,
            f"{row['n_prompts']}",
            f"{row['n_responses']}",
            f"{held_out['closed_fraction']:.3f}" + (f" ± {error:.3f}" if error is not None else ""),
            f"{held_out['kl']:.3f}",
            f"{row['explained']:.3f}" if "explained" in row else "",
            f"{row['steps']}" if "steps" in row else "",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _foreseen_rows(n_responses: int) -> dict[str, tuple[float, float, int | None]]:
    """Rows of the regression: share of the response read, share of the prompts, responses a prompt."""
    rows: dict[str, tuple[float, float, int | None]] = {
        f"foreseen, {share:.0%} of the response read": (share, 1.0, None) for share in READ
    }
    rows |= {f"foreseen, whole, {part:.0%} of the prompts": (1.0, part, None) for part in (0.25, 0.5)}
    halves = (n_responses // 4, n_responses // 2)
    return rows | {f"foreseen, whole, {k} responses a prompt": (1.0, 1.0, k) for k in halves if k > 1}


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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    config = load_config(Path(args.config), dict(args.set))
    study = Study(Run(config, args.run, args.data_dir), held_out=args.held_out, tokens_per_microbatch=args.tokens)
    folder = args.data_dir / "runs" / args.run / "real_model_study"
    folder.mkdir(exist_ok=True)
    kept = folder / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def keep(name: str, row: dict[str, Any]) -> None:
        results[name] = row
        write_json(kept, results)
        write_table(results, folder / "table.md")
        print(f"{name}: closed fraction {row['held_out']['closed_fraction']:.3f}", flush=True)

    rows = _foreseen_rows(config.sampling.samples_per_prompt)
    if "foreseen" in args.only and not rows.keys() <= results.keys():
        states = study.hidden_states()
        for name, (share, prompts, responses) in rows.items():
            features = {split: by_share[share] for split, by_share in states.items()}
            keep(name, study.foresee(features, prompts=prompts, responses=responses))
    for name in (name for name in TRAINED if name in args.only and name not in results):
        keep(name, study.train(TRAINED[name], folder / "checkpoints"))


if __name__ == "__main__":
    main()
