from __future__ import annotations

import numpy as np
import pytest

from stage1_dual.shard_plan import missing_shards, shard_order

N_PROMPTS, N_SAMPLES = 5, 3


def plan(presence: np.ndarray, shard_rows: int) -> list[tuple[str, list[tuple[str, int]]]]:
    shards = []
    for place, prompt_n, sample_n in missing_shards(presence, shard_rows=shard_rows):
        keys = [("abcde"[prompt], int(sample)) for prompt, sample in zip(prompt_n, sample_n, strict=True)]
        shards.append((shard_order(place, keys), keys))
    return shards


KEYS = [(prompt_id, k) for prompt_id in "abcde" for k in range(N_SAMPLES)]
NOTHING = np.zeros((N_PROMPTS, N_SAMPLES), dtype=bool)


@pytest.mark.parametrize("shard_rows", range(1, 2 * len(KEYS) + 2))
def test_every_key_is_planned_exactly_once(shard_rows: int) -> None:
    shards = plan(NOTHING, shard_rows)
    assert [key for _, keys in shards for key in keys] == KEYS
    assert len({order for order, _ in shards}) == len(shards)
    assert [order for order, _ in shards] == sorted(order for order, _ in shards)


def test_a_lost_shard_is_planned_as_before() -> None:
    whole = plan(NOTHING, 4)
    lost = whole[2]
    presence = ~NOTHING
    for prompt_id, sample in lost[1]:
        presence["abcde".index(prompt_id), sample] = False
    assert plan(presence, 4) == [lost]
    assert plan(~NOTHING, 4) == []


def test_a_top_up_takes_no_name_that_is_in_use() -> None:
    first = plan(NOTHING, 4)
    more = np.zeros((N_PROMPTS, 5), dtype=bool)
    more[:, :N_SAMPLES] = True
    added = plan(more, 4)
    assert {key for _, keys in added for key in keys} == {(prompt_id, k) for prompt_id in "abcde" for k in (3, 4)}
    assert not {order for order, _ in first} & {order for order, _ in added}
