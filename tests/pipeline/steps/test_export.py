"""The hand-off table against weights worked out by hand, joined by key from files in any order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers.joined_scores import join
from helpers.solutions import bound, build_solution
from scipy.special import softmax

from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import PROMPTS, SAMPLES
from pipeline.steps import export
from pipeline.steps.export import _whole_pairs, write_tilted_table

BETA, LAM = 0.5, 0.7
SCORES = {
    "a": [(0.0, 1.0, False), (1.0, -1.0, False), (0.5, 0.0, False)],
    "b": [(2.0, 0.0, False), (-2.0, 3.0, False), (0.0, 0.0, False)],
}
SPLIT_OF_FILES = (["b1", "a0"], ["a2", "b0"], ["b2", "a1"])
"""Rows of each file of samples, prompt and index: neither prompts nor indices are in order."""


def _samples(folder: Path) -> ShardedTable:
    table = ShardedTable(folder=folder, schema=SAMPLES, metadata={})
    for place, keys in enumerate(SPLIT_OF_FILES):
        rows = [
            {
                "prompt_id": key[0],
                "sample_index": int(key[1]),
                "completion": f"completion {key}",
                "prompt_token_ids": [1],
                "completion_token_ids": [2],
                "finish_reason": "stop",
                "seed": 0,
                "sampler_logp": -1.0,
            }
            for key in keys
        ]
        table.write_shard(pa.Table.from_pylist(rows, schema=SAMPLES), split="train", order=f"{place:06d}")
    return table


def _prompts() -> pa.Table:
    rows = [
        {
            "prompt_id": name,
            "prompt": [{"role": "user", "content": f"prompt {name}"}],
            "split": "train",
            "source": "hand",
            "category": f"category {name}",
        }
        for name in ("b", "a")
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


@pytest.mark.parametrize("rows_per_file", [1, 4, 100])
@pytest.mark.parametrize(("direction", "sign"), [(">=", 1.0), ("<=", -1.0)])
def test_every_response_has_its_own_scores_texts_and_weight(tmp_path, monkeypatch, rows_per_file, direction, sign):
    monkeypatch.setattr(export, "_ROWS_PER_FILE", rows_per_file)
    files, n_rows = write_tilted_table(
        tmp_path / "tilted",
        prompts=_prompts(),
        samples=_samples(tmp_path / "samples"),
        scored={"train": join(SCORES)},
        solution=build_solution(bound(direction=direction, multiplier=LAM), beta=BETA),
        metadata={},
    )
    rows = [row for name in files for row in pq.read_table(tmp_path / "tilted" / name).to_pylist()]
    assert n_rows == len(rows) == 6
    assert len(files) == {1: 3, 4: 2, 100: 1}[rows_per_file]
    found = {(row["prompt_id"], row["sample_index"]): row for row in rows}
    for prompt, scored in SCORES.items():
        # Multipliers are those of the turned score; the columns are in the user's own direction.
        weights = softmax([(reward + sign * LAM * score) / BETA for reward, score, _ in scored])
        for index, ((reward, score, _), weight) in enumerate(zip(scored, weights, strict=True)):
            row = found[prompt, index]
            assert (row["reward"], row["constraint_harmless"]) == (reward, score)
            assert row["weight"] == pytest.approx(weight, rel=1e-12)
            assert row["completion"] == f"completion {prompt}{index}"
            assert row["prompt"] == [{"role": "user", "content": f"prompt {prompt}"}]
            assert (row["split"], row["category"]) == ("train", f"category {prompt}")


def test_responses_that_take_no_part_are_left_out_and_the_others_share_their_weight(tmp_path):
    scored = join(SCORES)
    kept = scored.select(~((scored.prompt_n == 0) & (scored.sample_index_n == 1)))
    files, n_rows = write_tilted_table(
        tmp_path / "tilted",
        prompts=_prompts(),
        samples=_samples(tmp_path / "samples"),
        scored={"train": kept},
        solution=build_solution(bound(multiplier=LAM), beta=BETA),
        metadata={},
    )
    table = pa.concat_tables(pq.read_table(tmp_path / "tilted" / name) for name in files)
    assert n_rows == table.num_rows == 5
    weights = {prompt: np.array(table.filter(pc.equal(table["prompt_id"], prompt))["weight"]) for prompt in SCORES}
    assert [len(weights[prompt]) for prompt in ("a", "b")] == [2, 3]
    for weight_k in weights.values():
        assert weight_k.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_pair_takes_part_whole_or_not_at_all():
    scored = join({"a": [(0.0, 0.0, False)] * 4, "b": [(0.0, 0.0, False)] * 2})
    without = scored.select(~((scored.prompt_n == 0) & (scored.sample_index_n == 2)))
    whole = _whole_pairs(without)
    keys = [(whole.prompt_ids[p], int(k)) for p, k in zip(whole.prompt_n, whole.sample_index_n, strict=True)]
    assert keys == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    halves = scored.select(scored.sample_index_n % 2 == 0)
    assert _whole_pairs(halves).n_samples == 0


def test_a_share_of_a_category_hands_on_its_column_and_the_raw_score(tmp_path):
    """Column, raw score and weight by hand: 1 where it counts and is safe, less 0.9 where it counts."""
    share = {"kind": "share", "at_least": 0.0, "where": {"category": ["category a"]}}
    rest = {"certified_at": None, "column_ratio": 0.9, "column_threshold": 0.0}
    safe = bound("safe", score="harmless", statistic=share, threshold=0.9, multiplier=LAM, **rest)
    categories = {"category": np.array(["category a", "category b"], dtype=object)}
    files, _ = write_tilted_table(
        tmp_path / "tilted",
        prompts=_prompts(),
        samples=_samples(tmp_path / "samples"),
        scored={"train": replace(join(SCORES), prompt_columns=categories)},
        solution=build_solution(safe, beta=BETA),
        metadata={},
    )
    rows = [row for name in files for row in pq.read_table(tmp_path / "tilted" / name).to_pylist()]
    found = {(row["prompt_id"], row["sample_index"]): row for row in rows}
    for prompt, scored in SCORES.items():
        column = [((score >= 0) - 0.9 if prompt == "a" else 0.0) for _, score, _ in scored]
        weights = softmax([(reward + LAM * u) / BETA for (reward, _, _), u in zip(scored, column, strict=True)])
        for index, (_, score, _) in enumerate(scored):
            row = found[prompt, index]
            assert row["constraint_safe"] == pytest.approx(column[index], abs=1e-15)
            assert row["score_harmless"] == score
            assert row["weight"] == pytest.approx(weights[index], rel=1e-12)
