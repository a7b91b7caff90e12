"""Tokens per second of sampling: our table of samples against bare vLLM and against transformers.

    python benchmarks/sampling_rate.py [--samples-per-prompt 32] [--rounds 5]

Every contender has a process of its own and starts once; the rounds go from one to the next, so that a machine that
slows down slows all of them. Rates are medians over the rounds, ratios are medians of the ratios within a round. Ours
includes the seeds, the log-probabilities, decoding, and the Parquet shards; bare vLLM is one ``LLM.generate``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, prompt_id
from stage1_dual.sampling.protocol import SampledCompletion, Sampler, SampleRequest
from stage1_dual.sampling.rendering import load_tokenizer, read_max_positions, render_prompts
from stage1_dual.sampling.sample_table import PromptTokens, sample_table

_KV_CACHE_BYTES = 512 * 2**20


class Kept:
    """A sampler that :func:`sample_table` does not close."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """As the sampler's."""
        return self._sampler.eos_token_ids

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampledCompletion]:
        """As the sampler's."""
        return self._sampler.sample(requests)

    def describe(self) -> Mapping[str, object]:
        """As the sampler's."""
        return self._sampler.describe()

    def close(self) -> None:
        """Leave the sampler open."""


def start_bare_vllm(args: argparse.Namespace, prompts: list[tuple[int, ...]]) -> Callable[[int], int]:
    """One ``LLM.generate`` over the same prompts, its own seeds and defaults apart from the full distribution."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=args.model,
        dtype="float32",
        generation_config="vllm",
        max_model_len=args.positions,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=_KV_CACHE_BYTES,
        enforce_eager=True,
        disable_log_stats=True,
    )
    parameters = SamplingParams(n=args.samples_per_prompt, temperature=1.0, max_tokens=args.max_new_tokens)
    inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]

    def run(_: int) -> int:
        engine.reset_prefix_cache()
        outputs = engine.generate(inputs, parameters, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    return run


def start_our_vllm(args: argparse.Namespace, prompts: list[tuple[int, ...]]) -> Callable[[int], int]:
    """The table of samples by the vLLM sampler."""
    from stage1_dual.sampling.vllm_sampler import VllmSampler

    sampler = VllmSampler(
        args.model,
        max_new_tokens=args.max_new_tokens,
        max_positions=args.positions,
        max_num_seqs=args.max_num_seqs,
        kv_cache_bytes=_KV_CACHE_BYTES,
        threads=args.threads,
    )
    return _table_run(args, prompts, Kept(sampler))


def start_our_transformers(args: argparse.Namespace, prompts: list[tuple[int, ...]]) -> Callable[[int], int]:
    """The table of samples by the transformers sampler."""
    from stage1_dual.sampling.transformers_sampler import TransformersSampler

    sampler = TransformersSampler(args.model, max_new_tokens=args.max_new_tokens, batch_rows=args.max_num_seqs)
    return _table_run(args, prompts, Kept(sampler))


def _table_run(args: argparse.Namespace, prompts: list[tuple[int, ...]], sampler: Sampler) -> Callable[[int], int]:
    rows = [PromptTokens(str(place), "train", np.array(ids, np.int32)) for place, ids in enumerate(prompts)]

    def run(number: int) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return sample_table(
                sampler_factory=lambda: sampler,
                prompts=rows,
                samples_per_prompt=args.samples_per_prompt,
                run_seed=number,
                table=ShardedTable(Path(folder), SAMPLES, {}),
                shard_rows=args.shard_rows,
                show_progress=False,
            ).tokens_sampled

    return run


def start_generate(batch_rows: int) -> Callable[[argparse.Namespace, list[tuple[int, ...]]], Callable[[int], int]]:
    """``model.generate`` of transformers at one batch size."""

    def start(args: argparse.Namespace, prompts: list[tuple[int, ...]]) -> Callable[[int], int]:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        eos = model.config.eos_token_id
        rows = sorted((ids for ids in prompts for _ in range(args.samples_per_prompt)), key=len)

        def run(number: int) -> int:
            torch.manual_seed(number)
            n_tokens = 0
            for start in range(0, len(rows), batch_rows):
                batch = rows[start : start + batch_rows]
                longest = len(batch[-1])
                tokens = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in batch])
                mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
                drawn = model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=args.max_new_tokens,
                    pad_token_id=eos,
                )[:, longest:]
                before_eos = ((drawn == eos).cumsum(-1) == 0).sum()
                n_tokens += int(before_eos) + int((drawn == eos).any(-1).sum())
            return n_tokens

        return run

    return start


def _serve(
    connection: Connection, start: Callable[..., Callable[[int], int]], args: argparse.Namespace, prompts: object
) -> None:
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    run = start(args, prompts)
    connection.send(time.perf_counter() - started)
    while (number := connection.recv()) is not None:
        started = time.perf_counter()
        n_tokens = run(number)
        seconds = time.perf_counter() - started
        connection.send((n_tokens, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def _read_prompts(args: argparse.Namespace) -> list[tuple[int, ...]]:
    path = Path(args.model).parent / "prompts.json"
    if path.is_file():
        conversations = [row["messages"] for row in json.loads(path.read_text())][: args.prompts]
    else:
        conversations = [
            [{"role": "user", "content": f"Please give me advice number {n}."}] for n in range(args.prompts)
        ]
    rendered, _ = render_prompts(
        load_tokenizer(args.model),
        [(prompt_id(messages), messages) for messages in conversations],
        max_new_tokens=args.max_new_tokens,
        max_positions=read_max_positions(args.model),
    )
    return [tuple(prompt.token_ids.tolist()) for prompt in rendered]


def main() -> None:
    """Run the contenders in turn and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="policy checkpoint (default: the embedded world's reference)")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples-per-prompt", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--shard-rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of every contender (default: each one's own choice)")
    parser.add_argument("--batch-rows", type=int, nargs="*", default=[128, 256, 512], help="of transformers' generate")
    args = parser.parse_args()
    if args.model is None:
        worlds = sorted(Path("data/models").glob("microworld-*/reference"), key=lambda path: path.stat().st_mtime)
        if not worlds:
            parser.error("no embedded world under data/models; run `dualign prepare` or give --model")
        args.model = str(worlds[-1])
    prompts = _read_prompts(args)
    args.positions = max(map(len, prompts)) + args.max_new_tokens

    contenders: dict[str, Callable[..., Callable[[int], int]]] = {
        "LLM.generate": start_bare_vllm,
        "ours, vllm": start_our_vllm,
        "ours, transformers": start_our_transformers,
        **{f"model.generate, {rows} rows": start_generate(rows) for rows in args.batch_rows},
    }
    context = multiprocessing.get_context("fork")  # before torch is loaded: nothing is inherited but the arguments
    starts: dict[str, float] = {}
    results: dict[str, list[tuple[int, float, float]]] = {name: [] for name in contenders}
    links: dict[str, Connection] = {}
    for name, start in contenders.items():
        links[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, start, args, prompts), daemon=True).start()
        starts[name] = links[name].recv()
    for number in range(args.rounds + 1):
        for name, link in links.items():
            link.send(number)
            answer = link.recv()
            if number:  # the first round warms up
                results[name].append(answer)
    for link in links.values():
        link.send(None)

    bare = [n_tokens / seconds for n_tokens, seconds, _ in results["LLM.generate"]]
    print(f"{len(prompts)} prompts x {args.samples_per_prompt}, {args.rounds} rounds, model {args.model}")
    print(f"{'':28}{'tokens/s':>10}{'ratio':>8}{'start s':>9}{'GiB':>6}{'tokens':>9}")
    for name, rows in results.items():
        rates = [n_tokens / seconds for n_tokens, seconds, _ in rows]
        ratio = statistics.median(rate / other for rate, other in zip(rates, bare, strict=True))
        memory, n_tokens = max(row[2] for row in rows), rows[-1][0]
        rate = statistics.median(rates)
        print(f"{name:28}{rate:>10,.0f}{ratio:>8.2f}{starts[name]:>9.1f}{memory:>6.2f}{n_tokens:>9,}")


if __name__ == "__main__":
    main()
