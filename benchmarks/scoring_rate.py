"""Texts per second of scoring: ours against one text at a time and unsorted batches of fixed size.

    python benchmarks/scoring_rate.py [--prompts 250] [--samples 16] [--rounds 5]
    python benchmarks/scoring_rate.py --prefix
    python benchmarks/scoring_rate.py --engines
    python benchmarks/scoring_rate.py --architectures

The first compares on the embedded world's harmlessness scorer, with completions of the length mix of chat responses
(log-normal). The second shows what sharing a prompt's computation among its responses gives, by the lengths of both,
on random Llamas; the third vLLM's pooling, checked as by default, against transformers on the same. The fourth prints
how far the two are apart on tiny random checkpoints of every architecture that is pooled. The contenders take turns in
one process; rates are medians over the rounds, ratios medians of the ratios within a round. All start from the same
prompts and completions and include rendering and tokenising. Padding is the share of computed tokens that are padding.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from stage1_dual.checkpoints import Heads
from stage1_dual.scoring.protocol import Score, ScoreRequest
from stage1_dual.scoring.sequence_classification import Engine, SequenceClassificationScorer
from stage1_dual.scoring.vllm_pooling import POOLED, VllmPooling


@dataclass(frozen=True)
class Result:
    """One pass over the rows: the first value of each, and the share of tokens that were padding."""

    values: list[float]
    padding: float


@dataclass(frozen=True)
class Contender:
    """Scores rows, and is closed at the end."""

    run: Callable[[Sequence[ScoreRequest]], Result]
    close: Callable[[], None] = lambda: None


def _read_rows(args: argparse.Namespace, model: str) -> list[ScoreRequest]:
    """Prompts of the world, and completions cut from its prompts to the length mix of chat responses."""
    rng = np.random.default_rng(args.seed)
    path = Path(model).parent.parent / "prompts.json"
    if path.is_file():
        texts = [row["messages"][-1]["content"] for row in json.loads(path.read_text())]
    else:
        texts = [f"Please give me advice number {n}." for n in range(200)]
    words = " ".join(texts).split()
    rows = []
    for p in range(args.prompts):
        messages = [{"role": "user", "content": texts[rng.integers(len(texts))]}]
        for k in range(args.samples):
            n_words = min(90, max(3, int(rng.lognormal(args.log_length, 0.7))))
            start = int(rng.integers(len(words) - n_words))
            rows.append(ScoreRequest(f"p{p}", k, messages, " ".join(words[start : start + n_words])))
    return rows


def _plain(model: str, batch_rows: int) -> Contender:
    """What a few lines of transformers do: batches as the rows come."""
    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def render(row: ScoreRequest) -> str:
        conversation = [*map(dict, row.messages), {"role": "assistant", "content": row.completion}]
        return str(tokenizer.apply_chat_template(conversation, tokenize=False))

    def run(rows: Sequence[ScoreRequest]) -> Result:
        values: list[float] = []
        computed = needed = 0
        with torch.inference_mode():
            for start in range(0, len(rows), batch_rows):
                texts = [render(row) for row in rows[start : start + batch_rows]]
                inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
                mask = inputs["attention_mask"]
                values += network(input_ids=inputs["input_ids"], attention_mask=mask).logits[:, 0].tolist()
                computed, needed = computed + mask.numel(), needed + int(mask.sum())
        return Result(values, 1 - needed / computed)

    return Contender(run)


def _ours(model: str, *, token_budget: int, share: bool = True, engine: Engine = "transformers") -> Contender:
    return _contender(
        SequenceClassificationScorer(
            model, token_budget=token_budget, share_prefixes=share, engine=engine, device="cpu"
        )
    )


def _contender(scorer: SequenceClassificationScorer) -> Contender:
    def run(rows: Sequence[ScoreRequest]) -> Result:
        before = scorer.padding
        values = [score.values[0] for score in scorer.score(rows) if isinstance(score, Score)]
        after = scorer.padding
        return Result(values, 1 - (after.needed - before.needed) / (after.computed - before.computed))

    return Contender(run, scorer.close)


def _race(
    contenders: dict[str, Contender], rows: Sequence[ScoreRequest], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Result]]:
    """Texts a second of each contender in each round, and its last result."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Result] = {}
    clock = time.process_time if args.cpu_time else time.perf_counter
    for number in range(args.rounds + 1):
        for name, contender in contenders.items():
            started = clock()
            results[name] = contender.run(rows)
            if number:  # the first round warms up
                rates[name].append(len(rows) / (clock() - started))
    return rates, results


def _ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(rate / base for rate, base in zip(rates[name], rates[other], strict=True))


def _difference(results: dict[str, Result], name: str, other: str) -> float:
    return max(abs(a - b) for a, b in zip(results[name].values, results[other].values, strict=True))


def _compare(args: argparse.Namespace, model: str) -> None:
    rows = _read_rows(args, model)
    single, unsorted = "one at a time", f"unsorted, {args.batch_rows} rows"
    contenders = {
        single: _plain(model, 1),
        unsorted: _plain(model, args.batch_rows),
        "ours, nothing shared": _ours(model, token_budget=args.token_budget, share=False),
        "ours": _ours(model, token_budget=args.token_budget, share=True),
    }
    rates, results = _race(contenders, rows, args)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.prompts} prompts x {args.samples} samples, batches of {args.token_budget} tokens, "
        f"{args.rounds} rounds, {args.threads} threads{', CPU seconds' if args.cpu_time else ''}, {memory:.2f} GiB, "
        f"model {Path(model).name}\n"
    )
    print("| | texts/s | x one at a time | x unsorted | padding | largest difference |")
    print("|---|---|---|---|---|---|")
    for name in contenders:
        # Against one text at a time, whose scores no batch mate can have touched.
        print(
            f"| {name} | {statistics.median(rates[name]):,.0f} | {_ratio(rates, name, single):.1f} "
            f"| {_ratio(rates, name, unsorted):.1f} | {results[name].padding:.1%} "
            f"| {_difference(results, name, single):.0e} |"
        )


