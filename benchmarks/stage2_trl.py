"""Closed fraction against wall time: ours against TRL's DPOTrainer on the same scored responses.

    python benchmarks/stage2_trl.py --config embedded [--run NAME] [--quick] [--output FOLDER]

Needs a run whose stage 1 is done (`make stage1`) and TRL (extra `dev`). Both start from the same reference, on the
same training prompts and machine, at the same tokens a step, a cosine after the same warm-up, several learning rates
each. DPOTrainer gets the preference pairs of `dualign export --format trl-preference`, as many responses an epoch as
ours, beta 1, its reference computed beforehand, which is its faster way.

The closed fraction is the estimate on held-out prompts that neither trains on. The clock runs while data are made
ready, the reference is scored and steps are taken, and stands still while a policy is estimated or saved. Written:
every curve (results.json), a table (table.md) and a figure (curves.png). The ratio is the time in which ours first
reaches the best that DPOTrainer ever reaches, over the time in which DPOTrainer does.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from datasets import Dataset
from matplotlib import pyplot
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from typing_extensions import override

from pipeline.config.loading import load_config
from pipeline.contracts.solution import read_solution
from pipeline.formats.export_format import ExportSettings
from pipeline.formats.prompt_rows import read_prompt_rows
from pipeline.formats.trl_preference import build_preferences
from pipeline.run.run import Run
from stage2_policy.data import TrainingData, read_training_data
from stage2_policy.fit import fit_policy
from stage2_policy.held_out import estimate_held_out
from stage2_policy.logprobs import score_sequences
from stage2_policy.reference import score_reference
from stage2_policy.settings import TrainSettings

_HELD_OUT = 0.1
_TOKENS_PER_STEP = 8192


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        our_rates: learning rates of ours.
        dpo_rates: learning rates of DPOTrainer.
        epochs: of both.
        pairs_per_prompt: that DPOTrainer gets.
        n_estimates: points of a curve.
    """

    our_rates: tuple[float, ...]
    dpo_rates: tuple[float, ...]
    epochs: float
    pairs_per_prompt: int
    n_estimates: int


FULL = Size((2e-4, 4e-4), (1e-4, 2e-4, 4e-4), epochs=3.0, pairs_per_prompt=32, n_estimates=16)
QUICK = Size((2e-4,), (1e-4,), epochs=0.2, pairs_per_prompt=16, n_estimates=2)


@dataclass
class Clock:
    """Seconds that were spent on training."""

    seconds: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        """Count the time since the last start."""
        self.seconds += time.monotonic() - self._since

    def start(self) -> None:
        """Go on counting."""
        self._since = time.monotonic()


class Curve(TrainerCallback):
    """Estimates the policy every few steps, the clock standing still meanwhile."""

    def __init__(self, clock: Clock, *, closed_fraction: Callable[[torch.nn.Module], float], n_estimates: int) -> None:
        self._clock = clock
        self._closed_fraction = closed_fraction
        self._n_estimates = n_estimates
        self.points: list[dict[str, float]] = []

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clock.start()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._clock.stop()
        interval = max(1, state.max_steps // self._n_estimates)
        if state.global_step % interval == 0 or state.global_step == state.max_steps:
            value = self._closed_fraction(kwargs["model"])
            self.points.append({"step": state.global_step, "seconds": self._clock.seconds, "closed_fraction": value})


class Comparison:
    """What both share: the data, the reference, the estimate."""

    def __init__(self, run: Run, size: Size) -> None:
        self._run = run
        self._size = size
        self._reference = Path(run.model(run.config.reference, "reference"))
        data = self._read()
        self._held_out = data.held_out
        self._beta = data.beta
        model = self._load()
        self._held_out_ref_logp = score_sequences(
            model, data.held_out.sequences, token_budget=_TOKENS_PER_STEP, show_progress=False
        )

    def ours(self, rate: float) -> list[dict[str, float]]:
        """Train once with `tilted_pairwise`; the curve."""
        clock = Clock()
        data, model = self._read(), self._load()
        settings = TrainSettings(
            learning_rate=rate,
            epochs=self._size.epochs,
            tokens_per_step=_TOKENS_PER_STEP,
            held_out_fraction=_HELD_OUT,
            evaluations=1,
            patience=1,
        )
        ref_logp = score_reference(model, data, settings=settings, show_progress=False)
        clock.stop()
        curve = self._curve(clock)
        with tempfile.TemporaryDirectory() as folder:
            fit_policy(
                model,
                data,
                ref_logp=ref_logp,
                settings=settings,
                seed=0,
                checkpoints=Path(folder),
                show_progress=False,
                callbacks=[curve],
            )
        return curve.points

    def dpo(self, rate: float) -> list[dict[str, float]]:
        """Train DPOTrainer once on the exported pairs; the curve."""
        clock = Clock()
        trained = set(self._read().train.prompt_ids)
        settings = ExportSettings(seed=self._run.config.seed, pairs_per_prompt=self._size.pairs_per_prompt)
        solution = read_solution(self._run.folder / "dual" / "dual.json")
        pairs = [
            {name: row[name] for name in ("prompt", "chosen", "rejected")}
            for prompt in read_prompt_rows(self._run.folder / "tilted", solution, split="train")
            if prompt.prompt_id in trained
            for row in build_preferences(
                prompt, settings, np.random.default_rng([settings.seed, *prompt.prompt_id.encode()])
            )
        ]
        mean_length = np.mean([len(prompt) + len(done) for prompt, done in self._held_out.sequences])
        batch = max(1, min(len(pairs), round(_TOKENS_PER_STEP / 2 / mean_length)))
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder,
                beta=1.0,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, round(TrainSettings().warmup_ratio * self._size.epochs * len(pairs) / batch)),
                num_train_epochs=self._size.epochs,
                per_device_train_batch_size=batch,
                precompute_ref_log_probs=True,
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=not torch.accelerator.is_available(),
                seed=self._run.config.seed,
            )
            trainer = DPOTrainer(
                self._load(),
                args=config,
                train_dataset=Dataset.from_list(pairs),
                processing_class=AutoTokenizer.from_pretrained(self._reference),
            )
            clock.stop()
            curve = self._curve(clock)
            trainer.add_callback(curve)
            trainer.train()
        return curve.points

    def _read(self) -> TrainingData:
        folders = {name: self._run.folder / name for name in ("samples", "tilted", "dual")}
        return read_training_data(reference=self._reference, **folders, held_out_fraction=_HELD_OUT)

    def _load(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._reference, dtype=torch.float32)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        torch.nn.Module.to(model, device or torch.device("cpu"))
        return model

    def _curve(self, clock: Clock) -> Curve:
        def closed_fraction(model: torch.nn.Module) -> float:
            logp = score_sequences(model, self._held_out.sequences, token_budget=_TOKENS_PER_STEP, show_progress=False)
            return estimate_held_out(
                self._held_out, logp=logp, ref_logp=self._held_out_ref_logp, beta=self._beta
            ).closed_fraction

        return Curve(clock, closed_fraction=closed_fraction, n_estimates=self._size.n_estimates)


