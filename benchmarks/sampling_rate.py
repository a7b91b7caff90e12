"""Tokens per second of sampling: our table of samples against bare vLLM and against transformers.

    python benchmarks/sampling_rate.py --model smollm2 --dtype float32 --dtype bfloat16
    python benchmarks/sampling_rate.py --unlike

Every contender has a process of its own and starts once; the rounds go from one to the next, so that a machine that
slows down slows all of them. Rates are medians over the rounds, ratios are medians of the ratios within a round. Ours
includes the seeds, the log-probabilities, decoding, and the Parquet shards; bare vLLM is one ``LLM.generate`` with its
own defaults, processes of its own among them, apart from the size of its cache of keys and values, which is ours.

With ``--unlike`` a few completions are 64 times as long as the others, and shards small beside the time they take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline.contracts.section import Dtype
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, prompt_id
from stage1_dual.sampling.protocol import OnTokens, SampledCompletion, Sampler, SampleRequest
from stage1_dual.sampling.rendering import load_tokenizer, read_max_positions, render_prompts
from stage1_dual.sampling.sample_table import PromptTokens, sample_table

_LONG, _SHORT, _N_LONG = 4096, 64, 8
"""Tokens of the few and of the many completions of ``--unlike``, and how many the few are."""

Run = Callable[[int], int]
"""Draws everything in the round of this number, round 0 a part of it to warm up; returns the tokens drawn."""


@dataclass(frozen=True)
class Job:
    """What every contender draws.

    Attributes:
        args: of the command line.
        model: folder of the policy.
        dtype: of weights and arithmetic.
        prompts: token ids of each prompt.
    """

    args: argparse.Namespace
    model: str
    dtype: Dtype
    prompts: list[tuple[int, ...]]

    @property
    def limit(self) -> int:
        """Tokens of the longest completion."""
        return _LONG if self.args.unlike else int(self.args.max_new_tokens)

    @property
    def positions(self) -> int:
        """Tokens of the longest prompt and completion."""
        return max(map(len, self.prompts)) + self.limit

    def length(self, prompt: int, sample: int) -> int:
        """Tokens that ``--unlike`` asks of a completion; the long ones lie in the first half, far apart."""
        row, apart = prompt * self.args.samples_per_prompt + sample, self.n_rows // (2 * _N_LONG)
        return _LONG if row % apart == 0 and row // apart < _N_LONG else _SHORT

    @property
    def n_rows(self) -> int:
        """Completions of a round."""
        return len(self.prompts) * int(self.args.samples_per_prompt)

    def warm_up(self) -> list[tuple[int, ...]]:
        """The prompts of round 0."""
        return self.prompts[: max(1, len(self.prompts) // 4)]


class Kept:
    """A sampler that :func:`sample_table` does not close."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """As the sampler's."""
        return self._sampler.eos_token_ids

    @property
    def feeds_on(self) -> bool:
        """As the sampler's."""
        return self._sampler.feeds_on

    def stream(
        self, requests: Iterable[SampleRequest], *, on_tokens: OnTokens | None = None
    ) -> Iterator[tuple[SampleRequest, SampledCompletion]]:
        """As the sampler's."""
        return self._sampler.stream(requests, on_tokens=on_tokens)

    def describe(self) -> Mapping[str, object]:
        """As the sampler's."""
        return self._sampler.describe()

    def close(self) -> None:
        """Leave the sampler open."""


class ShardByShard(Kept):
    """A sampler that starts the next shard when the last completion of one is done."""

    @property
    def feeds_on(self) -> bool:
        """No."""
        return False


def start_bare_vllm(*, eager: bool) -> Callable[[Job], Run]:
    """One ``LLM.generate`` over the same prompts, its own seeds and defaults apart from the full distribution."""

    def start(job: Job) -> Run:
        os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
        if job.args.threads is not None:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, range(job.args.threads)))
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt

        from stage1_dual.sampling.vllm_sampler import cpu_cache_bytes

        engine = LLM(
            model=job.model,
            dtype=job.dtype,
            generation_config="vllm",
            max_model_len=job.positions,
            max_num_seqs=job.args.max_num_seqs,
            kv_cache_memory_bytes=cpu_cache_bytes(job.model, None, job.dtype, job.positions, job.args.max_num_seqs),
            enforce_eager=eager,
            disable_log_stats=True,
        )

        def run(number: int) -> int:
            engine.reset_prefix_cache()
            prompts = job.prompts if number else job.warm_up()
            if job.args.unlike:
                rows = [(n, k) for n in range(len(prompts)) for k in range(job.args.samples_per_prompt)]
                inputs = [TokensPrompt(prompt_token_ids=list(prompts[n])) for n, _ in rows]
                parameters: Any = [
                    SamplingParams(temperature=1.0, max_tokens=job.length(n, k), ignore_eos=True) for n, k in rows
                ]
            else:
                inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
                parameters = SamplingParams(
                    n=job.args.samples_per_prompt, temperature=1.0, max_tokens=job.args.max_new_tokens
                )
            outputs = engine.generate(inputs, parameters, use_tqdm=False)
            return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

        return run

    return start


