"""Probabilities of a judge's next token by vLLM; one of the three files that import it.

The engine runs in this process, as the sampler's does and for the same reason.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import is_local
from stage1_dual.sampling.vllm_sampler import borrowed_process
from stage1_dual.scoring.shared_prefix import PaddingCounts
from stage1_dual.scoring.vllm_pooling import _ANY_FREE_MEMORY, _cache_bytes


class VllmNextToken:
    """Log-probabilities of some tokens as the next one of a text, computed by an in-process vLLM engine.

    They are those of the model's softmax over its whole vocabulary, before anything that bends a distribution. While
    the engine lives, ``VLLM_*`` environment variables and a few torch settings belong to vLLM; :meth:`close` puts them
    back.

    Args:
        checkpoint: folder of a causal language model, or its id on the Hub.
        wanted: the tokens.
        revision: branch, tag or commit of a Hub model.
        dtype: of weights and arithmetic; the softmax is float32.
        max_length: longest text, tokens; below the model's positions, for a token is drawn behind it.
        token_budget: tokens computed at once (speed and memory only).

    Raises:
        MissingExtraError: vLLM is not installed.
        InputError: vLLM cannot load the checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        wanted: Sequence[int],
        revision: str | None,
        dtype: Dtype,
        max_length: int,
        token_budget: int,
    ) -> None:
        self._wanted = list(wanted)
        self._engine: Any = None
        self.counts = PaddingCounts()
        self._process: Any = borrowed_process(offline=is_local(checkpoint), threads=None, compile_cache=None)
        self._process.__enter__()
        try:
            with warnings.catch_warnings(action="ignore"):  # of what vLLM uses, which its users cannot change
                try:
                    from vllm import LLM
                except ImportError as error:
                    raise import_failure(error, package="vllm", extra="sample", purpose="scoring with vLLM") from error
                self._engine = LLM(
                    model=checkpoint,
                    revision=revision,
                    tokenizer_revision=revision,
                    trust_remote_code=False,
                    generation_config="vllm",  # not the model's own top_p and the like
                    dtype=dtype,
                    max_model_len=max_length + 1,
                    max_num_batched_tokens=max(token_budget, max_length + 1),
                    kv_cache_memory_bytes=_cache_bytes(
                        checkpoint,
                        revision=revision,
                        dtype=dtype,
                        max_length=max_length + 1,
                        token_budget=token_budget,
                    ),
                    gpu_memory_utilization=_ANY_FREE_MEMORY,
                    enforce_eager=True,
                    enable_prefix_caching=True,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    seed=0,
                )
        except (OSError, ValueError) as error:
            self.close()
            raise InputError(f"vLLM cannot load {checkpoint}: {error}") from error
        except BaseException:
            self.close()
            raise

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:  # noqa: ARG002
        """Log-probability of each wanted token behind each text, nats, float64, shape (n, wanted)."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        # Cached beginnings of an earlier call would change the batches of this one, and with them the last bits.
        self._engine.reset_prefix_cache()
        outputs = self._engine.generate(
            [TokensPrompt(prompt_token_ids=list(ids)) for ids in token_ids],
            SamplingParams(max_tokens=1, temperature=1.0, logprob_token_ids=self._wanted, detokenize=False),
            use_tqdm=False,
        )
        read = sum(len(ids) for ids in token_ids)
        computed = read - sum(output.num_cached_tokens or 0 for output in outputs)
        self.counts += PaddingCounts(computed, computed, read)
        found = np.empty((len(outputs), len(self._wanted)))
        for place, output in enumerate(outputs):
            (first,) = output.outputs[0].logprobs
            found[place] = [first[token].logprob for token in self._wanted]
        return found

    def close(self) -> None:
        """Free the engine and give the process its settings back."""
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
            self._engine = None
            gc.collect()  # the engine is full of cycles, and one of them holds the cache
        if self._process is not None:
            self._process.__exit__(None, None, None)
            self._process = None
