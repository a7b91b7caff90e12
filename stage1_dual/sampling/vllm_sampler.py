"""Samples from vLLM; one of the three files that import it.

The engine runs in this process: its order of work, hence its arithmetic, then depends on the requests alone, which
vLLM promises for no other mode (https://docs.vllm.ai/en/latest/usage/reproducibility/).

Tokens are drawn by a logits processor (:func:`_draw_processor`) and not by vLLM's own seeds: on a CPU those cost a
fifth of the speed, and child ``i`` of a request gets ``seed + i``, so that neighbouring seeds repeat samples.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.privacy import keep_private
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import is_local
from stage1_dual.sampling.protocol import THE_POLICY, Distribution, FinishReason, SampledCompletion, SampleRequest
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.sampling.tokens import decode_completions, find_eos_token_ids

if TYPE_CHECKING:
    import torch

_UNCHANGED_LOGITS = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""vLLM itself changes nothing; what a :class:`Distribution` asks for is done where a token is drawn."""


_SEED = "dualign_seed"
_DISTRIBUTION = "dualign_distribution"
_DRAW_TOKENS = "DrawTokens"


class VllmSampler:
    """Draws samples with an in-process vLLM engine.

    Starting it takes seconds to minutes. While it lives, ``VLLM_*`` environment variables and a few torch settings
    belong to vLLM; :meth:`close` puts them back.

    Args:
        checkpoint: folder of a causal language model, or its id on the Hub.
        revision: branch, tag or commit of a Hub model.
        max_new_tokens: length limit of a completion, tokens.
        max_positions: length limit of prompt and completion together, tokens; at most the model's own.
        dtype: of weights and arithmetic; the reference policy is the model in this precision.
        quantization: vLLM's name of a quantisation to load the model with, or None; a checkpoint that is stored
            quantised says so itself.
        tensor_parallel_size: accelerators that share the model.
        distribution: what to draw from.
        max_num_seqs: completions computed at once (speed only).
        max_num_batched_tokens: tokens computed at once (speed only).
        kv_cache_bytes: memory for keys and values on a CPU, or None to use ``gpu_memory_utilization``.
        gpu_memory_utilization: share of an accelerator's memory to use where ``kv_cache_bytes`` is None.
        threads: CPU threads, or None for torch's number.
        enforce_eager: run the model as it is instead of compiling it first.

    Raises:
        MissingExtraError: vLLM is not installed.
        InputError: the engine cannot load the model.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        revision: str | None = None,
        max_new_tokens: int,
        max_positions: int,
        dtype: Dtype = "float32",
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        distribution: Distribution = THE_POLICY,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        kv_cache_bytes: int | None = 512 * 2**20,
        gpu_memory_utilization: float = 0.9,
        threads: int | None = None,
        enforce_eager: bool = True,
    ) -> None:
        self._checkpoint = checkpoint
        self._revision = revision
        self._max_new_tokens = max_new_tokens
        self._dtype = dtype
        self._quantization = quantization
        self._tensor_parallel_size = tensor_parallel_size
        self._distribution = distribution
        self._tokenizer = load_tokenizer(checkpoint, revision=revision)
        self._eos_token_ids = find_eos_token_ids(checkpoint, self._tokenizer, revision=revision)
        self._process = _borrowed_process(
            offline=is_local(checkpoint),
            threads=threads,
            compiles=not enforce_eager,
        )
        self._process.__enter__()
        try:
            self._engine: Any = _start_engine(
                checkpoint,
                distribution,
                revision=revision,
                max_positions=max_positions,
                dtype=dtype,
                quantization=quantization,
                tensor_parallel_size=tensor_parallel_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_bytes=kv_cache_bytes,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
            )
        except BaseException:
            self._process.__exit__(None, None, None)
            raise

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, ascending."""
        return self._eos_token_ids

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampledCompletion]:
        """One completion a request, in the order of the requests."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        # Cached prefixes of an earlier call would change the batches of this one, and with them the last bits.
        self._engine.reset_prefix_cache()
        before = _draw_processor().rows
        outputs = self._engine.generate(
            [TokensPrompt(prompt_token_ids=list(request.prompt_token_ids)) for request in requests],
            [
                SamplingParams(
                    **_UNCHANGED_LOGITS,
                    temperature=0.0,  # the draw at temperature 1 is ours, and leaves vLLM one token to choose from
                    extra_args={_SEED: request.seed},
                    max_tokens=self._max_new_tokens,
                    stop_token_ids=list(self._eos_token_ids),
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        drawn = [output.outputs[0] for output in outputs]
        token_ids = [tuple(completion.token_ids) for completion in drawn]
        if self._tensor_parallel_size == 1:  # otherwise the draws are counted in other processes
            _require_own_draws(_draw_processor().rows - before, n_tokens=sum(map(len, token_ids)))
        texts = decode_completions(self._tokenizer, token_ids)
        return [
            SampledCompletion(
                text, ids, _finish_reason(completion.finish_reason), float(completion.cumulative_logprob)
            )
            for text, ids, completion in zip(texts, token_ids, drawn, strict=True)
        ]

    def describe(self) -> Mapping[str, object]:
        """The resolved sampling parameters, JSON-serialisable."""
        return {
            "sampler": "vllm",
            "model": self._checkpoint,
            "revision": self._revision,
            "dtype": self._dtype,
            "quantization": self._quantization,
            "tensor_parallel_size": self._tensor_parallel_size,
            **_UNCHANGED_LOGITS,
            **asdict(self._distribution),
            "draw": "inversion, float64",
            "max_new_tokens": self._max_new_tokens,
            "eos_token_ids": list(self._eos_token_ids),
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",
        }

    def close(self) -> None:
        """Free the engine and give the process its settings back."""
        if self._engine is None:
            return
        self._engine.llm_engine.engine_core.shutdown()
        self._engine = None
        gc.collect()  # the engine is full of cycles, and one of them holds the cache
        self._process.__exit__(None, None, None)


def _finish_reason(reason: str | None) -> FinishReason:
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise RuntimeError(f"vLLM ended a completion for the reason {reason!r}; expected `stop` or `length`")


def _require_own_draws(rows: int, *, n_tokens: int) -> None:
    """A token vLLM chose without our processor would be the likeliest one and not a sample."""
    if rows < n_tokens:
        raise RuntimeError(f"vLLM gave {n_tokens} tokens, of which only {rows} were drawn from the policy")


def _start_engine(
    checkpoint: str,
    distribution: Distribution,
    *,
    revision: str | None,
    max_positions: int,
    dtype: Dtype,
    quantization: str | None,
    tensor_parallel_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_bytes: int | None,
    gpu_memory_utilization: float,
    enforce_eager: bool,
) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of what vLLM uses, which its users cannot change
        try:
            from vllm import LLM
        except ImportError as error:
            raise import_failure(error, package="vllm", extra="sample", purpose="sampling with vLLM") from error
        try:
            return LLM(
                model=checkpoint,
                revision=revision,
                tokenizer_revision=revision,
                trust_remote_code=False,
                generation_config="vllm",  # not the sampling defaults of the model's own generation_config.json
                logprobs_mode="raw_logprobs",
                dtype=dtype,
                quantization=quantization,
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=max_positions,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(max_num_batched_tokens, max_positions),
                kv_cache_memory_bytes=kv_cache_bytes,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                enable_prefix_caching=True,
                async_scheduling=False,  # a draw needs to know how many tokens came before it
                logits_processors=[f"{__name__}:{_DRAW_TOKENS}"],
                additional_config={_DISTRIBUTION: asdict(distribution)},
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"vLLM cannot load {checkpoint}: {error}") from error


def __getattr__(name: str) -> Any:
    """The processor by name: vLLM's workers import it from here, and only then does this module import vLLM."""
    if name == _DRAW_TOKENS:
        return _draw_processor()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _draw_processor() -> Any:
    """A vLLM logits processor that draws each token from its request's own stream and leaves no other to choose.

    vLLM computes the log-probabilities it reports before any processor runs, hence from the untouched logits.
    """
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

    from stage1_dual.sampling.draws import build_warper, draw_tokens, uniforms_of

    class DrawTokens(LogitsProcessor):  # type: ignore[misc]  # vllm publishes no types
        rows = 0
        """Rows of logits that this process has drawn from."""

        def __init__(self, vllm_config: VllmConfig, *_: object) -> None:
            self._warp = build_warper(Distribution(**vllm_config.additional_config[_DISTRIBUTION]))
            self._streams: dict[int, tuple[list[float], list[int]]] = {}  # batch row: its uniforms, its tokens so far

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: BatchUpdate | None) -> None:
            if batch_update is None:
                return
            for row in batch_update.removed:
                self._streams.pop(row, None)
            for row, params, _, tokens in batch_update.added:
                uniforms = uniforms_of(params.extra_args[_SEED], n_tokens=params.max_tokens)
                self._streams[row] = (uniforms.tolist(), tokens)
            for source, target, direction in batch_update.moved:
                moved, displaced = self._streams.pop(source), self._streams.pop(target, None)
                self._streams[target] = moved
                if direction == MoveDirectionality.SWAP and displaced is not None:
                    self._streams[source] = displaced

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            streams = [self._streams[row] for row in range(logits.shape[0])]
            next_uniforms = torch.tensor([uniforms[len(tokens)] for uniforms, tokens in streams], dtype=torch.float64)
            chosen = draw_tokens(self._warp(logits), next_uniforms.to(logits.device))
            DrawTokens.rows += len(streams)
            return logits.fill_(-torch.inf).scatter_(1, chosen[:, None], 0.0)

    return DrawTokens


@contextmanager
def _borrowed_process(*, offline: bool, threads: int | None, compiles: bool) -> Iterator[None]:
    """Set what vLLM reads from the process, and undo afterwards what it and we changed."""
    import torch
    import torch._dynamo

    environment = dict(os.environ)
    set_num_threads, n_threads = torch.set_num_threads, torch.get_num_threads()
    accelerator = {name: getattr(torch.accelerator, name) for name in ("synchronize", "empty_cache")}
    random_state = torch.get_rng_state()
    keep_private()
    os.environ.update(
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
    )
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        # Without compilation there is no need for the two small functions that vLLM compiles in any case, either.
        with torch._dynamo.config.patch(disable=not compiles):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(n_threads)
        for name, function in accelerator.items():
            setattr(torch.accelerator, name, function)
        torch.set_rng_state(random_state)