def _save_random(folder: Path, tokenizer_of: str, *, width: int, layers: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return str(folder)


def _compare_on_random(
    args: argparse.Namespace, model: str, first: str, second: str, start: Callable[[str], dict[str, Contender]]
) -> None:
    """Two contenders on random Llamas, by the lengths of prompts and responses."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(args.seed)
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2]

    def text(n_tokens: int) -> str:
        # Lengths vary by half around the mean.
        drawn = rng.choice(words, size=2 + int(n_tokens * rng.uniform(0.5, 1.5)))
        ids = tokenizer(" ".join(drawn), add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids[: max(1, int(n_tokens * rng.uniform(0.5, 1.5)))]))

    print(f"| width x layers | prompt | response | samples | {first}, texts/s | {second} | x | largest difference |")
    print("|---|---|---|---|---|---|---|---|")
    for width, layers in ((128, 4), (384, 6)):
        with tempfile.TemporaryDirectory() as folder:
            random_model = _save_random(Path(folder), model, width=width, layers=layers)
            contenders = start(random_model)
            for prompt, response, samples in ((256, 32, 16), (64, 64, 64), (64, 128, 16), (20, 20, 64), (20, 20, 8)):
                n_prompts = max(2, args.tokens // ((prompt + response) * samples) * 128 // width)
                rows = []
                for p in range(n_prompts):
                    messages = [{"role": "user", "content": text(prompt)}]
                    rows += [ScoreRequest(f"p{p}", k, messages, text(response)) for k in range(samples)]
                rates, results = _race(contenders, rows, args)
                print(
                    f"| {width} x {layers} | {prompt} | {response} | {samples} "
                    f"| {statistics.median(rates[first]):,.0f} | {statistics.median(rates[second]):,.0f} "
                    f"| {_ratio(rates, second, first):.2f} | {_difference(results, second, first):.0e} |",
                    flush=True,
                )
            for name in list(contenders):
                contenders.pop(name).close()


def _compare_sharing(args: argparse.Namespace, model: str) -> None:
    def start(random_model: str) -> dict[str, Contender]:
        return {
            name: _ours(random_model, token_budget=args.token_budget, share=share)
            for name, share in (("whole", False), ("shared", True))
        }

    _compare_on_random(args, model, "whole", "shared", start)


def _compare_engines(args: argparse.Namespace, model: str) -> None:
    def start(random_model: str) -> dict[str, Contender]:
        engines: tuple[Engine, ...] = ("transformers", "vllm")
        return {name: _ours(random_model, token_budget=args.token_budget, engine=name) for name in engines}

    _compare_on_random(args, model, "transformers", "vllm", start)


def _compare_architectures(model: str, names: Sequence[str]) -> None:
    """The largest difference of vLLM's raw outputs to transformers' on a tiny random checkpoint of each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(len(tokenizer), (n,), generator=generator).tolist() for n in (3, 10, 50, 120)]
    print("| architecture | largest difference | largest output |")
    print("|---|---|---|")
    for name in names:
        model_class = getattr(transformers, name)
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            network = model_class(
                model_class.config_class(
                    vocab_size=len(tokenizer),
                    hidden_size=64,
                    intermediate_size=96,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=32,
                    max_position_embeddings=128,
                    initializer_range=0.2,
                    num_labels=3,
                    pad_token_id=None,
                )
            ).eval()
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            pooling = VllmPooling(
                folder,
                heads=Heads([name], "linear", {label: str(label) for label in range(3)}),
                revision=None,
                dtype="float32",
                max_length=128,
                token_budget=1024,
            )
            found = pooling.logits(texts, range(len(texts)))
            pooling.close()
            with torch.inference_mode():
                expected = torch.cat([network(torch.tensor([text])).logits for text in texts]).double().numpy()
        print(f"| {name} | {abs(found - expected).max():.0e} | {abs(expected).max():.1f} |", flush=True)


def main() -> None:
    """Run the contenders in turn and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="scorer checkpoint (default: the embedded world's harmlessness scorer)")
    parser.add_argument("--prefix", action="store_true", help="compare with and without shared prompts only")
    parser.add_argument("--engines", action="store_true", help="compare vLLM's pooling with transformers only")
    parser.add_argument("--architectures", action="store_true", help="print how far vLLM is from transformers only")
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--samples", type=int, default=16, help="completions of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-rows", type=int, default=64, help="of the unsorted batches")
    parser.add_argument("--token-budget", type=int, default=4096, help="of our batches")
    parser.add_argument("--log-length", type=float, default=2.8, help="mean log number of words of a completion")
    parser.add_argument("--tokens", type=int, default=60_000, help="of a case of --prefix, at width 128")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for one thread on a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = args.model
    if model is None:
        worlds = sorted(Path("data/models").glob("microworld-*/scorers/harmless"))
        if not worlds:
            parser.error("no embedded world under data/models; run `dualign prepare` or give --model")
        model = str(worlds[-1])
    if args.architectures:
        # The others are classes that transformers has not; tests/stage1_dual/scoring/test_vllm_pooling.py has them.
        _compare_architectures(model, sorted(name for name in POOLED if name.endswith("ForSequenceClassification")))
    elif args.engines:
        _compare_engines(args, model)
    else:
        (_compare_sharing if args.prefix else _compare)(args, model)


if __name__ == "__main__":
    main()
