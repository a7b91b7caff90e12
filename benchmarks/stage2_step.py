"""Seconds of a training step on a real checkpoint: ours against a plain supervised step of the same tokens, in turn.

    python benchmarks/stage2_step.py --model FOLDER [--adapter none lora] [--dtype float32 bfloat16] [--threads 1]

Ours is the TiltedTrainer with its default objective; `plain` is the Trainer of transformers with the likelihood of the
same responses, whose microbatches hold the same rows, padded to the longest as its users do. Both train the same
weights of the checkpoint in memory, take whole optimisation steps (gradients clipped, AdamW), and take turns: ours,
plain, ours, plain, ..., some steps each, of which the first is left out. Token ids are random. Shapes are prompt and
response in tokens, the responses from half of that to all of it; eight responses to a prompt.

The clock is the processor time of the process, all its threads together, which other work on the machine disturbs
less than it does the wall; with `--threads 1` both say the same on an idle machine. Reported are the medians over all
steps, their ratio (plain over ours: 1 is as fast, 0.95 is the aim), and the lowest and highest ratio of one turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from stage2_policy.adapters import AdapterSettings, attach_adapter, load_reference
from stage2_policy.data import TrainingResponses
from stage2_policy.losses import tilted_pairwise
from stage2_policy.step_sampler import GroupedRow, StepSampler
from stage2_policy.tilted_trainer import Policy, RowNumbers, TiltedTrainer
from stage2_policy.token_sequences import TokenSequences

SHAPES = {"chat": (64, 64), "long response": (16, 192), "long prompt": (256, 64)}
_GROUP = 8
_PROMPTS = 1


class _StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.process_time()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.process_time() - self._since)


class _PlainTrainer(Trainer):
    """The Trainer of transformers on the rows of another's microbatches."""

    def __init__(self, model: Policy, args: TrainingArguments, data: TrainingResponses, sampler: StepSampler) -> None:
        super().__init__(model, args, train_dataset=RowNumbers(len(data)))
        self._data, self._sampler = data, sampler

    @override
    def get_train_dataloader(self) -> DataLoader[GroupedRow]:
        return DataLoader(RowNumbers(len(self._data)), batch_sampler=self._sampler, collate_fn=self._collate)

    def _collate(self, items: list[GroupedRow]) -> dict[str, torch.Tensor]:
        rows = [self._data.sequences[row] for row, _ in items]
        width = max(len(prompt) + len(done) for prompt, done in rows)
        batch = {
            "input_ids": torch.zeros((len(rows), width), dtype=torch.int64),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
            "labels": torch.full((len(rows), width), -100),
        }
        for place, (prompt, done) in enumerate(rows):
            tokens = torch.from_numpy(np.concatenate([prompt, done]).astype(np.int64))
            batch["input_ids"][place, : len(tokens)] = tokens
            batch["attention_mask"][place, : len(tokens)] = 1
            batch["labels"][place, len(prompt) : len(tokens)] = tokens[len(prompt) :]
        return batch


def draw_responses(prompt: int, response: int, *, vocabulary: int) -> TrainingResponses:
    """Random tokens, and the tilt of normal scores."""
    rng = np.random.default_rng(0)
    n = _PROMPTS * _GROUP
    pairs = []
    for _ in range(_PROMPTS):
        asked = rng.integers(vocabulary, size=prompt)
        pairs += [(asked, rng.integers(vocabulary, size=rng.integers(response // 2, response + 1))) for _ in range(8)]
    return TrainingResponses(
        prompt_ids=tuple(f"{place:064d}" for place in range(_PROMPTS)),
        prompt_p=np.repeat(np.arange(_PROMPTS), _GROUP),
        sample_index=np.tile(np.arange(_GROUP), _PROMPTS),
        sequences=TokenSequences.of(pairs),
        weight=np.full(n, 1 / _GROUP),
        tilt=rng.normal(size=n),
        sampler_logp=np.zeros(n),
    )


def measure(model: Policy, data: TrainingResponses, *, dtype: str, turns: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of ours and of the plain one, in turn."""
    sampler = StepSampler(
        data.lengths,
        data.prompt_p,
        tokens_per_step=int(data.lengths.sum()),
        tokens_per_microbatch=round(1.25 * data.lengths.sum() / 2),
        responses_per_group=_GROUP,
        seed=0,
    )
    seconds: dict[str, list[list[float]]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps + 1,
            "learning_rate": 1e-6,
            "bf16": dtype == "bfloat16",
            "gradient_accumulation_steps": sampler.microbatches_per_step,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": not torch.accelerator.is_available(),
        }
        for _ in range(turns):
            for name, runs in seconds.items():
                clock = _StepClock()
                args = TrainingArguments(**arguments)
                trainer: Trainer
                if name == "ours":
                    trainer = TiltedTrainer(
                        model,
                        args,
                        row_loss=tilted_pairwise,
                        train=data,
                        ref_logp=np.full(len(data), -100.0),
                        held_out=data,
                        held_out_ref_logp=np.zeros(len(data)),
                        sampler=sampler,
                        beta=1.0,
                        label_seed=0,
                        token_budget=8192,
                        callbacks=[clock],
                    )
                else:
                    trainer = _PlainTrainer(model, args, data, sampler)
                    trainer.add_callback(clock)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                runs.append(clock.seconds[1:])
                del trainer
                gc.collect()
    medians = {name: statistics.median(np.concatenate(runs).tolist()) for name, runs in seconds.items()}
    by_turn = [
        statistics.median(plain) / statistics.median(ours)
        for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)
    ]
    return {
        **medians,
        "ratio": medians["plain"] / medians["ours"],
        "lowest": min(by_turn),
        "highest": max(by_turn),
        "tokens": int(data.lengths.sum()),
        "microbatches": sampler.microbatches_per_step,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--adapter", nargs="+", choices=("none", "lora"), default=("none", "lora"))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of a turn that are counted")
    parser.add_argument("--output", type=Path, help="the figures as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    print("| adapter | dtype | shape | ours, s | plain, s | plain / ours | by turn |\n|---|---|---|---|---|---|---|")
    for adapter in args.adapter:
        for dtype in args.dtype:
            base = load_reference(args.model, adapter=adapter, dtype=dtype, device=device)
            model: Policy = base
            if adapter == "lora":
                settings = AdapterSettings(r=16, alpha=32, target_modules="all-linear", seed=0)
                model = attach_adapter(base, settings)
            for shape in args.shape:
                data = draw_responses(*SHAPES[shape], vocabulary=base.config.get_text_config().vocab_size)
                row = measure(model, data, dtype=dtype, turns=args.turns, steps=args.steps)
                found.append({"adapter": adapter, "dtype": dtype, "shape": shape, **row})
                print(
                    f"| {adapter} | {dtype} | {shape} | {row['ours']:.2f} | {row['plain']:.2f} | {row['ratio']:.2f} "
                    f"| {row['lowest']:.2f} to {row['highest']:.2f} |",
                    flush=True,
                )
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
