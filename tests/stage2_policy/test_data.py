from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.tiny_models import save_tiny_policy
from helpers.training_responses import keys_of, responses_of

import stage2_policy.data as data_module
from pipeline.contracts.artifacts import file_sha256, read_manifest, write_json, write_manifest
from pipeline.contracts.errors import CorruptArtifactError, InputError, StaleArtifactError
from stage2_policy.data import (
    TrainingData,
    choose_held_out,
    count_held_out,
    read_training_data,
    skip_negligible,
    split_pairs,
)
from stage2_policy.joining import copy_tokens

Rows = Sequence[Mapping[str, Any]]


def read(stage_one: Any) -> TrainingData:
    return read_training_data(**vars(stage_one), held_out_fraction=0.25)


def test_tokens_and_weights_join_by_key(stage_one: Any, rows: Rows, tilted_rows: Rows) -> None:
    # Samples lie in two interleaved shards, tilted rows shuffled in one.
    data = read(stage_one)
    wanted = {(row["prompt_id"], tuple(row["completion_token_ids"]), row["sample_index"]): row for row in tilted_rows}

    found = set()
    for part in (data.train, data.held_out):
        counts: dict[str, int] = {}
        for prompt_p, (prompt, done), weight in zip(part.prompt_p, part.sequences, part.weight, strict=True):
            name = part.prompt_ids[prompt_p]
            key = (name, tuple(done.tolist()), counts.setdefault(name, 0))
            counts[name] += 1
            found.add(key)
            assert weight == wanted[key]["weight"]
            assert prompt.tolist() == wanted[key]["prompt_token_ids"]
    assert found == set(wanted)


def test_samples_that_the_dual_was_solved_without_are_left_out(
    rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path
) -> None:
    # No score, or cut off and dropped: one of a prompt, and all of another.
    without = [row for row in rows[1:] if row["prompt_id"] != rows[-1]["prompt_id"]]
    renormalised = write_stage_one(tmp_path / "solved", without)
    tilted = [
        row
        for path in sorted(renormalised.tilted.glob("data/*.parquet"))
        for row in pq.read_table(path).to_pylist()  # the weights sum to 1 over what is left
    ]
    data = read(
        write_stage_one(tmp_path / "run", rows, tilted_rows=tilted, n_unscored=len(rows) - len(without)),
    )

    keys = {key for part in (data.train, data.held_out) for key in keys_of(part)}
    assert keys == {(row["prompt_id"], row["sample_index"]) for row in without}
    tokens = {(row["prompt_id"], row["sample_index"]): row["completion_token_ids"] for row in rows}
    for part in (data.train, data.held_out):
        for key, (_, done) in zip(keys_of(part), part.sequences, strict=True):
            assert done.tolist() == tokens[key]


def test_held_out_prompts_of_equal_scores_are_refused(
    rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path
) -> None:
    held_out = read(write_stage_one(tmp_path / "a", rows)).held_out.prompt_ids
    flat = [{**row, "reward": 1.0, "constraint_harm": 0.0} if row["prompt_id"] in held_out else row for row in rows]

    with pytest.raises(InputError, match=r"`held_out_fraction` is 0.25: .* equal scores"):
        read(write_stage_one(tmp_path / "b", flat))


def test_held_out_prompts_are_apart_and_the_same_each_time(stage_one: Any) -> None:
    first, second = read(stage_one), read(stage_one)

    assert len(first.held_out.prompt_ids) == 2
    assert not set(first.held_out.prompt_ids) & set(first.train.prompt_ids)
    assert first.held_out.prompt_ids == second.held_out.prompt_ids


def test_weights_and_tilt_belong_together(stage_one: Any) -> None:
    train = read(stage_one).train
    totals = np.bincount(train.prompt_p, weights=train.weight)

    np.testing.assert_allclose(totals, 1.0, atol=1e-12)
    assert train.n_samples.tolist() == [count for count in np.bincount(train.prompt_p) for _ in range(count)]


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_columns_are_those_of_the_rows_and_add_up_to_the_tilt(part: Any, stage_one: Any) -> None:
    data = read(stage_one)
    responses = getattr(data, part)
    rows = np.flatnonzero(np.arange(len(responses)) % 3 != 1)
    columns = data.columns(part, rows)
    tilt = columns @ np.append(1.0, data.solution.multipliers_m)
    np.testing.assert_allclose(np.ptp(tilt - responses.tilt[rows]), 0.0, atol=1e-12)
    table = pq.read_table(stage_one.tilted / "data").to_pylist()
    found = {(row["prompt_id"], row["sample_index"]): (row["reward"], -row["constraint_harm"]) for row in table}
    keys = keys_of(responses)
    assert [tuple(row) for row in columns] == [found[keys[row]] for row in rows]