def start_our_vllm(*, compiles: bool, wraps: type[Kept] = Kept) -> Callable[[Job], Run]:
    """The table of samples by the vLLM sampler."""

    def start(job: Job) -> Run:
        sampler = _vllm_sampler(job)(
            job.model,
            max_new_tokens=job.limit,
            max_positions=job.positions,
            dtype=job.dtype,
            max_num_seqs=job.args.max_num_seqs,
            threads=job.args.threads,
            compiles=compiles,
        )
        return _table_run(job, wraps(sampler))

    return start


def _vllm_sampler(job: Job) -> Any:
    from stage1_dual.sampling.vllm_sampler import VllmSampler

    if not job.args.unlike:
        return VllmSampler

    class Unlike(VllmSampler):
        """Draws as many tokens as the job says, whatever they are."""

        def _parameters(self, request: SampleRequest) -> Any:
            parameters = super()._parameters(request)
            parameters.max_tokens = job.length(int(request.prompt_id), request.sample_index)
            parameters.stop_token_ids = []
            parameters.ignore_eos = True
            return parameters

    return Unlike


def start_our_transformers(job: Job) -> Run:
    """The table of samples by the transformers sampler."""
    from stage1_dual.sampling.transformers_sampler import TransformersSampler

    sampler = TransformersSampler(
        job.model,
        max_new_tokens=job.args.max_new_tokens,
        dtype=job.dtype,
        batch_rows=job.args.max_num_seqs,
    )
    return _table_run(job, Kept(sampler))


def _table_run(job: Job, sampler: Sampler) -> Run:
    def run(number: int) -> int:
        prompts = job.prompts if number else job.warm_up()
        with tempfile.TemporaryDirectory() as folder:
            return sample_table(
                sampler_factory=lambda: sampler,
                prompts=[PromptTokens(str(n), "train", np.array(ids, np.int32)) for n, ids in enumerate(prompts)],
                samples_per_prompt=job.args.samples_per_prompt,
                run_seed=number,
                table=ShardedTable(Path(folder), SAMPLES, {}),
                shard_rows=job.args.shard_rows,
                show_progress=False,
            ).tokens_sampled

    return run


def start_generate(batch_rows: int) -> Callable[[Job], Run]:
    """``model.generate`` of transformers at one batch size."""

    def start(job: Job) -> Run:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
        eos = model.config.eos_token_id

        def run(number: int) -> int:
            torch.manual_seed(number)
            prompts = job.prompts if number else job.warm_up()
            rows = sorted((ids for ids in prompts for _ in range(job.args.samples_per_prompt)), key=len)
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
                    max_new_tokens=job.args.max_new_tokens,
                    pad_token_id=eos,
                )[:, longest:]
                before_eos = ((drawn == eos).cumsum(-1) == 0).sum()
                n_tokens += int(before_eos) + int((drawn == eos).any(-1).sum())
            return n_tokens

        return run

    return start


def _serve(connection: Connection, start: Callable[[Job], Run], job: Job) -> None:
    import torch

    if job.args.threads is not None:
        torch.set_num_threads(job.args.threads)
    started = time.perf_counter()
    run = start(job)
    connection.send(time.perf_counter() - started)
    while (number := connection.recv()) is not None:
        started, processor = time.perf_counter(), _usage()[0]
        n_tokens = run(number)
        seconds = time.perf_counter() - started
        after, memory = _usage()
        connection.send((n_tokens, seconds, after - processor, memory))


def _usage() -> tuple[float, float]:
    """Processor seconds and resident GiB of this process and those that it started."""
    seconds, memory = 0.0, 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        seconds += times.user + times.system
        memory += process.memory_info().rss / 2**30
    return seconds, memory


def _read_prompts(args: argparse.Namespace, model: str) -> list[tuple[int, ...]]:
    path = Path(model).parent / "prompts.json"
    if path.is_file():
        conversations = [row["messages"] for row in json.loads(path.read_text())][: args.prompts]
    else:
        conversations = [
            [{"role": "user", "content": f"Please give me advice number {n}."}] for n in range(args.prompts)
        ]
    rendered, _ = render_prompts(
        load_tokenizer(model),
        [(prompt_id(messages), messages) for messages in conversations],
        max_new_tokens=args.max_new_tokens,
        max_positions=read_max_positions(model),
    )
    return [tuple(prompt.token_ids.tolist()) for prompt in rendered]


