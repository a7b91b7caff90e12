from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.tiny_models import save_tiny_policy

from pipeline.contracts.artifacts import file_sha256, read_manifest, write_json, write_manifest
from pipeline.contracts.errors import CorruptArtifactError, InputError, StaleArtifactError
from stage2_policy.data import (
    StepSampler,
    TrainingData,
    TrainingResponses,
    choose_held_out,
    read_training_data,
    skip_negligible,
    split_pairs,
)

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

    keys = {key for part in (data.train, data.held_out) for key in part.row_keys()}
    assert keys == {(row["prompt_id"], row["sample_index"]) for row in without}
    tokens = {(row["prompt_id"], row["sample_index"]): row["completion_token_ids"] for row in rows}
    for part in (data.train, data.held_out):
        for key, (_, done) in zip(part.row_keys(), part.sequences, strict=True):
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


@pytest.mark.parametrize("n_prompts", [2, 3, 10, 320])
def test_held_out_is_never_empty_and_never_all(n_prompts: int) -> None:
    held_out = choose_held_out([f"p{place}" for place in range(n_prompts)], fraction=0.1)

    assert 1 <= len(held_out) < n_prompts
    assert held_out == sorted(set(held_out))


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

    with pytest.raises(CorruptArtifactError, match=r"dual\.json is not the file its manifest records"):
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


def responses_of(counts: Sequence[int], *, seed: int = 0) -> TrainingResponses:
    rng = np.random.default_rng(seed)
    n = sum(counts)
    prompt_p = np.repeat(np.arange(len(counts)), counts)
    weight = np.concatenate([rng.dirichlet(np.ones(count)) for count in counts])
    return TrainingResponses(
        prompt_ids=tuple(f"p{place}" for place in range(len(counts))),
        prompt_p=prompt_p,
        sample_index=np.concatenate([np.arange(count) for count in counts]),
        sequences=[
            (np.zeros(5, dtype=np.int32), np.zeros(size, dtype=np.int32)) for size in rng.integers(1, 30, size=n)
        ],
        weight=weight,
        tilt=np.log(weight),
        sampler_logp=np.zeros(n),
    )


SAMPLERS = [
    {"tokens_per_step": 400, "tokens_per_microbatch": 150, "responses_per_group": 4},
    {"tokens_per_step": 60, "tokens_per_microbatch": 1000, "responses_per_group": 1},
    {"tokens_per_step": 1, "tokens_per_microbatch": 1, "responses_per_group": 8},
    {"tokens_per_step": 10**9, "tokens_per_microbatch": 300, "responses_per_group": 64},
]


