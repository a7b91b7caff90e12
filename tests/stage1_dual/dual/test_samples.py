"""Facts about the scores that are found while they are centred."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

import stage1_dual.dual.blocks
import stage1_dual.dual.samples
from pipeline.contracts.arrays import FloatArray
from stage1_dual.dual.blocks import SampleBlock
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


def test_every_deals_the_responses_out_and_keeps_short_prompts_whole() -> None:
    counts_p = np.array([5, 1, 4])
    reward_n = np.arange(10.0)
    scores = SampleScores.in_memory(reward_n, reward_n[:, np.newaxis], counts_p)
    kept = [[0, 2, 4, 5, 6, 8], [1, 3, 5, 7, 9]]
    for offset, rows in enumerate(kept):
        part = scores.every(2, offset)
        (block,) = part.partitions[0].blocks()
        shift_n = np.repeat(block.reward_shift_p, block.segments.counts_p)
        np.testing.assert_allclose(block.reward_n + shift_n, reward_n[rows], atol=1e-14)
        np.testing.assert_array_equal(part.counts_p, np.bincount(np.repeat([0, 1, 2], counts_p)[rows]))


def test_a_sketch_is_the_first_prompts_where_they_are_few_of_all() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=40, n_responses=6, n_constraints=1, seed=8)
    scores = _scores(r_pk, g_pkm)
    assert scores.sketch(11) is None
    sketch = scores.sketch(10)
    assert sketch is not None
    assert (sketch.facts.n_prompts, sketch.facts.n_samples) == (10, 60)
    assert sketch.facts.reference_reward == pytest.approx(r_pk[:10].mean(), rel=1e-12)


def test_reference_means_by_prompt() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=6, n_constraints=2, seed=9)
    scores = _scores(r_pk, g_pkm)
    np.testing.assert_allclose(scores.reference_means_mp(), g_pkm.mean(axis=1).T, atol=1e-14)


def test_printing_scores_shows_sizes_and_passes_over_nothing() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=1_200, n_responses=2, n_constraints=3, seed=0)
    scores = _scores(r_pk, g_pkm)
    assert repr(scores) == "SampleScores(1,200 prompts, 3 constraints, 1 parts)"
    assert "facts" not in vars(scores)


def test_derived_scores_are_those_of_scores_built_that_way() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=8, n_constraints=2, seed=4)
    g_pkm += 1e6
    squared = _scores(r_pk, g_pkm).derive(_squared)
    expected = _scores(r_pk, np.stack([g_pkm[..., 0], (g_pkm[..., 1] - 1e6) ** 2], axis=-1))
    np.testing.assert_allclose(squared.facts.reference_means_m, expected.facts.reference_means_m, rtol=1e-9)
    np.testing.assert_allclose(squared.facts.score_scale_m, expected.facts.score_scale_m, rtol=1e-9)
    np.testing.assert_allclose(squared.facts.correlation_ii, expected.facts.correlation_ii, atol=1e-9)
    # What was not derived is what it was, to the last bit.
    (before,), (after,) = ([*scores.map(_values)] for scores in (_scores(r_pk, g_pkm), squared))
    np.testing.assert_array_equal(after[:2], before[:2])


def _values(block: SampleBlock) -> FloatArray:
    return block.values_in


def _squared(block: SampleBlock) -> SampleBlock:
    raw_n = block.scores_mn[1] + np.repeat(block.score_shift_mp[1], block.segments.counts_p)
    return block.with_scores(1, (raw_n - 1e6) ** 2)
