from __future__ import annotations

import pytest

from stage1_dual.shard_plan import missing_shards

KEYS = [(prompt_id, k) for prompt_id in "abcde" for k in range(3)]


@pytest.mark.parametrize("shard_rows", range(1, 2 * len(KEYS) + 2))
def test_every_key_is_planned_exactly_once(shard_rows: int) -> None:
    shards = missing_shards(KEYS, set(), shard_rows=shard_rows)
    assert [key for _, keys in shards for key in keys] == KEYS
    assert len({order for order, _ in shards}) == len(shards)
    assert [order for order, _ in shards] == sorted(order for order, _ in shards)


def test_a_lost_shard_is_planned_as_before() -> None:
    whole = missing_shards(KEYS, set(), shard_rows=4)
    lost = whole[2]
    present = {key for order, keys in whole if order != lost[0] for key in keys}
    assert missing_shards(KEYS, present, shard_rows=4) == [lost]
    assert missing_shards(KEYS, set(KEYS), shard_rows=4) == []


def test_a_top_up_takes_no_name_that_is_in_use() -> None:
    first = missing_shards(KEYS, set(), shard_rows=4)
    more = [(prompt_id, k) for prompt_id in "abcde" for k in range(5)]
    added = missing_shards(more, set(KEYS), shard_rows=4)
    assert {key for _, keys in added for key in keys} == set(more) - set(KEYS)
    assert not {order for order, _ in first} & {order for order, _ in added}
