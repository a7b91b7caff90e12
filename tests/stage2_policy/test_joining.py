"""The join and the copied tokens against dictionaries, on tables in odd orders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.solution import read_solution
from stage2_policy.data import read_training_data
from stage2_policy.joining import copy_tokens, join_weights, require_room
from stage2_policy.mapped_files import map_token_lists

Rows = Sequence[Mapping[str, Any]]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_rows_are_those_of_a_dictionary_sorted_by_key(stage_one: Any, tilted_rows: Rows) -> None:
    solution = read_solution(stage_one.dual / "dual.json")
    found = join_weights(samples=stage_one.samples, tilted=stage_one.tilted, solution=solution)
    by_key = {(row["prompt_id"], row["sample_index"]): row for row in tilted_rows}

    assert [
        (found.prompt_ids[place], index)
        for place, index in zip(found.prompt_p.tolist(), found.sample_index.tolist(), strict=True)
    ] == sorted(by_key)
    for name in ("weight", "sampler_logp"):
        assert getattr(found, name).tolist() == [by_key[key][name] for key in sorted(by_key)]
    assert found.n_samples == len(tilted_rows)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_copied_tokens_are_those_of_their_rows_and_no_others(
    share: float, stage_one: Any, rows: Rows, tmp_path: Path
) -> None:
    in_table = [*rows[1::2], *rows[::2]]  # as the two shards have them
    wanted = np.random.default_rng(0).random(len(rows)) < share
    files = {"prompts": tmp_path / "prompts.arrow", "completions": tmp_path / "completions.arrow"}
    copied = copy_tokens(stage_one.samples, wanted, **files)
    prompts, completions = (map_token_lists(path) for path in files.values())

    for row, found in enumerate(in_table):
        if wanted[row]:
            assert prompts[copied.prompt_n[row]].tolist() == found["prompt_token_ids"]
            assert completions[copied.completion_n[row]].tolist() == found["completion_token_ids"]
            assert copied.prompt_length_n[row] == len(found["prompt_token_ids"])
            assert copied.completion_length_n[row] == len(found["completion_token_ids"])
    assert len(completions) == wanted.sum()
    if share == 1.0:
        assert len(prompts) == 16  # the prompts of either shard once each, although some are of one length


def test_prompts_of_one_length_are_told_apart(rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path) -> None:
    other = {row["prompt_id"]: place for place, row in enumerate(rows)}
    changed = [{**row, "prompt_token_ids": [7, 8, other[row["prompt_id"]] % 3 + 9]} for row in rows]
    found = read_training_data(**vars(write_stage_one(tmp_path, changed)), held_out_fraction=0.25)
    by_key = {(row["prompt_id"], row["sample_index"]): row["prompt_token_ids"] for row in changed}
    for part in (found.train, found.held_out):
        for place, index, (prompt, _) in zip(part.prompt_p, part.sample_index, part.sequences, strict=True):
            assert prompt.tolist() == by_key[part.prompt_ids[place], index]


def test_a_disk_without_room_is_known_before_anything_is_written(
    stage_one: Any, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = np.ones(len(rows), dtype=bool)
    prompts = {row["prompt_id"]: row["prompt_token_ids"] for row in rows}
    tokens = sum(len(row["completion_token_ids"]) for row in rows) + sum(map(len, prompts.values()))
    files = {"prompts": tmp_path / "prompts.arrow", "completions": tmp_path / "completions.arrow"}
    copy_tokens(stage_one.samples, wanted, **files)
    lists = [map_token_lists(path) for path in files.values()]
    assert sum(len(one[place]) for one in lists for place in range(len(one))) >= tokens
    need = 4 * tokens + 72 * len(rows)

    def of(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
        require_room(tmp_path, stage_one.samples, wanted, n_prompts=len(prompts))

    of(round(1.1 * need))  # within a tenth: prompts of other lengths have other numbers of responses
    with pytest.raises(InputError, match=r"take about 0\.0 GB until it is done, and 0\.0 GB are free there"):
        of(round(0.9 * need))
