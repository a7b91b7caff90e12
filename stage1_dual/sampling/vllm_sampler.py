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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.privacy import keep_private
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import cache_bytes_per_token, is_local
from stage1_dual.sampling.protocol import (
    THE_POLICY,
    Distribution,
    FinishReason,
    OnTokens,
    SampledCompletion,
    SampleRequest,
)
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


_TOKENS_WORTH_WAITING_FOR = 128
"""Token limit up to which a CPU draws shard by shard, so that a run that was killed continues to the same bits."""

_CPU_SEQS = 256
_CPU_TOKENS_AT_ONCE = 8192
"""Of prompts and completions, in one step."""

_CACHE_BLOCK = 128
"""Tokens whose keys and values vLLM keeps together on a CPU."""

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
        max_num_seqs: completions computed at once (speed only); without it 256 on a CPU, otherwise vLLM's own number.
        gpu_memory_utilization: share of an accelerator's memory to use; on a CPU the cache of keys and values has room
            for ``max_num_seqs`` completions of full length, or is half of what memory is free.
        device: ``cpu``, or an accelerator.
        threads: CPU threads, or None for torch's number.
        compiles: compile the model first, and on an accelerator record its graphs, where there is a folder to compile
            in and on a CPU a compiler of C++.

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
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float = 0.9,
        device: str = "cpu",
        threads: int | None = None,
        compiles: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._revision = revision
        self._max_new_tokens = max_new_tokens
        cache = _compile_cache() if compiles else None
        self._compiles = cache is not None and (device != "cpu" or _has_compiler())
        self._feeds_on = device != "cpu" or max_new_tokens > _TOKENS_WORTH_WAITING_FOR
        self._dtype = dtype
        self._quantization = quantization
        self._tensor_parallel_size = tensor_parallel_size
        self._distribution = distribution
        self._tokenizer = load_tokenizer(checkpoint, revision=revision)
        self._eos_token_ids = find_eos_token_ids(checkpoint, self._tokenizer, revision=revision)
        self._process = borrowed_process(
            offline=is_local(checkpoint),
            threads=threads,
            compile_cache=cache if self._compiles else None,
        )
        self._process.__enter__()
        try:
            cache_bytes = at_once = None
            if device == "cpu":
                max_num_seqs = max_num_seqs or _CPU_SEQS
                at_once = max(_CPU_TOKENS_AT_ONCE, max_positions)
                cache_bytes = cpu_cache_bytes(checkpoint, revision, dtype, max_positions, max_num_seqs)
            self._engine: Any = _start_engine(
                checkpoint,
                distribution,
                revision=revision,
                max_positions=max_positions,
                dtype=dtype,
                quantization=quantization,
                tensor_parallel_size=tensor_parallel_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=at_once,
                kv_cache_bytes=cache_bytes,
                gpu_memory_utilization=gpu_memory_utilization,
                compiles=self._compiles,
            )
            self._max_num_seqs = int(self._engine.llm_engine.vllm_config.scheduler_config.max_num_seqs)
        except BaseException:
            self._process.__exit__(None, None, None)
            raise

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, ascending."""
        return self._eos_token_ids

    @property
    def feeds_on(self) -> bool:
        """Whether it wants its requests in one stream."""
        return self._feeds_on

    def stream(
        self, requests: Iterable[SampleRequest], *, on_tokens: OnTokens | None = None
    ) -> Iterator[tuple[SampleRequest, SampledCompletion]]:
        """One completion a request, as they are done.

        The engine always has as many requests waiting as it computes at once, and so never runs dry before they end.
        """
        from vllm.inputs import TokensPrompt

        engine = self._engine.llm_engine
        # Cached prefixes of an earlier call would change the batches of this one, and with them the last bits.
        engine.reset_prefix_cache()
        source = enumerate(requests)
        under_way: dict[str, SampleRequest] = {}
        draws = _draw_processor()
        rows_before = draws.rows
        here = self._tensor_parallel_size == 1  # otherwise tokens are drawn, and counted, in other processes
        n_tokens = n_told = 0
        try:
            while True:
                for number, request in islice(source, 2 * self._max_num_seqs - len(under_way)):
                    under_way[str(number)] = request
                    prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
                    engine.add_request(str(number), prompt, self._parameters(request))
                if not under_way:
                    break
                done = [output for output in engine.step() if output.finished]
                drawn = [output.outputs[0] for output in done]
                token_ids = [tuple(completion.token_ids) for completion in drawn]
                n_tokens += sum(map(len, token_ids))
                if on_tokens is not None:
                    n_drawn = draws.rows - rows_before if here else n_tokens
                    on_tokens(n_drawn - n_told)
                    n_told = n_drawn
                texts = decode_completions(self._tokenizer, token_ids)
                for output, completion, text, ids in zip(done, drawn, texts, token_ids, strict=True):
                    reason = _finish_reason(completion.finish_reason)
                    logp = float(completion.cumulative_logprob)
                    yield under_way.pop(output.request_id), SampledCompletion(text, ids, reason, logp)
        except GeneratorExit:
            if self._engine is not None:
                engine.abort_request(list(under_way))
            raise
        if here:
            _require_own_draws(draws.rows - rows_before, n_tokens=n_tokens)

    def _parameters(self, request: SampleRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **_UNCHANGED_LOGITS,
            temperature=0.0,  # the draw at temperature 1 is ours, and leaves vLLM one token to choose from
            extra_args={_SEED: request.seed},
            max_tokens=self._max_new_tokens,
            stop_token_ids=list(self._eos_token_ids),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

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
            "generation_config": "vllm",
            "compiled": self._compiles,
            "shard_by_shard": not self._feeds_on,
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


def cpu_cache_bytes(checkpoint: str, revision: str | None, dtype: Dtype, max_positions: int, max_num_seqs: int) -> int:
    """Memory for the keys and values of completions of full length; vLLM fills all of it with zeros at the start."""
    per_token = cache_bytes_per_token(checkpoint, revision=revision, dtype=dtype)
    blocks = max_num_seqs * -(-max_positions // _CACHE_BLOCK) + 1  # one that vLLM keeps for itself
    one = -(-max_positions // _CACHE_BLOCK) + 1
    fitting = _available_bytes() // 2 // (per_token * _CACHE_BLOCK)
    return max(one, min(blocks, fitting)) * _CACHE_BLOCK * per_token


def _available_bytes() -> int:
    """Memory that can be had without swapping, as the kernel estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024