@pytest.mark.parametrize("n_prompts", [2, 3, 10, 320])
def test_held_out_is_never_empty_and_never_all(n_prompts: int) -> None:
    held_out = choose_held_out([f"p{place}" for place in range(n_prompts)], fraction=0.1)

    assert 1 <= len(held_out) < n_prompts
    assert held_out == sorted(set(held_out))


@pytest.mark.parametrize(
    ("n_prompts", "fraction", "count"), [(2, 0.9, 1), (3, 0.01, 1), (10, 0.25, 2), (400, 0.1, 40)]
)
def test_as_many_are_held_out_as_are_counted(n_prompts: int, fraction: float, count: int) -> None:
    assert count_held_out(n_prompts, fraction=fraction) == count
    assert len(choose_held_out([f"p{place}" for place in range(n_prompts)], fraction=fraction)) == count


def test_one_prompt_is_too_few() -> None:
    with pytest.raises(InputError, match="1 train prompts: training needs at least 2"):
        choose_held_out(["p"], fraction=0.1)


def test_a_tilted_table_of_another_dual_is_refused(
    rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path
) -> None:
    ours = write_stage_one(tmp_path / "ours", rows)
    theirs = write_stage_one(tmp_path / "theirs", rows, beta=0.6)
    mixed = {**vars(ours), "dual": theirs.dual}

    with pytest.raises(StaleArtifactError, match=r"tilted was made from another `dual` than .*theirs/dual"):
        read_training_data(**mixed, held_out_fraction=0.25)


def test_another_reference_than_the_sampled_one_is_refused(stage_one: Any, tmp_path: Path) -> None:
    other = save_tiny_policy(tmp_path / "other", seed=1)

    with pytest.raises(StaleArtifactError, match=r"was made from another `reference` than .*other"):
        read_training_data(**{**vars(stage_one), "reference": other}, held_out_fraction=0.25)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda rows: rows[1:], InputError, "54 train rows, but dual.json was solved on 55 responses"),
        (lambda rows: [*rows, {**rows[0], "sample_index": 99}], InputError, "1 weights have no sample"),
        (lambda rows: [*rows, rows[0]], InputError, "1 repeated"),
        (
            lambda rows: [{**rows[0], "weight": rows[0]["weight"] + 1e-3}, *rows[1:]],
            InputError,
            "the weights in .* are not those of dual.json",
        ),
        (
            lambda rows: [{**rows[0], "weight": float("nan")}, *rows[1:]],
            InputError,
            "the weights in .* are not those of dual.json",
        ),
    ],
    ids=["missing", "extra", "repeated", "other weight", "NaN weight"],
)
def test_tables_that_do_not_fit_are_refused(
    edit: Callable[[Rows], Rows],
    error: type[Exception],
    message: str,
    rows: Rows,
    tilted_rows: Rows,
    write_stage_one: Callable[..., Any],
    tmp_path: Path,
) -> None:
    broken = write_stage_one(tmp_path, rows, tilted_rows=edit(tilted_rows))

    with pytest.raises(error, match=message):
        read(broken)


def test_an_altered_file_is_refused(rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path) -> None:
    broken = write_stage_one(tmp_path, rows)
    path = broken.dual / "dual.json"
    path.write_text(path.read_text().replace("0.7", "0.8"))

    with pytest.raises(CorruptArtifactError, match=r"dual\.json is not the file that .*manifest\.json records"):
        read(broken)


