"""Facts about the scores that are found while they are centred."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

import stage1_dual.dual.blocks
import stage1_dual.dual.samples
from pipeline.contracts.arrays import FloatArray
from stage1_dual.dual import InputError
from stage1_dual.dual.samples import SampleScores


def _scores(r_pk: FloatArray, g_pkm: FloatArray) -> SampleScores:
    n_prompts, n_responses, n_constraints = g_pkm.shape
    return SampleScores.in_memory(
        r_pk.reshape(-1), g_pkm.reshape(-1, n_constraints), np.full(n_prompts, n_responses, dtype=np.int64)
    )


def _correlation(values_ipk: FloatArray) -> FloatArray:
    centred_ipk = values_ipk - values_ipk.mean(axis=2, keepdims=True)
    covariance_ii = np.einsum("ipk,jpk->ij", centred_ipk, centred_ipk)
    spread_i = np.sqrt(np.diag(covariance_ii))
    return np.asarray(covariance_ii / np.outer(spread_i, spread_i))


@pytest.mark.parametrize("n_prompts", [7, 900])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("offset", [0.0, 1e6, 1e13])
def test_correlation_is_within_prompts_whatever_the_units(
    n_prompts: int, scale: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several partitions, each of several tiles.
    monkeypatch.setattr(stage1_dual.dual.samples, "PARTITION_ROWS", 20_000)
    monkeypatch.setattr(stage1_dual.dual.blocks, "TILE_ROWS", 6_000)
    r_pk, g_pkm = draw_scores(n_prompts=n_prompts, n_responses=60, n_constraints=2, seed=1)
    # A power of two, and numbers that the offset has rounded: what follows is exact.
    scale = 2.0 ** round(np.log2(scale))
    g_pkm = (g_pkm + offset) - offset
    facts = _scores(r_pk, scale * (g_pkm + offset)).facts
    expected_ii = _correlation(np.stack([r_pk, g_pkm[..., 0], g_pkm[..., 1]]))
    np.testing.assert_allclose(facts.correlation_ii, expected_ii, atol=1e-9)
    within_m = np.sqrt(np.mean(np.var(g_pkm, axis=1), axis=0))
    np.testing.assert_allclose(facts.score_scale_m, scale * within_m, rtol=1e-9)


def test_units_may_differ_between_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1_dual.dual.blocks, "TILE_ROWS", 100)
    r_pk, g_pkm = draw_scores(n_prompts=3, n_responses=100, n_constraints=1, seed=2)
    # No response of the first prompt differs, those of the second hardly, and only the third counts.
    g_pkm[0] = 3.0
    g_pkm[1] *= 1e-160
    facts = _scores(r_pk, g_pkm).facts
    assert not facts.is_constant_m.any()
    assert facts.score_scale_m[0] == pytest.approx(np.sqrt(np.var(g_pkm[2]) / 3), rel=1e-12)
    g_pkm[2] = -7.0
    facts = _scores(r_pk, g_pkm).facts
    assert facts.score_scale_m[0] == pytest.approx(np.std(g_pkm[1] * 1e160) * 1e-160 / np.sqrt(3), rel=1e-12)


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