def _compile_cache() -> Path | None:
    """The user's own folder of compiled models, vLLM's; None where no file can be written there."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(os.environ.get("VLLM_CACHE_ROOT") or f"{home}/vllm").expanduser()
        (folder / "torchinductor").mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where nobody's home is known
        return None
    return folder if os.access(folder / "torchinductor", os.W_OK) else None


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _start_engine(
    checkpoint: str,
    distribution: Distribution,
    *,
    revision: str | None,
    max_positions: int,
    dtype: Dtype,
    quantization: str | None,
    tensor_parallel_size: int,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    kv_cache_bytes: int | None,
    gpu_memory_utilization: float,
    compiles: bool,
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
                logprobs_mode="processed_logits",  # what our processor leaves: the log-probability of what it drew
                dtype=dtype,
                quantization=quantization,
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=max_positions,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_memory_bytes=kv_cache_bytes,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=not compiles,
                enable_prefix_caching=True,
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
    """A vLLM logits processor that draws each token from its request's own stream.

    It leaves no other token to choose from, and in place of that one's logit its log-probability under the untouched
    logits, which is then what vLLM reports: of its own it would compute a softmax over the whole vocabulary.
    """
    import numpy as np
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

    from stage1_dual.sampling.draws import build_warper, draw_tokens, log_probabilities, uniforms_of

    class DrawTokens(LogitsProcessor):  # type: ignore[misc]  # vllm publishes no types
        rows = 0
        """Rows of logits that this process has drawn from."""

        def __init__(self, vllm_config: VllmConfig, *_: object) -> None:
            distribution = Distribution(**vllm_config.additional_config[_DISTRIBUTION])
            self._warp = None if distribution.is_the_policy else build_warper(distribution)
            self._streams: dict[int, tuple[np.ndarray, list[int]]] = {}  # batch row: its uniforms, its tokens so far

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: BatchUpdate | None) -> None:
            if batch_update is None:
                return
            for row in batch_update.removed:
                self._streams.pop(row, None)
            for row, params, _, tokens in batch_update.added:
                # One more than are drawn: scheduled ahead, a request may be in the batch for a step after its last.
                uniforms = uniforms_of(params.extra_args[_SEED], n_tokens=params.max_tokens + 1)
                self._streams[row] = (uniforms, tokens)
            for source, target, direction in batch_update.moved:
                moved, displaced = self._streams.pop(source), self._streams.pop(target, None)
                self._streams[target] = moved
                if direction == MoveDirectionality.SWAP and displaced is not None:
                    self._streams[source] = displaced

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            # With asynchronous scheduling the last token may not be known here yet; its place in the list is.
            streams = [self._streams[row] for row in range(logits.shape[0])]
            next_uniforms = np.array([uniforms[len(tokens)] for uniforms, tokens in streams])
            uniforms = torch.from_numpy(next_uniforms).to(logits.device, non_blocking=True)
            if self._warp is None:
                chosen, logp = draw_tokens(logits, uniforms)
            else:
                chosen, _ = draw_tokens(self._warp(logits), uniforms)
                logp = log_probabilities(logits, chosen)
            DrawTokens.rows += len(streams)
            return logits.fill_(-torch.inf).scatter_(1, chosen[:, None], logp[:, None].to(logits.dtype))

    return DrawTokens


@contextmanager
def borrowed_process(*, offline: bool, threads: int | None, compile_cache: Path | None) -> Iterator[None]:
    """Set what vLLM reads from the process, and undo afterwards what it and we changed.

    Args:
        offline: whether the model is here.
        threads: CPU threads, or None for torch's number.
        compile_cache: where compiled code is kept, or None to compile nothing.
    """
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
            "VLLM_LOGGING_LEVEL": environment.get("VLLM_LOGGING_LEVEL", "ERROR"),
        }
    )
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if compile_cache is not None:
        os.environ["VLLM_CACHE_ROOT"] = str(compile_cache)
        # torch's own default is a name under /tmp that anybody could have taken, and it runs what it finds there.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache / "torchinductor"))
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        # Without compilation there is no need for the two small functions that vLLM compiles in any case, either.
        with torch._dynamo.config.patch(disable=compile_cache is None):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(n_threads)
        for name, function in accelerator.items():
            setattr(torch.accelerator, name, function)
        torch.set_rng_state(random_state)
