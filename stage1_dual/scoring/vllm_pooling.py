"""Heads of a classifier by vLLM's pooling; one of the three files that import vLLM.

The engine runs in this process, as the sampler's does and for the same reason. What it gives is the raw output of the
heads, in float32: vLLM would otherwise apply a sigmoid or softmax of its own choice.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import Heads, is_local
from stage1_dual.sampling.vllm_sampler import borrowed_process
from stage1_dual.scoring.shared_prefix import PaddingCounts

POOLED = frozenset(
    {
        "GPT2ForSequenceClassification",
        "GPTNeoXForSequenceClassification",
        "GemmaForSequenceClassification",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "MistralForSequenceClassification",
        "Phi3ForSequenceClassification",
        "Qwen2ForRewardModel",
        "Qwen2ForSequenceClassification",
        "Qwen3ForSequenceClassification",
    }
)
"""Decoders that vLLM 0.29 was seen to pool as transformers does, to 4e-6 in float32
(``benchmarks/scoring_rate.py --architectures``). Gemma 2 differed by 1e-3, and encoders do not start with a cache."""
_CACHE_FACTOR = 4
"""Tokens whose keys and values are held, as a multiple of a batch's: that of :mod:`.shared_prefix`."""
_BLOCK = 128
"""Tokens of the largest block of keys and values in use, that of vLLM on CPUs; a request may leave one half empty."""
_ANY_FREE_MEMORY = 0.01
"""Share of a device's memory that must be free at the start. What is used is told in bytes instead."""


class VllmPooling:
    """Heads of a classifier, computed by an in-process vLLM engine.

    While it lives, ``VLLM_*`` environment variables and a few torch settings belong to vLLM; :meth:`close` puts them
    back.

    Args:
        checkpoint: folder of a classifier, or its id on the Hub.
        heads: of the checkpoint.
        revision: branch, tag or commit of a Hub model.
        dtype: of weights and arithmetic; the heads are float32 whatever it is.
        max_length: longest text, tokens.
        token_budget: tokens computed at once (speed and memory only).

    Raises:
        MissingExtraError: vLLM is not installed.
        InputError: vLLM does not pool this architecture, or cannot load the checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        heads: Heads,
        revision: str | None,
        dtype: Dtype,
        max_length: int,
        token_budget: int,
    ) -> None:
        require_pooled(heads, checkpoint=checkpoint)
        self._engine: Any = None
        # vLLM's class of these reward models has an output for every token, and transformers' a head for the last.
        self._is_tokenwise = heads.layout == "two_layers"
        self.counts = PaddingCounts()
        self._process: Any = borrowed_process(offline=is_local(checkpoint), threads=None, compile_cache=None)
        self._process.__enter__()
        try:
            self._engine = _start_engine(
                checkpoint,
                heads,
                revision=revision,
                dtype=dtype,
                max_length=max_length,
                token_budget=token_budget,
            )
            self._require_computes(checkpoint)
        except BaseException:
            self.close()
            raise

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:  # noqa: ARG002
        """Raw outputs of all heads on the last token of each text, float64, shape (n, heads)."""
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        # Cached beginnings of an earlier call would change the batches of this one, and with them the last bits.
        self._engine.reset_prefix_cache()
        outputs = self._engine.encode(
            [TokensPrompt(prompt_token_ids=list(ids)) for ids in token_ids],
            PoolingParams(use_activation=False),
            pooling_task="token_classify" if self._is_tokenwise else "classify",
            use_tqdm=False,
        )
        read = sum(len(ids) for ids in token_ids)
        computed = read - sum(output.num_cached_tokens for output in outputs)
        self.counts += PaddingCounts(computed, computed, read)
        values = [output.outputs.data[-1] if self._is_tokenwise else output.outputs.data for output in outputs]
        return np.stack([value.double().cpu().numpy() for value in values])

    def close(self) -> None:
        """Free the engine and give the process its settings back."""
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
            self._engine = None
            gc.collect()  # the engine is full of cycles, and one of them holds the cache
        if self._process is not None:
            self._process.__exit__(None, None, None)
            self._process = None

    def _require_computes(self, checkpoint: str) -> None:
        """Compute one token: what a kernel does not do shows there, once, and not on every row."""
        try:
            self.logits([[0]], [0])
        except Exception as error:
            raise InputError(f"vLLM cannot compute {checkpoint}: {type(error).__name__}: {error}") from error
        self.counts = PaddingCounts()


def require_pooled(heads: Heads, *, checkpoint: str) -> None:
    """Refuse an architecture that vLLM was not seen to pool as transformers does; loads nothing.

    Raises:
        InputError: names the architecture and those there are.
    """
    if not any(name in POOLED for name in heads.architectures):
        raise InputError(
            f"`engine: vllm` does not read the scorer {checkpoint}: its architecture is "
            f"{', '.join(heads.architectures)}, and those that it was seen to pool as transformers does are "
            f"{', '.join(sorted(POOLED))}; use `engine: transformers`"
        )


def _start_engine(
    checkpoint: str, heads: Heads, *, revision: str | None, dtype: Dtype, max_length: int, token_budget: int
) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of what vLLM uses, which its users cannot change
        try:
            from vllm import LLM
        except ImportError as error:
            raise import_failure(error, package="vllm", extra="sample", purpose="scoring with vLLM") from error
        try:
            return LLM(
                model=checkpoint,
                revision=revision,
                tokenizer_revision=revision,
                trust_remote_code=False,
                runner="pooling",
                convert="none" if heads.layout == "two_layers" else "classify",
                hf_overrides={"num_labels": len(heads.labels)},  # which the weights may say and config.json not
                model_impl="vllm",  # not transformers' own classes, whose pooling vLLM would choose
                dtype=dtype,
                max_model_len=max_length,
                max_num_batched_tokens=max(token_budget, max_length),
                kv_cache_memory_bytes=_cache_bytes(
                    checkpoint, revision=revision, dtype=dtype, max_length=max_length, token_budget=token_budget
                ),
                gpu_memory_utilization=_ANY_FREE_MEMORY,
                enforce_eager=True,
                enable_prefix_caching=True,
                # A text of all positions that is computed in two parts waits for ever for its last token.
                enable_chunked_prefill=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"vLLM cannot load {checkpoint}: {error}") from error


def _cache_bytes(checkpoint: str, *, revision: str | None, dtype: Dtype, max_length: int, token_budget: int) -> int:
    """Memory of the keys and values of some batches, and of the longest text at least."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        checkpoint, revision=revision, trust_remote_code=False, local_files_only=is_local(checkpoint)
    ).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize
    blocks = -(-max(_CACHE_FACTOR * token_budget, max_length) // _BLOCK) + 1
    return int(blocks * _BLOCK * a_token)
