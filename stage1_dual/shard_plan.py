"""Which shards of a table are still to be computed; the same plan for samples and for scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pipeline.contracts.shards import iterate_missing


def missing_shards(
    keys: Sequence[tuple[str, int]], present: set[tuple[str, int]], *, shard_rows: int
) -> list[tuple[str, list[tuple[str, int]]]]:
    """Order string and missing keys of each shard to compute, planned from all the keys of a split.

    The order string sorts by place; the hash of the keys in it keeps a shard of a top-up from taking the name of the
    shard that already holds the place's earlier keys.

    Args:
        keys: (prompt_id, sample_index) of every row of the split, in table order.
        present: keys of the rows on disk.
        shard_rows: rows of a full shard.
    """
    plan = [keys[start : start + shard_rows] for start in range(0, len(keys), shard_rows)]
    return [(f"{place:06d}-{_hash_of(shard)}", shard) for place, shard in iterate_missing(plan, present)]


def _hash_of(keys: Sequence[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for prompt_id, sample_index in keys:
        digest.update(f"{prompt_id}\n{sample_index}\n".encode())
    return digest.hexdigest()[:8]
