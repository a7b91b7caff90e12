"""The table of samples, made shard by shard: what is on disk is kept, what is missing is drawn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.contracts.errors import DualignError, WorkerFailedError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, SPLITS
from stage1_dual.sampling.protocol import SampledCompletion, Sampler, SampleRequest, sample_all
from stage1_dual.sampling.seeds import sample_seed
from stage1_dual.shard_loop import write_shards
from stage1_dual.shard_plan import missing_shards
from stage1_dual.work import Failure, OnProgress, ShardResult, Task, WorkerPool

_FAILURES_OF_A_BROKEN_SAMPLER = 3
"""Prompts that fail one after the other, alone and on freshly started samplers: it is not the prompts, then."""

_FAILURES_OF_A_BROKEN_PROMPT = 2
"""Single requests of a prompt that fail one after the other: its others of the shard are not tried, as each costs a
start of the sampler."""


@dataclass(frozen=True)
class PromptTokens:
    """A prompt to sample from: its id, its split, and the tokens the policy reads."""

    prompt_id: str
    split: str
    token_ids: np.ndarray


@dataclass(frozen=True)
class SamplingCounts:
    """What :func:`sample_table` did.

    Attributes:
        rows_sampled: drawn now.
        rows_present: found on disk among those asked for.
        tokens_sampled: completion tokens drawn now, EOS included.
        finish_reasons: rows drawn now by finish reason.
        failures: rows that could not be drawn.
        start_seconds: time until the first shard was begun; 0 where nothing was missing.
        sampling_seconds: from then on, to draw and write.
        sampler: the sampler's own description; empty where nothing was missing.
    """

    rows_sampled: int
    rows_present: int
    tokens_sampled: int
    finish_reasons: Mapping[str, int]
    failures: tuple[Failure, ...]
    start_seconds: float
    sampling_seconds: float
    sampler: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleShard:
    """What a sampling worker needs to know: prompts once each, and the samples to draw of them.

    Attributes:
        prompt_ids: of the prompts.
        token_ids: of each prompt.
        prompt_n: which of the prompts each row belongs to, shape (n,).
        sample_n: ``sample_index`` of each row, shape (n,).
    """

    prompt_ids: tuple[str, ...]
    token_ids: tuple[np.ndarray, ...]
    prompt_n: np.ndarray
    sample_n: np.ndarray


class _OpenShard:
    """A shard some of whose requests are still to be drawn."""

    def __init__(self, task: Task[SampleShard], requests: Sequence[SampleRequest]) -> None:
        self.task = task
        self.waiting = {_key(request): request for request in requests}
        self.failures: list[Failure] = []
        self._order = list(self.waiting)
        self._drawn: dict[tuple[str, int], tuple[SampleRequest, SampledCompletion]] = {}
        self._started = time.monotonic()

    def add(self, request: SampleRequest, completion: SampledCompletion) -> None:
        """Take a completion in."""
        key = _key(request)
        del self.waiting[key]
        self._drawn[key] = (request, completion)

    def result(self) -> ShardResult:
        """The shard, its rows in the order they were asked for."""
        drawn = [self._drawn[key] for key in self._order if key in self._drawn]
        counts = Counter(completion.finish_reason for _, completion in drawn)
        return ShardResult(
            tables={"samples": _rows(drawn)},
            seconds=time.monotonic() - self._started,
            failures=self.failures,
            counts={
                "rows": len(drawn),
                "tokens": sum(len(completion.token_ids) for _, completion in drawn),
                **{f"finish_{reason}": count for reason, count in counts.items()},
            },
        )


class _Told:
    """Turns tokens into progress: a completion counts in part by its tokens over the limit, and whole when it ends."""

    def __init__(self, on_progress: OnProgress, token_limit: int) -> None:
        self._on_progress = on_progress
        self._limit = token_limit
        self._tokens = 0

    def on_tokens(self, n: int) -> None:
        """Tell of tokens drawn."""
        self._tokens += n
        self._on_progress({"rows": n / self._limit, "tokens": n})

    def on_completion(self, completion: SampledCompletion) -> None:
        """Tell of the rest of a row."""
        self._on_progress({"rows": 1 - len(completion.token_ids) / self._limit})


class SampleWorker:
    """Draws the samples of a shard; a request that the sampler cannot take becomes a failure and harms no other.

    Args:
        sampler_factory: starts the sampler.
        run_seed: seed of the run.
    """

    def __init__(self, sampler_factory: Callable[[], Sampler], run_seed: int) -> None:
        self._factory = sampler_factory
        self._run_seed = run_seed
        self._sampler: Sampler | None = sampler_factory()
        self._description = self._sampler.describe()
        self._token_limit = int(str(self._description["max_new_tokens"]))
        self._failed_in_a_row: list[str] = []
        """Prompt of each single request that failed since the last success."""

    def perform(
        self, tasks: Iterable[Task[SampleShard]], *, on_progress: OnProgress
    ) -> Iterator[tuple[Task[SampleShard], ShardResult]]:
        """Draw shards: in one stream if the sampler wants that, otherwise one after the other."""
        if self._started_sampler().feeds_on:
            yield from self._perform_stream(iter(tasks), on_progress)
        else:
            for task in tasks:
                yield from self._perform_stream(iter([task]), on_progress)

    def _perform_stream(
        self, tasks: Iterator[Task[SampleShard]], on_progress: OnProgress
    ) -> Iterator[tuple[Task[SampleShard], ShardResult]]:
        shards: dict[tuple[str, int], _OpenShard] = {}  # of each request that is under way, by its key

        def feed() -> Iterator[SampleRequest]:
            for task in tasks:
                shard = _OpenShard(task, self._requests(task.payload))
                shards.update(dict.fromkeys(shard.waiting, shard))
                yield from list(shard.waiting.values())

        told = _Told(on_progress, self._token_limit)
        finished = False
        while not finished:
            try:
                for request, completion in self._started_sampler().stream(feed(), on_tokens=told.on_tokens):
                    shard = shards.pop(_key(request))
                    shard.add(request, completion)
                    told.on_completion(completion)
                    self._failed_in_a_row = []
                    if not shard.waiting:
                        yield shard.task, shard.result()
                finished = True
            except DualignError:
                raise
            except Exception:  # noqa: BLE001  # whatever an engine does: the requests at fault are found and recorded
                # A sampler that failed in the middle may hold the rest of its requests: only a new one is trusted.
                self.close()
                for shard in list(dict.fromkeys(shards.values())):
                    drawn, failures = self._draw(list(shard.waiting.values()))
                    for request, completion in drawn:
                        shard.add(request, completion)
                        told.on_completion(completion)
                    shard.failures += failures
                    yield shard.task, shard.result()
                shards.clear()

    def _requests(self, payload: SampleShard) -> list[SampleRequest]:
        token_ids = [tuple(int(token) for token in ids) for ids in payload.token_ids]  # Python's integers, once each
        return [
            SampleRequest(
                payload.prompt_ids[prompt],
                token_ids[prompt],
                sample,
                sample_seed(self._run_seed, payload.prompt_ids[prompt], sample),
            )
            for prompt, sample in zip(payload.prompt_n.tolist(), payload.sample_n.tolist(), strict=True)
        ]

    def describe(self) -> Mapping[str, object]:
        """The resolved sampling parameters."""
        return self._description

    def close(self) -> None:
        """Free the model."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def _started_sampler(self) -> Sampler:
        if self._sampler is None:
            self._sampler = self._factory()
        return self._sampler

    def _draw(
        self, requests: Sequence[SampleRequest]
    ) -> tuple[list[tuple[SampleRequest, SampledCompletion]], list[Failure]]:
        broken = [id_ for id_, n in Counter(self._failed_in_a_row).items() if n >= _FAILURES_OF_A_BROKEN_PROMPT]
        if any(request.prompt_id in broken for request in requests):
            skipped = [request for request in requests if request.prompt_id in broken]
            drawn, failures = self._draw([request for request in requests if request.prompt_id not in broken])
            reason = "the sampler failed on other requests of the prompt"
            return drawn, [Failure(request.prompt_id, request.sample_index, reason) for request in skipped] + failures
        if not requests:
            return [], []
        try:
            completions = sample_all(self._started_sampler(), requests)
        except DualignError:
            raise
        except Exception as error:
            # A sampler that failed in the middle may hold the rest of its requests: only a new one is trusted.
            self.close()
            if len(requests) > 1:
                middle = len(requests) // 2
                first, first_failures = self._draw(requests[:middle])
                second, second_failures = self._draw(requests[middle:])
                return first + second, first_failures + second_failures
            self._failed_in_a_row.append(requests[0].prompt_id)
            reason = f"{type(error).__name__}: {error}"
            n_prompts = len(set(self._failed_in_a_row))
            if n_prompts >= _FAILURES_OF_A_BROKEN_SAMPLER:
                raise WorkerFailedError(
                    f"the sampler failed on single requests of {n_prompts} prompts one after the other, each time "
                    f"newly started; the last time: {reason}. Finished shards are kept"
                ) from error
            return [], [Failure(requests[0].prompt_id, requests[0].sample_index, reason)]
        self._failed_in_a_row = []
        return list(zip(requests, completions, strict=True)), []


