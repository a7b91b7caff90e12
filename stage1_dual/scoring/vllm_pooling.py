"""Heads of a classifier by vLLM's pooling; one of the three files that import vLLM.

The engine runs in this process, as the sampler's does and for the same reason. What it gives is the raw output of the
heads, in float32: vLLM would otherwise apply a sigmoid or softmax of its own choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import Heads
from stage1_dual.scoring.shared_prefix import PaddingCounts
from stage1_dual.scoring.vllm_engine import ANY_FREE_MEMORY, ScoringEngine, cache_bytes

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


class VllmPooling(ScoringEngine):
    """Heads of a classifier, computed by an in-process vLLM engine.

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
        # vLLM's class of these reward models has an output for every token, and transformers' a head for the last.
        self._is_tokenwise = heads.layout == "two_layers"
        super().__init__(checkpoint)
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
        self._count(token_ids, outputs)
        values = [output.outputs.data[-1] if self._is_tokenwise else output.outputs.data for output in outputs]
        return np.stack([value.double().cpu().numpy() for value in values])

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
                kv_cache_memory_bytes=cache_bytes(
                    checkpoint, revision=revision, dtype=dtype, max_length=max_length, token_budget=token_budget
                ),
                gpu_memory_utilization=ANY_FREE_MEMORY,
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