def test_lam_and_beta_retyped_in_the_dual_are_noticed(
    rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path
) -> None:
    # A dual artifact that is whole and chained, but whose beta does not give these weights.
    broken = write_stage_one(tmp_path, rows)
    path = broken.dual / "dual.json"
    write_json(path, {**json.loads(path.read_text()), "beta": 0.55})
    for folder, name, files in (
        (broken.dual, None, {"dual.json": file_sha256(path)}),
        (broken.tilted, "dual", None),
    ):
        manifest = read_manifest(folder)
        inputs = {**manifest.inputs, **({name: read_manifest(broken.dual).identity} if name else {})}
        write_manifest(
            folder, type(manifest)(**{**vars(manifest), "inputs": inputs, "files": files or manifest.files})
        )

    with pytest.raises(InputError, match=r"the weights in .* are not those of dual.json"):
        read(broken)


def content_of(data: TrainingData) -> list[Any]:
    return [
        (
            keys_of(part),
            part.weight.tolist(),
            part.tilt.tolist(),
            part.sampler_logp.tolist(),
            [(prompt.tolist(), done.tolist()) for prompt, done in part.sequences],
        )
        for part in (data.train, data.held_out)
    ]


def test_mapped_files_are_made_once_and_anew_where_they_are_not_what_was_asked_for(
    rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_one, mapped = write_stage_one(tmp_path / "run", rows), tmp_path / "mapped"
    made: list[Path] = []
    monkeypatch.setattr(
        data_module,
        "copy_tokens",
        lambda table, wanted, **files: made.append(table) or copy_tokens(table, wanted, **files),
    )

    def asked(fraction: float = 0.25) -> TrainingData:
        return read_training_data(**vars(stage_one), held_out_fraction=fraction, mapped=mapped)

    first = content_of(read(stage_one))
    made.clear()
    assert content_of(asked()) == first
    assert content_of(asked()) == first
    assert len(made) == 1
    assert len(asked(0.5).held_out.prompt_ids) == 4
    assert content_of(asked()) == first
    assert len(made) == 3
    for damage in (b"", b"0" * 2_000):
        (mapped / "samples-completions.arrow").write_bytes(damage)
        assert content_of(asked()) == first
    (mapped / "sealed.json").unlink()  # as a killed call leaves it
    assert content_of(asked()) == first
    assert len(made) == 6


def test_a_full_disk_is_named(
    rows: Rows, write_stage_one: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_one = write_stage_one(tmp_path / "run", rows)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_module, "copy_tokens", full)
    with pytest.raises(InputError, match=r"mapped cannot be written or read: No space left on device"):
        read_training_data(**vars(stage_one), held_out_fraction=0.25, mapped=tmp_path / "mapped")


@pytest.mark.parametrize("mass", [0.0, 0.01, 0.2, 0.9])
def test_no_prompt_loses_more_than_the_negligible_mass(mass: float) -> None:
    responses = responses_of((30, 8, 61, 1))
    kept, skipped = skip_negligible(responses, mass=mass)
    rows = dict(zip(keys_of(responses), responses.weight, strict=True))
    lost = dict.fromkeys(responses.prompt_ids, 1.0)
    least = dict.fromkeys(responses.prompt_ids, 2.0)
    for key in keys_of(kept):
        lost[key[0]] -= rows[key]
        least[key[0]] = min(least[key[0]], rows[key])

    assert len(kept) + skipped.n_responses == 100
    assert (skipped.n_responses == 0) == (mass == 0.0)
    assert max(lost.values()) == pytest.approx(skipped.mass_max, abs=1e-12)
    assert skipped.mass_max <= mass
    assert np.mean(list(lost.values())) == pytest.approx(skipped.mass_mean, abs=1e-12)
    # Heaviest first: one more response of any prompt would lose too much.
    assert all(lost[name] + least[name] > mass for name in responses.prompt_ids)
    np.testing.assert_allclose(np.bincount(kept.prompt_p, weights=kept.weight), 1.0)


def test_weights_of_pairs_are_the_tilt_within_each() -> None:
    responses = responses_of((4, 2))
    pairs = split_pairs(responses, beta=0.5)
    odds = np.exp(responses.tilt / 0.5).reshape(-1, 2)
    np.testing.assert_allclose(pairs.weight, (odds / odds.sum(axis=1, keepdims=True)).ravel())


def test_a_response_without_its_partner_is_named() -> None:
    responses = responses_of((4, 6)).select_rows(np.array([0, 1, 2, 3, 4, 5, 6, 8, 9]))
    with pytest.raises(InputError, match=r"1 pairs have one response \(first: pair 1 of prompt p1\)"):
        split_pairs(responses, beta=0.5)