def sample_table(
    *,
    sampler_factory: Callable[[], Sampler],
    prompts: Sequence[PromptTokens],
    samples_per_prompt: int,
    run_seed: int,
    table: ShardedTable,
    shard_rows: int,
    show_progress: bool,
    max_failed_share: float = 0.0,
    execution: WorkerPool | None = None,
) -> SamplingCounts:
    """Draw every missing sample of every prompt and write it; the caller finishes the table.

    A shard is one atomic write. A killed call loses the shards that were not full. Continued with the same arguments
    it draws their rows by the same seeds: from the same logits where the sampler takes a shard at a time, and from
    logits that differ by rounding where it ``feeds_on``. With more samples a prompt, or more prompts, only the new
    ones are drawn.

    Args:
        sampler_factory: starts the sampler; called only if a row is missing.
        prompts: the prompts, each once.
        samples_per_prompt: completions wanted of each prompt.
        run_seed: seed of the run.
        table: of schema ``SAMPLES``.
        shard_rows: rows of a full shard.
        show_progress: whether to show a progress bar.
        max_failed_share: share of the rows that may fail before the call stops.
        execution: where the sampler lives; in this process where None.

    Raises:
        InputError: more rows failed than may; what was drawn is kept.
    """
    presence = {
        split: table.presence(
            split,
            PromptPlaces([prompt.prompt_id for prompt in prompts if prompt.split == split]),
            n_samples=samples_per_prompt,
        )
        for split in SPLITS
    }
    n_rows = sum(grid.size for grid in presence.values())
    rows_present = sum(int(np.count_nonzero(grid)) for grid in presence.values())
    if rows_present == n_rows:
        return SamplingCounts(0, rows_present, 0, {}, (), 0.0, 0.0)

    written = write_shards(
        partial(SampleWorker, sampler_factory, run_seed),
        _plan(prompts, presence, shard_rows=shard_rows),
        tables={"samples": table},
        n_rows=n_rows,
        n_present=rows_present,
        failing=table.folder,
        max_failed_share=max_failed_share,
        execution=execution,
        doing="sampling",
        show_progress=show_progress,
        rate_of="tokens",
    )
    return SamplingCounts(
        rows_sampled=written.counts["rows"],
        rows_present=rows_present,
        tokens_sampled=written.counts["tokens"],
        finish_reasons={
            name.removeprefix("finish_"): count for name, count in written.counts.items() if name.startswith("finish_")
        },
        failures=written.failures,
        start_seconds=written.start_seconds,
        sampling_seconds=written.working_seconds,
        sampler=written.description,
    )


