"""Rate and memory of a training step: ours, a plain supervised step, and TRL's DPOTrainer.

    python benchmarks/stage2_gpu.py --size 1b 8b --adapter none lora [--device cuda] [--output FILE]

Random Llama-shaped weights and random tokens, so nothing is downloaded and nothing is learnt: prompts of 128 tokens,
responses of 384, eight responses to a prompt, bf16 arithmetic. Each row is a Trainer of its own that takes real
optimisation steps: ours is the TiltedTrainer with its default objective, `plain` the Trainer of transformers with the
likelihood of the same responses, `DPOTrainer` that of TRL on pairs of them. The reference is scored before the clock
starts (DPOTrainer: precompute_ref_log_probs). The first steps are left out.

Reported: responses trained on a second, tokens a second (prompt and response of each), model-FLOP utilisation and peak
memory of the device. The FLOPs of a step are those it needs at least: 6 a token and weight (4 where an adapter is
trained: fixed weights get no gradient), the head on responses only, and 6 l d T for the causal attention of each of T
tokens in l layers of width d. Ours reads a prompt once for all its responses, which no other does, and the saving is
not taken off. A row that does not fit into the memory says so. Weights of a full run are float32 with AdamW, 16 bytes
a weight: 8b does not fit one card.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from typing_extensions import override

from stage2_policy.adapters import AdapterSettings, attach_adapter
from stage2_policy.data import TrainingResponses
from stage2_policy.losses import tilted_pairwise
from stage2_policy.step_sampler import StepSampler
from stage2_policy.tilted_trainer import Policy, TiltedTrainer
from stage2_policy.token_sequences import TokenSequences

_WARM_UP = 2
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16, by what the name of a device contains, from the makers' data sheets."""


@dataclass(frozen=True)
class Size:
    """A shape of weights and of a step.

    Attributes:
        config: of the model.
        prompt: tokens of a prompt.
        response: tokens of a response.
        step: responses of a step.
        microbatch: responses in memory at once.
    """

    config: LlamaConfig
    prompt: int
    response: int
    step: int
    microbatch: int


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=layers == 16,
    )


SIZES = {
    "tiny": Size(_llama(64, 128, 2, 2, 2, 512), prompt=12, response=20, step=16, microbatch=8),
    "1b": Size(_llama(2048, 8192, 16, 32, 8, 128256), prompt=128, response=384, step=64, microbatch=16),
    "8b": Size(_llama(4096, 14336, 32, 32, 8, 128256), prompt=128, response=384, step=64, microbatch=8),
}
_GROUP = 8


class StepTimer(TrainerCallback):
    """Seconds of each step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = self._now()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(self._now() - self._since)


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        size: name of the shape.
        adapter: none or lora.
        trainer: ours, plain or DPOTrainer.
        responses_per_second: trained on.
        tokens_per_second: prompt and response of each.
        utilisation: model FLOPs over what the device can do, or None where that is not known.
        peak_gib: memory of the device, or None on the CPU.
    """

    size: str
    adapter: str
    trainer: str
    responses_per_second: float | None
    tokens_per_second: float | None
    utilisation: float | None
    peak_gib: float | None


