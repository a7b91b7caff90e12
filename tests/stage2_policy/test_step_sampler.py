from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers.training_responses import responses_of

from pipeline.contracts.errors import InputError
from stage2_policy.data import TrainingResponses, split_pairs
from stage2_policy.step_sampler import StepSampler, count_all_steps, count_groups, count_steps

SAMPLERS = [
    {"tokens_per_step": 400, "tokens_per_microbatch": 150, "responses_per_group": 4},
    {"tokens_per_step": 60, "tokens_per_microbatch": 1000, "responses_per_group": 1},
    {"tokens_per_step": 1, "tokens_per_microbatch": 1, "responses_per_group": 8},
    {"tokens_per_step": 10**9, "tokens_per_microbatch": 300, "responses_per_group": 64},
]


def sampler_of(responses: TrainingResponses, **settings: Any) -> StepSampler:
    return StepSampler(responses.lengths, responses.prompt_p, **settings)


@pytest.mark.parametrize("sizes", SAMPLERS)
def test_every_response_is_read_once_an_epoch(sizes: dict[str, int]) -> None:
    sampler = sampler_of(responses_of((3, 17, 8, 1, 40)), **sizes, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.n_steps * sampler.microbatches_per_step
        assert all(batches)
        assert sorted(row for batch in batches for row, _ in batch) == list(range(69))


@pytest.mark.parametrize("sizes", SAMPLERS)
def test_groups_are_whole_of_one_prompt_and_about_as_large_as_asked(sizes: dict[str, int]) -> None:
    responses = responses_of((3, 17, 8, 1, 40))
    sampler = sampler_of(responses, **sizes, seed=0)
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


def deal_slowly(responses: TrainingResponses, sampler: StepSampler, *, responses_per_group: int, epoch: int) -> Any:
    """The order of the first versions, a list of groups at a time: runs that were begun then go on in it."""
    length, prompt_p = responses.lengths, responses.prompt_p
    rng = np.random.default_rng([0, epoch])
    groups = [
        group
        for rows in np.split(np.arange(len(length)), np.flatnonzero(np.diff(prompt_p)) + 1)
        for group in np.array_split(rng.permutation(rows), max(1, round(len(rows) / responses_per_group)))
    ]
    steps = np.array_split(rng.permutation(len(groups)), sampler.n_steps)
    size = sampler.microbatches_per_step
    for place in rng.permutation(sampler.n_steps):
        own = sorted((groups[group] for group in steps[place]), key=lambda rows: int(length[rows].max()))
        tokens = np.cumsum([length[rows].sum() for rows in own])
        cuts = np.clip(
            np.searchsorted(tokens, np.arange(1, size) / size * tokens[-1]),
            np.arange(1, size),
            len(own) - np.arange(size - 1, 0, -1),
        )
        for part in np.split(np.arange(len(own)), cuts):
            yield [(int(row), number) for number, group in enumerate(part) for row in own[group]]


@pytest.mark.parametrize("sizes", SAMPLERS)
def test_the_order_of_a_seed_is_what_it_was(sizes: dict[str, int]) -> None:
    responses = responses_of((3, 17, 8, 1, 40, 12))
    sampler = sampler_of(responses, **sizes, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        slow = deal_slowly(responses, sampler, responses_per_group=sizes["responses_per_group"], epoch=epoch)
        assert list(sampler) == list(slow)


def test_how_a_step_is_cut_does_not_change_what_it_reads() -> None:
    def steps(tokens_per_microbatch: int) -> list[set[frozenset[int]]]:
        sampler = sampler_of(
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
        sampler = sampler_of(responses, **settings, seed=0, **processes)
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
        sampler_of(responses_of((30, 40)), **SAMPLERS[2], seed=0, process=0, n_processes=2)


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[list[tuple[int, int]]]:
        sampler = sampler_of(responses_of((30, 40)), **SAMPLERS[0], seed=seed)
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
    sampler = sampler_of(responses, tokens_per_step=300, tokens_per_microbatch=120, responses_per_group=4, seed=0)
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
    sampler = sampler_of(responses, tokens_per_step=2000, tokens_per_microbatch=500, responses_per_group=2, seed=0)
    padded = [len(batch) * max(length[row] for row, _ in batch) for batch in sampler]

    assert max(padded) < 1.5 * 500
    assert length.sum() / sum(padded) > 0.7


@pytest.mark.parametrize("responses_per_group", [2, 3, 8, 64])
def test_of_pairs_a_group_is_a_pair_whatever_is_asked_for(responses_per_group: int) -> None:
    pairs = split_pairs(responses_of((6, 2, 40)), beta=0.5)
    assert pairs.prompt_ids == ("p0",) * 3 + ("p1",) + ("p2",) * 20
    sampler = sampler_of(
        pairs, tokens_per_step=300, tokens_per_microbatch=120, responses_per_group=responses_per_group, seed=0
    )
    groups = [
        sorted(row for row, group in batch if group == place)
        for batch in sampler
        for place in {group for _, group in batch}
    ]
    assert sorted(groups) == [[row, row + 1] for row in range(0, 48, 2)]
    np.testing.assert_array_equal(pairs.n_samples, 2)


@pytest.mark.parametrize("sizes", SAMPLERS)
def test_steps_are_counted_from_the_totals_as_from_the_rows(sizes: dict[str, int]) -> None:
    responses = responses_of((3, 17, 8, 1, 40))
    groups = [
        count_groups(count, responses_per_group=sizes["responses_per_group"])
        for count in np.bincount(responses.prompt_p)
    ]
    counted = count_steps(responses.lengths.sum(), sum(groups), tokens_per_step=sizes["tokens_per_step"])
    assert sampler_of(responses, **sizes, seed=0).n_steps == counted


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 7), (3.0, 21), (0.5, 4), (1.01, 8)])
def test_a_begun_step_is_taken_whole(epochs: float, steps: int) -> None:
    assert count_all_steps(7, epochs=epochs) == steps


def test_data_and_order_of_training_need_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'accelerate', 'datasets'])); "
        "import stage2_policy.data, stage2_policy.step_sampler"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
