"""The table of samples, made shard by shard: what is on disk is kept, what is missing is drawn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from tqdm import tqdm

from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, SPLITS
from stage1_dual.sampling.protocol import SampledCompletion, Sampler, SampleRequest
from stage1_dual.sampling.seeds import sample_seed
from stage1_dual.shard_plan import missing_shards


@dataclass(frozen=True)
class SamplingCounts:
    """What :func:`sample_table` did.

    Attributes:
        rows_sampled: drawn now.
        rows_present: found on disk among those asked for.
        tokens_sampled: completion tokens drawn now, EOS included.
        finish_reasons: rows drawn now by finish reason.
        start_seconds: time to start the sampler; 0 where nothing was missing.
        sampling_seconds: time to draw and write.
        sampler: the sampler's own description; empty where nothing was missing.
    """

    rows_sampled: int
    rows_present: int
    tokens_sampled: int
    finish_reasons: Mapping[str, int]
    start_seconds: float
    sampling_seconds: float
    sampler: Mapping[str, object] = field(default_factory=dict)


def sample_table(
    *,
    sampler_factory: Callable[[], Sampler],
    prompts: Sequence[tuple[str, str, Sequence[int]]],
    samples_per_prompt: int,
    run_seed: int,
    table: ShardedTable,
    shard_rows: int,
    show_progress: bool,
) -> SamplingCounts:
    """Draw every missing sample of every prompt and write it; the caller finishes the table.

    A shard is one call of the sampler and one atomic write. A killed call loses its unfinished shard; continued with
    the same arguments it gives the rows that an uninterrupted one gives. With more samples a prompt, or more prompts,
    only the new ones are drawn.

    Args:
        sampler_factory: starts the sampler; called once, and only if a row is missing.
        prompts: (prompt_id, split, prompt_token_ids) of each prompt.
        samples_per_prompt: completions wanted of each prompt.
        run_seed: seed of the run.
        table: of schema ``SAMPLES``.
        shard_rows: rows of a full shard.
        show_progress: whether to show a progress bar.
    """
    token_ids = {prompt_id: tuple(int(token) for token in ids) for prompt_id, _, ids in prompts}
    missing: list[tuple[str, str, list[tuple[str, int]]]] = []
    rows_present = 0
    for split in SPLITS:
        keys = [(prompt_id, k) for prompt_id, its, _ in prompts if its == split for k in range(samples_per_prompt)]
        present = table.present_keys(split)
        rows_present += len(present.intersection(keys))
        missing += [(split, order, keys) for order, keys in missing_shards(keys, present, shard_rows=shard_rows)]
    if not missing:
        return SamplingCounts(0, rows_present, 0, {}, 0.0, 0.0)

    started = time.monotonic()
    sampler = sampler_factory()
    ready = time.monotonic()
    reasons: Counter[str] = Counter()
    n_tokens = 0
    try:
        description = sampler.describe()
        with tqdm(
            total=sum(len(keys) for _, _, keys in missing), desc="sampling", unit=" samples", disable=not show_progress
        ) as bar:
            for split, order, keys in missing:
                requests = [
                    SampleRequest(prompt_id, token_ids[prompt_id], k, sample_seed(run_seed, prompt_id, k))
                    for prompt_id, k in keys
                ]
                completions = sampler.sample(requests)
                table.write_shard(_rows(requests, completions), split=split, order=order)
                reasons.update(completion.finish_reason for completion in completions)
                n_tokens += sum(len(completion.token_ids) for completion in completions)
                bar.update(len(completions))
                bar.set_postfix_str(f"{n_tokens / (time.monotonic() - ready):,.0f} tokens/s")
        finished = time.monotonic()
    finally:
        sampler.close()
    return SamplingCounts(
        rows_sampled=sum(reasons.values()),
        rows_present=rows_present,
        tokens_sampled=n_tokens,
        finish_reasons=dict(reasons),
        start_seconds=ready - started,
        sampling_seconds=finished - ready,
        sampler=description,
    )


def _rows(requests: Sequence[SampleRequest], completions: Sequence[SampledCompletion]) -> pa.Table:
    pairs = list(zip(requests, completions, strict=True))
    return pa.table(
        {
            "prompt_id": [request.prompt_id for request, _ in pairs],
            "sample_index": [request.sample_index for request, _ in pairs],
            "completion": [completion.text for _, completion in pairs],
            "prompt_token_ids": [request.prompt_token_ids for request, _ in pairs],
            "completion_token_ids": [completion.token_ids for _, completion in pairs],
            "finish_reason": [completion.finish_reason for _, completion in pairs],
            "seed": [request.seed for request, _ in pairs],
            "sampler_logp": [completion.logp for _, completion in pairs],
        },
        schema=SAMPLES,
    )