def _with_more_positions(model: str, folder: str) -> str:
    """A copy of a checkpoint with rotary positions that may be as long as ``--unlike`` asks."""
    copy = Path(folder) / "policy"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = 2 * _LONG
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def compare(job: Job, contenders: Mapping[str, Callable[[Job], Run]]) -> None:
    """Run contenders in turn, the first one the measure of the others, and print their rates."""
    context = multiprocessing.get_context("fork")  # before torch is loaded: nothing is inherited but the arguments
    starts: dict[str, float] = {}
    results: dict[str, list[tuple[int, float, float, float]]] = {name: [] for name in contenders}
    links: dict[str, Connection] = {}
    processes = []
    for name, start in contenders.items():
        links[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs, start, job)))
        processes[-1].start()
        theirs.close()  # so that a contender that dies ends the wait for it
        starts[name] = links[name].recv()
    for number in range(job.args.rounds + 1):
        for name, link in links.items():
            link.send(number)
            answer = link.recv()
            if number:  # the first round warms up
                results[name].append(answer)
    for link in links.values():
        link.send(None)
    for process in processes:
        process.join()

    measure = [n_tokens / seconds for n_tokens, seconds, *_ in next(iter(results.values()))]
    print(f"\n{job.n_rows} completions, {job.args.rounds} rounds, {job.dtype}, {job.model}")
    print(f"{'':28}{'tokens/s':>10}{'ratio':>8}{'CPU ms':>9}{'start s':>9}{'GiB':>6}{'tokens':>9}")
    for name, rows in results.items():
        rates = [n_tokens / seconds for n_tokens, seconds, *_ in rows]
        ratio = statistics.median(rate / other for rate, other in zip(rates, measure, strict=True))
        processor = 1e3 * statistics.median(used / n_tokens for n_tokens, _, used, _ in rows)
        memory, n_tokens = max(row[3] for row in rows), rows[-1][0]
        rate = statistics.median(rates)
        print(
            f"{name:28}{rate:>10,.0f}{ratio:>8.2f}{processor:>9.3f}{starts[name]:>9.1f}{memory:>6.2f}{n_tokens:>9,}",
            flush=True,
        )


def main() -> None:
    """Run the contenders in turn and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="policy checkpoint (default: the embedded world's reference)")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="default: float32")
    parser.add_argument("--unlike", action="store_true", help="completions of very unlike length")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples-per-prompt", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--shard-rows", type=int, help="default: 4096, with --unlike 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of every contender (default: each one's own choice)")
    parser.add_argument("--only", action="append", help="contenders by name, the measure first")
    parser.add_argument("--transformers", action="store_true", help="transformers too, at three batch sizes")
    args = parser.parse_args()
    if args.shard_rows is None:
        args.shard_rows = 512 if args.unlike else 4096
    if args.model is None:
        worlds = sorted(Path("data/models").glob("microworld-*/reference"), key=lambda path: path.stat().st_mtime)
        if not worlds:
            parser.error("no embedded world under data/models; run `dualign prepare` or give --model")
        args.model = str(worlds[-1])

    contenders: dict[str, Callable[[Job], Run]] = {
        "LLM.generate": start_bare_vllm(eager=False),
        "LLM.generate, eager": start_bare_vllm(eager=True),
        "ours, compiled": start_our_vllm(compiles=True),
        "ours, eager": start_our_vllm(compiles=False),
    }
    if args.unlike:
        del contenders["LLM.generate, eager"], contenders["ours, compiled"]
        contenders["ours, shard by shard"] = start_our_vllm(compiles=False, wraps=ShardByShard)
    if args.transformers:
        contenders["ours, transformers"] = start_our_transformers
        contenders |= {f"model.generate, {rows} rows": start_generate(rows) for rows in (128, 256, 512)}
    if args.only:
        if unknown := set(args.only) - set(contenders):
            parser.error(f"no contender {', '.join(sorted(unknown))}; there are {', '.join(contenders)}")
        contenders = {name: contenders[name] for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        model = _with_more_positions(args.model, folder) if args.unlike else args.model
        prompts = _read_prompts(args, args.model)
        for dtype in args.dtype or ["float32"]:
            compare(Job(args, model, dtype, prompts), contenders)


if __name__ == "__main__":
    main()
