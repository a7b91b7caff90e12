from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

import stage1_dual.dual.on_disk
from stage1_dual.dual import (
    DualProblem,
    InputError,
    UngroupedScores,
    bootstrap_intervals,
    climb_ladder,
    group_on_disk,
    solve_dual,
)


@pytest.fixture
def small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1_dual.dual.on_disk, "_FILE_ROWS", 700)


def _rows(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ragged rows in random order, with offsets, ids near the largest there are."""
    r_pk, g_pkm = draw_scores(n_prompts=300, n_responses=12, n_constraints=2, seed=seed)
    rng = np.random.default_rng(seed)
    ids = np.repeat(rng.integers(2**64, size=300, dtype=np.uint64), 12)
    keep = rng.permutation(ids.size)[:3_000]
    return ids[keep], 1e3 + r_pk.reshape(-1)[keep], g_pkm.reshape(-1, 2)[keep] - 50


def _chunks(ids: np.ndarray, reward: np.ndarray, scores: np.ndarray, size: int) -> Iterator[UngroupedScores]:
    for first in range(0, len(ids), size):
        chunk = slice(first, first + size)
        yield UngroupedScores(ids[chunk], reward[chunk], scores[chunk])


@pytest.mark.usefixtures("small_partitions")
@pytest.mark.parametrize("chunk", [10_000, 333])
def test_same_answers_as_in_memory(tmp_path: Path, chunk: int) -> None:
    ids, reward, scores = _rows(seed=0)
    b_m = scores.mean(axis=0) + 0.3
    memory = DualProblem.from_rows(ids, reward, scores, thresholds=b_m, beta=0.7)
    samples = group_on_disk(_chunks(ids, reward, scores, chunk), folder=tmp_path, n_rows=3_000, n_constraints=2)
    assert samples is not None
    assert len(samples.scores.partitions) == 5
    disk = DualProblem.from_samples(samples.scores, thresholds=b_m, beta=0.7)
    assert (disk.n_prompts, disk.n_samples) == (memory.n_prompts, memory.n_samples)
    np.testing.assert_allclose(disk.score_scale_m, memory.score_scale_m, rtol=1e-12)
    expected, found = solve_dual(memory), solve_dual(disk)
    np.testing.assert_allclose(found.multipliers, expected.multipliers, atol=1e-10)
    assert found.dual_value == pytest.approx(expected.dual_value, abs=1e-10)
    assert found.kkt_residual <= 1e-8
    # The order of prompts differs, so the bootstrap draws differ; the statistics agree within their own noise.
    intervals = bootstrap_intervals(disk, found, rng=np.random.default_rng(0)).multipliers
    reference = bootstrap_intervals(memory, expected, rng=np.random.default_rng(0)).multipliers
    np.testing.assert_allclose(np.diff(intervals), np.diff(reference), rtol=0.2)
    rungs, others = (climb_ladder(p, s).rungs for p, s in ((disk, found), (memory, expected)))
    assert [rung.n_responses for rung in rungs] == [rung.n_responses for rung in others]
    # What is dealt into which half depends on the order of rows, which the grouping keeps within a prompt.
    np.testing.assert_allclose(rungs[1].multipliers_m, others[1].multipliers_m, atol=1e-10)


@pytest.mark.usefixtures("small_partitions")
def test_a_partition_that_was_cut_off_is_named(tmp_path: Path) -> None:
    ids, reward, scores = _rows(seed=1)
    samples = group_on_disk(_chunks(ids, reward, scores, 500), folder=tmp_path, n_rows=3_000, n_constraints=2)
    assert samples is not None
    victim = sorted(tmp_path.iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:-8])
    with pytest.raises(InputError, match=victim.name):
        DualProblem.from_samples(samples.scores, thresholds=[0.0, 0.0], beta=1.0)


def test_no_rows(tmp_path: Path) -> None:
    assert group_on_disk(iter([]), folder=tmp_path, n_rows=0, n_constraints=1) is None


def test_weights_need_rows_in_memory(tmp_path: Path) -> None:
    ids, reward, scores = _rows(seed=2)
    samples = group_on_disk(_chunks(ids, reward, scores, 500), folder=tmp_path, n_rows=3_000, n_constraints=2)
    assert samples is not None
    problem = DualProblem.from_samples(samples.scores, thresholds=[-60.0, -60.0], beta=1.0)
    with pytest.raises(InputError, match="from_rows"):
        problem.tilted_weights([0.0, 0.0])