Curves = Mapping[str, Sequence[Mapping[str, float]]]


def first_time(curves: Curves, level: float) -> float | None:
    """Seconds after which the first of several curves reaches a level, or None."""
    times = [point["seconds"] for curve in curves.values() for point in curve if point["closed_fraction"] >= level]
    return min(times, default=None)


def summarise(results: Mapping[str, Curves]) -> str:
    """The table, Markdown."""
    lines = ["| training | rate | best closed fraction | after s | whole run s |", "|---|---|---|---|---|"]
    for name, curves in results.items():
        for rate, curve in curves.items():
            best = max(curve, key=lambda point: point["closed_fraction"])
            lines.append(
                f"| {name} | {rate} | {best['closed_fraction']:.3f} | {best['seconds']:.0f} "
                f"| {curve[-1]['seconds']:.0f} |"
            )
    level = max(point["closed_fraction"] for curve in results["DPOTrainer"].values() for point in curve)
    theirs, ours = (first_time(results[name], level) for name in ("DPOTrainer", "ours"))
    if ours is None or theirs is None:
        lines += ["", f"Ours does not reach the best of DPOTrainer, {level:.3f}."]
    else:
        lines.append("")
        lines.append(
            f"The best of DPOTrainer, {level:.3f}, after {theirs:.0f} s; ours reaches it after {ours:.0f} s: "
            f"ratio {ours / theirs:.2f}."
        )
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Curves], path: Path) -> None:
    """The curves, a colour for each trainer."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, curves), colour in zip(results.items(), ("#0b6e69", "#b4542b"), strict=True):
        for place, (rate, curve) in enumerate(curves.items()):
            seconds, values = (np.array([point[key] for point in curve]) for key in ("seconds", "closed_fraction"))
            style = ("-", "--", ":", "-.")[place % 4]
            axes.plot(seconds, np.maximum(values, 0.0), style, color=colour, label=f"{name}, {rate}")
    axes.set(xlabel="seconds of training", ylabel="closed fraction (held out, estimated)", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every row, ours and DPOTrainer in turn, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="embedded", help="recipe of the run")
    parser.add_argument("--run", help="name of a run whose stage 1 is done (default: the recipe's)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--quick", action="store_true", help="one rate each, a fifth of an epoch: to see that it runs")
    parser.add_argument("--output", type=Path, help="default: stage2_trl/ in the run's folder")
    args = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    mpl.use("agg")
    config = Path(args.config)
    run = Run(load_config(config), args.run or config.stem, args.data_dir)
    size = QUICK if args.quick else FULL
    output = args.output or run.folder / "stage2_trl"
    output.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(run, size)
    results: dict[str, dict[str, list[dict[str, float]]]] = {"ours": {}, "DPOTrainer": {}}
    for name, rates, train in (
        ("ours", size.our_rates, comparison.ours),
        ("DPOTrainer", size.dpo_rates, comparison.dpo),
    ):
        for rate in rates:
            results[name][f"{rate:g}"] = train(rate)
            (output / "results.json").write_text(json.dumps(results, indent=1))
            print(name, rate, results[name][f"{rate:g}"][-1], flush=True)
    table = summarise(results)
    (output / "table.md").write_text(table, encoding="utf-8")
    draw(results, output / "curves.png")
    print(table)


if __name__ == "__main__":
    main()