def _plan(
    prompts: Sequence[PromptTokens], presence: Mapping[str, np.ndarray], *, shard_rows: int
) -> Iterator[Task[SampleShard]]:
    for split, grid in presence.items():
        its = [prompt for prompt in prompts if prompt.split == split]
        for place, prompt_n, sample_n in missing_shards(grid, shard_rows=shard_rows):
            distinct, row_n = np.unique(prompt_n, return_inverse=True)
            ids = tuple(its[prompt].prompt_id for prompt in distinct)
            yield Task(
                split=split,
                place=place,
                n_rows=len(row_n),
                payload=SampleShard(ids, tuple(its[prompt].token_ids for prompt in distinct), row_n, sample_n),
            )


def _key(request: SampleRequest) -> tuple[str, int]:
    return request.prompt_id, request.sample_index


def _rows(drawn: Sequence[tuple[SampleRequest, SampledCompletion]]) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [request.prompt_id for request, _ in drawn],
            "sample_index": [request.sample_index for request, _ in drawn],
            "completion": [completion.text for _, completion in drawn],
            "prompt_token_ids": [request.prompt_token_ids for request, _ in drawn],
            "completion_token_ids": [completion.token_ids for _, completion in drawn],
            "finish_reason": [completion.finish_reason for _, completion in drawn],
            "seed": [request.seed for request, _ in drawn],
            "sampler_logp": [completion.logp for _, completion in drawn],
        },
        schema=SAMPLES,
    )
