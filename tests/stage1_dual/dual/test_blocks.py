"""Centring: what it keeps, what it refuses, and what a block is when it is cut or sent."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from helpers.dual_problems import FloatArray, draw_scores

from stage1_dual.dual import InputError, SampleScores


def _scores(r_pk: FloatArray, g_pkm: FloatArray) -> SampleScores:
    n_prompts, n_responses, n_constraints = g_pkm.shape
    return SampleScores.in_memory(
        r_pk.reshape(-1), g_pkm.reshape(-1, n_constraints), np.full(n_prompts, n_responses, dtype=np.int64)
    )


@pytest.mark.parametrize("value", [0.1, -1e6 / 3, 1e-310])
@pytest.mark.parametrize("n_responses", [1, 3, 100, 127])
def test_equal_scores_centre_to_zero(value: float, n_responses: int) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=5, n_responses=n_responses, n_constraints=1, seed=3)
    g_pkm[:] = value * np.arange(1.0, 6.0)[:, np.newaxis, np.newaxis]
    facts = _scores(r_pk, g_pkm).facts
    assert facts.is_constant_m.all()
    assert facts.score_scale_m[0] == facts.correlation_ii[1, 1] == facts.correlation_ii[0, 1] == 0.0


def test_means_of_huge_scores_may_overflow() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=2, n_responses=3, n_constraints=1, seed=5)
    g_pkm[0, :, 0] = [1e308, 1.1e308, 1.05e308]
    facts = _scores(r_pk, g_pkm).facts
    assert facts.score_scale_m[0] == pytest.approx(np.std([1.0, 1.1, 1.05]) * 1e308 / np.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("largest", [1e308, 1.7e308])
@pytest.mark.parametrize("n_responses", [2, 16])
@pytest.mark.parametrize("is_reward", [False, True])
def test_scores_too_far_apart_are_refused(largest: float, n_responses: int, is_reward: bool) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=4, n_responses=n_responses, n_constraints=1, seed=6)
    changed_pk = r_pk if is_reward else g_pkm[..., 0]
    changed_pk[1, :] = np.where(np.arange(n_responses) % 2 == 0, largest, -largest)
    with pytest.raises(InputError, match="differ by more than float64 can hold"):
        _scores(r_pk, g_pkm)


@pytest.mark.parametrize("value", [1e-300, 1e-310, 0.0])
def test_tiny_scores_raise_nothing(value: float) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=4, n_responses=8, n_constraints=1, seed=7)
    g_pkm[0, 0, 0] = r_pk[1, 0] = value
    g_pkm[2] = value
    with np.errstate(all="raise"):
        assert np.isfinite(_scores(r_pk, g_pkm).facts.correlation_ii).all()
        g_pkm[3] = 10.0 ** (-200.0 * np.abs(g_pkm[3]).clip(max=1.5))
        assert np.isfinite(_scores(r_pk, g_pkm).facts.correlation_ii).all()


def test_a_block_is_sent_without_its_tiles() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=50, n_responses=1_280, n_constraints=1, seed=4)
    (partition,) = _scores(r_pk, g_pkm).partitions
    (block,) = partition.blocks()
    assert len(block.tiles) > 1
    assert block.segments.sum(block.reward_n).shape == (50,)
    sent = pickle.dumps(partition)
    assert len(sent) < 1.01 * block.values_in.nbytes
    (received,) = pickle.loads(sent).blocks()
    np.testing.assert_array_equal(received.tiles[-1][1].values_in, block.tiles[-1][1].values_in)


def test_runs_and_splits_are_views_of_whole_prompts() -> None:
    counts_p = np.array([3, 1, 7, 2, 2])
    reward_n = np.arange(15.0)
    (partition,) = SampleScores.in_memory(reward_n, reward_n[:, np.newaxis], counts_p).partitions
    (block,) = partition.blocks()
    parts = list(block.split(4))
    # A prompt longer than asked for is a block of its own.
    assert [part.segments.counts_p.tolist() for part in parts] == [[3, 1], [7], [2, 2]]
    assert all(np.shares_memory(part.values_in, block.values_in) for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.shift_ip for part in parts], axis=1), block.shift_ip)
    run = block.run(1, 3)
    np.testing.assert_array_equal(run.reward_n + np.repeat(run.reward_shift_p, [1, 7]), np.arange(3.0, 11.0))
    np.testing.assert_allclose(block.reference_means_mp, [[1.0, 3.0, 7.0, 11.5, 13.5]], atol=1e-14)