class Bench:
    """Everything that the rows of one shape and adapter share."""

    def __init__(self, name: str, *, adapter: str, device: torch.device, steps: int, recompute: bool) -> None:
        self._name, self._size = name, SIZES[name]
        self._adapter = adapter
        self._device = device
        self._steps = steps + _WARM_UP
        self._recompute = recompute
        rng = np.random.default_rng(0)
        size, n_prompts = self._size, self._size.step // _GROUP
        prompts = rng.integers(3, size.config.vocab_size, size=(n_prompts, size.prompt))
        done = rng.integers(3, size.config.vocab_size, size=(n_prompts, _GROUP, size.response))
        self._sequences = [(prompt, each) for prompt, group in zip(prompts, done, strict=True) for each in group]

    def measure(self, trainer: str) -> Measured:
        """Train some steps and read clock and memory."""
        build: dict[str, Callable[[Policy, str, StepTimer], Trainer]] = {
            "ours": self._ours,
            "plain": self._plain,
            "DPOTrainer": self._dpo,
        }
        timer = StepTimer(self._device)
        try:
            with tempfile.TemporaryDirectory() as folder:
                runner = build[trainer](self._model(), folder, timer)
                self._free()
                runner.train()
            peak = torch.cuda.max_memory_allocated() / 2**30 if self._device.type == "cuda" else None
        except torch.cuda.OutOfMemoryError:
            return Measured(self._name, self._adapter, trainer, None, None, None, None)
        seconds = statistics.median(timer.seconds[_WARM_UP:])
        tokens = self._size.step * (self._size.prompt + self._size.response)
        able = self._peak_flops()
        return Measured(
            self._name,
            self._adapter,
            trainer,
            responses_per_second=self._size.step / seconds,
            tokens_per_second=tokens / seconds,
            utilisation=None if able is None else self._flops() / seconds / able,
            peak_gib=peak,
        )

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _model(self) -> Policy:
        # Weights that are trained are in float32, weights that an adapter leaves fixed in bf16.
        dtype = torch.float32 if self._adapter == "none" else torch.bfloat16
        torch.manual_seed(0)
        with torch.device(self._device):
            model = LlamaForCausalLM(self._size.config)  # type: ignore[no-untyped-call]
            torch.nn.Module.to(model, dtype)
        if self._adapter == "none":
            return model
        return attach_adapter(model, AdapterSettings(r=16, alpha=32, target_modules="all-linear", seed=0))

    def _arguments(self, folder: str) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "max_steps": self._steps,
            "learning_rate": 1e-6,
            "bf16": True,
            "gradient_checkpointing": self._recompute,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": self._device.type == "cuda",
            "use_cpu": self._device.type == "cpu",
        }

    def _ours(self, model: Policy, folder: str, timer: StepTimer) -> Trainer:
        n = len(self._sequences)
        length = self._size.prompt + self._size.response
        data = TrainingResponses(
            prompt_ids=tuple(f"{place:064d}" for place in range(n // _GROUP)),
            prompt_p=np.repeat(np.arange(n // _GROUP), _GROUP),
            sample_index=np.tile(np.arange(_GROUP), n // _GROUP),
            sequences=TokenSequences.of(self._sequences),
            weight=np.full(n, 1 / _GROUP),
            tilt=np.random.default_rng(1).normal(size=n),
            sampler_logp=np.zeros(n),
        )
        sampler = StepSampler(
            data.lengths,
            data.prompt_p,
            tokens_per_step=self._size.step * length,
            tokens_per_microbatch=round(1.25 * self._size.microbatch * length),
            responses_per_group=_GROUP,
            seed=0,
        )
        accumulation = sampler.microbatches_per_step
        return TiltedTrainer(
            model,
            TrainingArguments(**self._arguments(folder), gradient_accumulation_steps=accumulation),
            row_loss=tilted_pairwise,
            train=data,
            ref_logp=np.zeros(n),
            held_out=data,
            held_out_ref_logp=np.zeros(n),
            sampler=sampler,
            beta=1.0,
            label_seed=0,
            token_budget=self._size.microbatch * length,
            callbacks=[timer],
        )

    def _plain(self, model: Policy, folder: str, timer: StepTimer) -> Trainer:
        rows = [
            {
                "input_ids": [*prompt.tolist(), *done.tolist()],
                "labels": [-100] * len(prompt) + done.tolist(),
            }
            for prompt, done in self._sequences
        ]
        return Trainer(
            model,
            TrainingArguments(
                **self._arguments(folder),
                per_device_train_batch_size=self._size.microbatch,
                gradient_accumulation_steps=self._size.step // self._size.microbatch,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=lambda batch: {
                name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")
            },
            callbacks=[timer],
        )

    def _dpo(self, model: Policy, folder: str, timer: StepTimer) -> Trainer:
        words = {word: place for place, word in enumerate(("<bos>", "<eos>", "<pad>"))}
        words |= {f"w{place}": place for place in range(3, self._size.config.vocab_size)}
        core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106  # no password
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"eos_token": "<eos>", "pad_token": "<pad>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)  # type: ignore[no-untyped-call]

        def text(tokens: np.ndarray) -> str:
            return "".join(f" w{token}" for token in tokens)

        pairs = [
            {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
            for (prompt, chosen), (_, rejected) in zip(self._sequences[::2], self._sequences[1::2], strict=True)
        ]
        return DPOTrainer(
            model,
            args=DPOConfig(
                **self._arguments(folder),
                per_device_train_batch_size=self._size.microbatch // 2,
                gradient_accumulation_steps=self._size.step // self._size.microbatch,
                precompute_ref_log_probs=True,
                beta=1.0,
                max_length=None,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[timer],
        )

    def _flops(self) -> float:
        config, size = self._size.config, self._size
        assert config.num_key_value_heads is not None  # every size names its own
        head_width = config.hidden_size // config.num_attention_heads
        attention = 2 * config.hidden_size**2 + 2 * config.hidden_size * head_width * config.num_key_value_heads
        weights = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
        length = size.prompt + size.response
        passes = 3 if self._adapter == "none" else 2
        # The head is applied to responses only, by ours and in what is needed at all.
        products = 2 * passes * (weights * length + config.vocab_size * config.hidden_size * size.response)
        causal = 12 * config.num_hidden_layers * config.hidden_size * length**2 / 2
        return size.step * (products + causal)

    def _peak_flops(self) -> float | None:
        name = torch.cuda.get_device_name() if self._device.type == "cuda" else ""
        return next((flops for part, flops in _PEAK_FLOPS.items() if part in name), None)


def write_table(rows: Sequence[Measured]) -> str:
    """Markdown, each row also relative to the plain step of its kind."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    plain = {(row.size, row.adapter): row.responses_per_second for row in rows if row.trainer == "plain"}
    lines = [
        "| size | adapter | trainer | responses/s | tokens/s | of plain | MFU | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = plain.get((row.size, row.adapter))
        relative = None if base is None or row.responses_per_second is None else row.responses_per_second / base
        rate = "out of memory" if row.responses_per_second is None else show(row.responses_per_second, ".2f")
        lines.append(
            f"| {row.size} | {row.adapter} | {row.trainer} | {rate} | {show(row.tokens_per_second, '.0f')} "
            f"| {show(relative, '.2f')} | {show(row.utilisation, '.1%')} | {show(row.peak_gib, '.1f')} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> list[Measured]:
    """Measure every row and print the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["1b", "8b"])
    parser.add_argument("--adapter", nargs="+", choices=["none", "lora"], default=["none", "lora"])
    parser.add_argument("--trainer", nargs="+", choices=["plain", "ours", "DPOTrainer"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=8, help="timed, after the first ones")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, in every row")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    args = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none; --device cpu --size tiny shows that it runs")
    rows: list[Measured] = []
    for size in args.size:
        for adapter in args.adapter:
            bench = Bench(
                size,
                adapter=adapter,
                device=torch.device(args.device),
                steps=args.steps,
                recompute=args.recompute,
            )
            for trainer in args.trainer or ["plain", "ours", "DPOTrainer"]:
                rows.append(bench.measure(trainer))
                print(write_table(rows), flush=True)
                if args.output:
                    args.output.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


if __name__ == "__main__":
    main()
