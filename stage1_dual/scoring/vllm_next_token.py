"""Probabilities of a judge's next token by vLLM; one of the three files that import it.

The engine runs in this process, as the sampler's does and for the same reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype
from stage1_dual.scoring.vllm_engine import ANY_FREE_MEMORY, ScoringEngine, cache_bytes


class VllmNextToken(ScoringEngine):
    """Log-probabilities of some tokens as the next one of a text, computed by an in-process vLLM engine.

    They are those of the model's softmax over its whole vocabulary, before anything that bends a distribution.

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
        super().__init__(checkpoint)
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
                    kv_cache_memory_bytes=cache_bytes(
                        checkpoint,
                        revision=revision,
                        dtype=dtype,
                        max_length=max_length + 1,
                        token_budget=token_budget,
                    ),
                    gpu_memory_utilization=ANY_FREE_MEMORY,
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
        self._count(token_ids, outputs)
        found = np.empty((len(outputs), len(self._wanted)))
        for place, output in enumerate(outputs):
            (first,) = output.outputs[0].logprobs
            found[place] = [first[token].logprob for token in self._wanted]
        return found
