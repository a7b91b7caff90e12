"""Seeds derived by hash: no two samples of a run share one, and more samples never repeat earlier ones."""

from __future__ import annotations

import hashlib
import json


def sample_seed(run_seed: int, prompt_id: str, sample_index: int) -> int:
    """The seed of one sample, in [1, 2**63).

    Zero is left out because samplers take it for "not seeded"; the upper limit is that of a signed 64-bit integer,
    which the samples table and vLLM's request both hold.
    """
    digest = hashlib.sha256(json.dumps([run_seed, prompt_id, sample_index]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**63 - 1) + 1
