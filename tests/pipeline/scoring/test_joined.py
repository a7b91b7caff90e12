"""Samples and scores are joined by key: order, files and gaps of the tables change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.joined_scores import join

from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, SCORES
from pipeline.scoring.joined import JoinedScores, apply_length_rule, read_scores

KEYS = [(prompt, index) for prompt in ("a", "b", "c") for index in range(3)]
VALUE = {key: float(place) for place, key in enumerate(KEYS)}


def _samples(
    folder: Path, keys: Sequence[tuple[str, int]], *, cut_off: Sequence[tuple[str, int]] = ()
) -> ShardedTable:
    rows = [
        {
            "prompt_id": prompt,
            "sample_index": index,
            "completion": "yes",
            "prompt_token_ids": [1],
            "completion_token_ids": [2],
            "finish_reason": "length" if (prompt, index) in cut_off else "stop",
            "seed": 0,
            "sampler_logp": -1.0,
        }
        for prompt, index in keys
    ]
    return _in_two_files(ShardedTable(folder=folder, schema=SAMPLES, metadata={}), rows)


def _scores(folder: Path, values: Mapping[tuple[str, int], float]) -> ShardedTable:
    rows = [
        {"prompt_id": prompt, "sample_index": index, "value": value, "scored_sha256": "", "truncated": False}
        for (prompt, index), value in values.items()
    ]
    return _in_two_files(ShardedTable(folder=folder, schema=SCORES, metadata={}), rows)


def _in_two_files(table: ShardedTable, rows: list[dict[str, Any]]) -> ShardedTable:
    for order, part in (("0", rows[:4]), ("1", rows[4:])):
        table.write_shard(pa.Table.from_pylist(part, schema=table.schema), split="train", order=order)
    table.finish()
    return table


def _read(
    tmp_path: Path, helpful: Mapping[tuple[str, int], float], harmless: Mapping[tuple[str, int], float], **limits: int
) -> tuple[JoinedScores, int]:
    rng = np.random.default_rng(0)
    keys = [KEYS[place] for place in rng.permutation(len(KEYS))]
    return read_scores(
        _samples(tmp_path / "samples", keys, cut_off=[("b", 1)]),
        {"helpful": _scores(tmp_path / "helpful", helpful), "harmless": _scores(tmp_path / "harmless", harmless)},
        reward="helpful",
        constraints=["harmless"],
        split="train",
        **{"max_unscored": 0, **limits},
    )


def test_any_order_gives_the_rows_by_key(tmp_path: Path) -> None:
    rows, unscored = _read(tmp_path, dict(reversed(VALUE.items())), {key: -value for key, value in VALUE.items()})
    assert unscored == 0
    assert list(zip(np.array(rows.prompt_ids)[rows.prompt_n], rows.sample_index_n, strict=True)) == KEYS
    assert rows.reward_n.tolist() == list(VALUE.values())
    assert rows.scores_ns[:, 0].tolist() == [-value for value in VALUE.values()]
    assert [KEYS[row] for row in np.flatnonzero(rows.cut_off_n)] == [("b", 1)]
    assert rows.starts.tolist() == [0, 3, 6]


def test_a_sample_without_one_of_its_scores_is_left_out_if_that_is_on_record(tmp_path: Path) -> None:
    missing = {key: value for key, value in VALUE.items() if key[0] != "a" and key != ("c", 2)}
    rows, unscored = _read(tmp_path, VALUE, missing, max_unscored=4)
    assert unscored == 4
    assert rows.prompt_ids == ("b", "c")
    assert rows.reward_n.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0]
    with pytest.raises(CorruptArtifactError, match=r"4 of 9 train samples in .* lack a score of helpful or harmless"):
        _read(tmp_path / "again", VALUE, missing, max_unscored=3)


def test_scores_of_other_samples_and_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="1 scores of samples that are not there"):
        _read(tmp_path / "more", VALUE, {**VALUE, ("b", 3): 0.0})
    with pytest.raises(InputError, match="scorer `harmless` gave 1 scores that are not finite"):
        _read(tmp_path / "nan", VALUE, {**VALUE, ("b", 1): float("inf")})


ROWS = join({"a": [(0.0, 0.0, True)], "b": [(1.0, 1.0, False), (2.0, 2.0, True)], "c": [(3.0, 3.0, False)]})


def test_only_drop_leaves_out_what_was_cut_off(tmp_path: Path) -> None:
    kept = apply_length_rule(ROWS, "drop")
    assert (kept.prompt_ids, kept.reward_n.tolist(), kept.prompt_n.tolist()) == (("b", "c"), [1.0, 3.0], [0, 1])
    for rule in ("keep", "flag"):
        assert apply_length_rule(ROWS, rule) is ROWS


def test_rows_of_a_table_are_found_by_key() -> None:
    table = pa.table({"prompt_id": ["c", "x", "b", "b", "a"], "sample_index": [0, 0, 1, 2, 0]})
    there, here = ROWS.find_in(table)
    assert (there.tolist(), here.tolist()) == ([4, 2, 0], [0, 2, 3])
    assert ROWS.of_prompts({"b", "x"}).reward_n.tolist() == [1.0, 2.0]
    ids, reward, constraints = ROWS.by_prompt()
    assert (ids, [one.tolist() for one in reward]) == (["a", "b", "c"], [[0.0], [1.0, 2.0], [3.0]])
    assert [one.shape for one in constraints] == [(1, 1), (2, 1), (1, 1)]