@pytest.mark.parametrize("sizes", SAMPLERS)
def test_every_response_is_read_once_an_epoch(sizes: dict[str, int]) -> None:
    sampler = StepSampler(responses_of((3, 17, 8, 1, 40)), **sizes, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.n_steps * sampler.microbatches_per_step
        assert all(batches)
        assert sorted(row for batch in batches for row, _ in batch) == list(range(69))


@pytest.mark.parametrize("sizes", SAMPLERS)
def test_groups_are_whole_of_one_prompt_and_about_as_large_as_asked(sizes: dict[str, int]) -> None:
    responses = responses_of((3, 17, 8, 1, 40))
    sampler = StepSampler(responses, **sizes, seed=0)
    counts = np.bincount(responses.prompt_p)
    found: list[tuple[int, int]] = []
    for batch in sampler:
        groups = [group for _, group in batch]
        assert sorted(set(groups)) == list(range(max(groups) + 1))
        for place in set(groups):
            prompts = {responses.prompt_p[row] for row, group in batch if group == place}
            assert len(prompts) == 1
            found.append((prompts.pop(), groups.count(place)))
    for prompt, count in enumerate(counts):
        dealt = sorted(size for owner, size in found if owner == prompt)
        assert len(dealt) == max(1, round(count / sizes["responses_per_group"]))
        assert dealt[-1] - dealt[0] <= 1


def test_how_a_step_is_cut_does_not_change_what_it_reads() -> None:
    def steps(tokens_per_microbatch: int) -> list[set[frozenset[int]]]:
        sampler = StepSampler(
            responses_of((30, 40)),
            tokens_per_step=400,
            tokens_per_microbatch=tokens_per_microbatch,
            responses_per_group=4,
            seed=0,
        )
        batches = list(sampler)
        size = sampler.microbatches_per_step
        return [
            {
                frozenset(row for row, group in batch if group == place)
                for batch in batches[start : start + size]
                for place in {group for _, group in batch}
            }
            for start in range(0, len(batches), size)
        ]

    assert steps(10_000) == steps(150)


@pytest.mark.parametrize("settings", SAMPLERS[:1])
@pytest.mark.parametrize("n_processes", [2, 3])
def test_processes_share_the_steps_of_one(settings: dict[str, int], n_processes: int) -> None:
    responses = responses_of((30, 8, 61, 4, 17, 40))

    def steps(**processes: int) -> list[list[tuple[int, ...]]]:
        sampler = StepSampler(responses, **settings, seed=0, **processes)
        batches = [tuple(sorted(row for row, _ in batch)) for batch in sampler]
        size = len(batches) // sampler.n_steps
        assert len(batches) == len(sampler) == size * sampler.n_steps
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    alone = steps()
    shares = [steps(process=process, n_processes=n_processes) for process in range(n_processes)]
    for step, *parts in zip(alone, *shares, strict=True):
        assert sorted(row for batch in step for row in batch) == sorted(
            row for part in parts for batch in part for row in batch
        )
        assert len({len(part) for part in parts}) == 1


def test_more_processes_than_groups_of_a_step_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 groups of responses for 2 processes; .* raise `tokens_per_step`"):
        StepSampler(responses_of((30, 40)), **SAMPLERS[2], seed=0, process=0, n_processes=2)


@pytest.mark.parametrize("mass", [0.0, 0.01, 0.2, 0.9])
def test_no_prompt_loses_more_than_the_negligible_mass(mass: float) -> None:
    responses = responses_of((30, 8, 61, 1))
    kept, skipped = skip_negligible(responses, mass=mass)
    rows = dict(zip(responses.row_keys(), responses.weight, strict=True))
    lost = dict.fromkeys(responses.prompt_ids, 1.0)
    least = dict.fromkeys(responses.prompt_ids, 2.0)
    for key in kept.row_keys():
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


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[list[tuple[int, int]]]:
        sampler = StepSampler(responses_of((30, 40)), **SAMPLERS[0], seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_any_step_is_an_unbiased_estimate_with_prompts_counting_the_same() -> None:
    # The weighted sum of any row value over the first step, scaled as the trainer does, has the mean over prompts as
    # its expectation, for prompts of 2 and of 60 responses.
    responses = responses_of((2, 60, 7, 11))
    value = np.random.default_rng(7).normal(size=80)
    exact = float(np.bincount(responses.prompt_p, weights=responses.weight * value).mean())
    sampler = StepSampler(responses, tokens_per_step=300, tokens_per_microbatch=120, responses_per_group=4, seed=0)
    assert sampler.n_steps > 3
    estimates = []
    for epoch in range(1500):
        sampler.set_epoch(epoch)
        first = [
            row for _, batch in zip(range(sampler.microbatches_per_step), sampler, strict=False) for row, _ in batch
        ]
        estimates.append(
            float(np.sum((responses.weight * value)[first])) * sampler.n_steps / len(responses.prompt_ids)
        )

    z = (np.mean(estimates) - exact) / (np.std(estimates) / len(estimates) ** 0.5)
    assert abs(z) < 4


def test_microbatches_are_near_their_budget_and_sorted_by_length() -> None:
    responses = responses_of((200, 200))
    length = np.array([len(prompt) + len(done) for prompt, done in responses.sequences])
    sampler = StepSampler(responses, tokens_per_step=2000, tokens_per_microbatch=500, responses_per_group=2, seed=0)
    padded = [len(batch) * max(length[row] for row, _ in batch) for batch in sampler]

    assert max(padded) < 1.5 * 500
    assert length.sum() / sum(padded) > 0.7


@pytest.mark.parametrize("responses_per_group", [2, 3, 8, 64])
def test_of_pairs_a_group_is_a_pair_whatever_is_asked_for(responses_per_group: int) -> None:
    pairs = split_pairs(responses_of((6, 2, 40)), beta=0.5)
    assert pairs.prompt_ids == ("p0",) * 3 + ("p1",) + ("p2",) * 20
    sampler = StepSampler(
        pairs, tokens_per_step=300, tokens_per_microbatch=120, responses_per_group=responses_per_group, seed=0
    )
    groups = [
        sorted(row for row, group in batch if group == place)
        for batch in sampler
        for place in {group for _, group in batch}
    ]
    assert sorted(groups) == [[row, row + 1] for row in range(0, 48, 2)]
    np.testing.assert_array_equal(pairs.n_samples, 2)


def test_weights_of_pairs_are_the_tilt_within_each() -> None:
    responses = responses_of((4, 2))
    pairs = split_pairs(responses, beta=0.5)
    odds = np.exp(responses.tilt / 0.5).reshape(-1, 2)
    np.testing.assert_allclose(pairs.weight, (odds / odds.sum(axis=1, keepdims=True)).ravel())


def test_a_response_without_its_partner_is_named() -> None:
    responses = responses_of((4, 6)).select_rows(np.array([0, 1, 2, 3, 4, 5, 6, 8, 9]))
    with pytest.raises(InputError, match=r"1 pairs have one response \(first: pair 1 of prompt p1\)"):
        split_pairs(responses, beta=0.5)
