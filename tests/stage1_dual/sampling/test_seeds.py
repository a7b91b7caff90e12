from __future__ import annotations

import pytest

from stage1_dual.sampling.seeds import sample_seed


def test_seeds_are_those_of_earlier_releases() -> None:
    # A changed derivation would make a continued run repeat or contradict what it holds.
    assert sample_seed(0, "a", 0) == 6290419666286053935


def test_no_two_samples_share_a_seed() -> None:
    seeds = {
        sample_seed(run_seed, prompt_id, k)
        for run_seed in (0, 1, 12)
        for prompt_id in ("a", "b", "1", "2a")
        for k in range(500)
    }
    assert len(seeds) == 3 * 4 * 500


@pytest.mark.parametrize("run_seed", [0, -1, 2**70])
def test_seeds_fit_a_signed_integer_and_are_never_zero(run_seed: int) -> None:
    seeds = [sample_seed(run_seed, "prompt", k) for k in range(2000)]
    assert min(seeds) >= 1
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62  # the upper half is used too
