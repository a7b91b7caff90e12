"""What networks that vLLM computes have in common: an engine in this process, which is ended with what it borrowed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import cache_bytes_per_token, is_local
from stage1_dual.sampling.vllm_sampler import borrowed_process
from stage1_dual.scoring.shared_prefix import PaddingCounts

ANY_FREE_MEMORY = 0.01
"""Share of a device's memory that must be free at the start. What is used is told in bytes instead."""
_CACHE_FACTOR = 4
"""Tokens whose keys and values are held, as a multiple of a batch's: that of :mod:`.shared_prefix`."""
_BLOCK = 128
"""Tokens of the largest block of keys and values in use, that of vLLM on CPUs; a request may leave one half empty."""


class ScoringEngine:
    """An in-process vLLM engine that reads texts, and the process it borrows.

    While it lives, ``VLLM_*`` environment variables and a few torch settings belong to vLLM; :meth:`close` puts them
    back. A subclass sets the engine.

    Args:
        checkpoint: folder of a model, or its id on the Hub.
    """

    def __init__(self, checkpoint: str) -> None:
        self._engine: Any = None
        self.counts = PaddingCounts()
        self._process: Any = borrowed_process(offline=is_local(checkpoint), threads=None, compile_cache=None)
        self._process.__enter__()

    def close(self) -> None:
        """Free the engine and give the process its settings back."""
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
            self._engine = None
            gc.collect()  # the engine is full of cycles, and one of them holds the cache
        if self._process is not None:
            self._process.__exit__(None, None, None)
            self._process = None

    def _count(self, token_ids: Sequence[Sequence[int]], outputs: Sequence[Any]) -> None:
        """Add what vLLM computed for the texts; beginnings that it had already are not."""
        read = sum(len(ids) for ids in token_ids)
        computed = read - sum(output.num_cached_tokens or 0 for output in outputs)
        self.counts += PaddingCounts(computed, computed, read)


def cache_bytes(checkpoint: str, *, revision: str | None, dtype: Dtype, max_length: int, token_budget: int) -> int:
    """Memory of the keys and values of some batches, and of the longest text at least."""
    blocks = -(-max(_CACHE_FACTOR * token_budget, max_length) // _BLOCK) + 1
    return blocks * _BLOCK * cache_bytes_per_token(checkpoint, revision=revision, dtype=dtype)
