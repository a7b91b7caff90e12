"""Texts per second of scoring: our length-sorted batches against one text at a time and unsorted batches.

    python benchmarks/scoring_rate.py [--rows 6000] [--rounds 5]

The contenders take turns in one process; rates are medians over the rounds, ratios medians of the ratios within a
round. All start from the same prompts and completions and include rendering and tokenising.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stage1_dual.scoring.protocol import ScoreRow
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer


def _read_rows(args: argparse.Namespace) -> list[ScoreRow]:
    """Prompts of the world, and completions cut and joined from its prompts to the length mix of chat responses."""
    rng = np.random.default_rng(args.seed)
    path = Path(args.model).parent.parent / "prompts.json"
    if path.is_file():
        texts = [row["messages"][-1]["content"] for row in json.loads(path.read_text())]
    else:
        texts = [f"Please give me advice number {n}." for n in range(200)]
    words = " ".join(texts).split()
    rows = []
    for k in range(args.rows):
        n_words = min(90, max(3, int(rng.lognormal(args.log_length, 0.7))))
        start = int(rng.integers(len(words) - n_words))
        messages = [{"role": "user", "content": texts[rng.integers(len(texts))]}]
        rows.append(ScoreRow(f"p{k}", 0, messages, " ".join(words[start : start + n_words])))
    distinct = int(args.rows * (1 - args.duplicates))
    return rows[:distinct] + [rows[rng.integers(distinct)] for _ in range(args.rows - distinct)]


def main() -> None:
    """Run the contenders in turn and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="scorer checkpoint (default: the embedded world's harmlessness scorer)")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-rows", type=int, default=64, help="of the unsorted batches")
    parser.add_argument("--token-budget", type=int, nargs="*", default=[4096], help="of our batches")
    parser.add_argument("--log-length", type=float, default=2.8, help="mean log number of words of a completion")
    parser.add_argument("--duplicates", type=float, default=0.0, help="share of rows that repeat another")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        worlds = sorted(Path("data/models").glob("microworld-*/scorers/harmless"))
        if not worlds:
            parser.error("no embedded world under data/models; run `dualign prepare` or give --model")
        args.model = str(worlds[-1])
    rows = _read_rows(args)

    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def render(row: ScoreRow) -> str:
        conversation = [*row.messages, {"role": "assistant", "content": row.completion}]
        return str(tokenizer.apply_chat_template(conversation, tokenize=False))

    def plain(batch_rows: int) -> Callable[[], list[float]]:
        def run() -> list[float]:
            values: list[float] = []
            with torch.inference_mode():
                for start in range(0, len(rows), batch_rows):
                    texts = [render(row) for row in rows[start : start + batch_rows]]
                    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
                    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                    values += logits[:, 0].tolist()
            return values

        return run

    def ours(token_budget: int) -> Callable[[], list[float]]:
        scorer = SequenceClassificationScorer(args.model, token_budget=token_budget)
        return lambda: [score.value for score in scorer.score(rows)]

    contenders = {
        "one at a time": plain(1),
        f"unsorted, {args.batch_rows} rows": plain(args.batch_rows),
        **{f"ours, {budget} tokens": ours(budget) for budget in args.token_budget},
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    values: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            values[name] = run()
            if number:  # the first round warms up
                rates[name].append(len(rows) / (time.perf_counter() - started))

    names = list(contenders)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(rows)} rows, {args.rounds} rounds, {args.threads} threads, {memory:.2f} GiB, model {args.model}")
    print(f"{'':28}{'texts/s':>10}{'x single':>10}{'x unsorted':>12}{'difference':>12}")
    for name in names:
        single, unsorted = (
            statistics.median(rate / other for rate, other in zip(rates[name], rates[names[place]], strict=True))
            for place in (0, 1)
        )
        # Against one text at a time, whose scores no batch mate can have touched.
        difference = max(abs(a - b) for a, b in zip(values[name], values[names[0]], strict=True))
        rate = statistics.median(rates[name])
        print(f"{name:28}{rate:>10,.0f}{single:>10.1f}{unsorted:>12.1f}{difference:>12.1e}")


if __name__ == "__main__":
    main()
