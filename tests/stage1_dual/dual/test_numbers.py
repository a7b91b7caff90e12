"""Answers that were written down: what re-arranging the code must not move.

The last digits of a multiplier depend on the machine: exponentials and sums differ by rounding between processors and
libraries, and the solver ends anywhere below a KKT residual of 1e-10. Where these were computed (x86-64
with AVX-512, NumPy 2.3) the equality is exact, but for the order of prompts on disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

import stage1_dual.dual.on_disk
from stage1_dual.dual import DualProblem, UngroupedScores, group_on_disk, solve_dual


def _dense(n_constraints: int, beta: float) -> DualProblem:
    r_pk, g_pkm = draw_scores(n_prompts=120, n_responses=24, n_constraints=n_constraints, seed=n_constraints)
    thresholds_m = g_pkm.mean(axis=(0, 1)) + np.array([0.3, 0.1, -0.5])[:n_constraints]
    return DualProblem.from_arrays(r_pk, g_pkm, thresholds=thresholds_m, beta=beta)


def _large() -> DualProblem:
    """Enough to start from a share of the prompts."""
    r_pk, g_pkm = draw_scores(n_prompts=2_400, n_responses=128, n_constraints=3, seed=9)
    return DualProblem.from_arrays(r_pk, g_pkm, thresholds=g_pkm.mean(axis=(0, 1)) + 0.4, beta=1.0)


def _ragged_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two thirds of the responses, in any order, with offsets; the second score is one that must stay low."""
    r_pk, g_pkm = draw_scores(n_prompts=200, n_responses=30, n_constraints=2, seed=5)
    rng = np.random.default_rng(5)
    ids = np.repeat(rng.integers(2**63, size=200, dtype=np.uint64), 30)
    keep = rng.permutation(6_000)[:4_000]
    return ids[keep], 1e3 + r_pk.reshape(-1)[keep], (g_pkm.reshape(-1, 2)[keep] - 50) * np.array([1.0, -1.0])


def _ragged() -> DualProblem:
    """A margin from above on the second: its sign is turned, as a command does it."""
    ids, reward, scores = _ragged_rows()
    signs = np.array([1.0, -1.0])
    problem = DualProblem.from_rows(ids, reward, scores * signs, thresholds=[0.0, 0.0], beta=0.6)
    return problem.with_thresholds(problem.reference_means_m + np.array([0.25, 0.2]))


BUILD = {
    "one constraint": lambda: _dense(1, 1.0),
    "two": lambda: _dense(2, 0.4),
    "small beta": lambda: _dense(3, 0.03),
    "large": _large,
    "ragged": _ragged,
}

MULTIPLIERS = {
    "one constraint": [0.8073787538279993],
    "two": [0.5211808951324557, 0.4043062690397011],
    "small beta": [0.30753993354847814, 0.3107190854649805, 0.04182051952007401],
    "large": [0.6700345774537844, 0.6738378495348881, 0.6749761884743907],
    "ragged": [0.47268137931303617, 0.4664976411765554],
}


@pytest.mark.parametrize("name", BUILD)
def test_multipliers_are_what_they_were(name: str) -> None:
    np.testing.assert_allclose(solve_dual(BUILD[name]()).multipliers, MULTIPLIERS[name], rtol=1e-9)


def test_multipliers_from_disk_are_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1_dual.dual.on_disk, "_FILE_ROWS", 900)
    ids, reward, scores = _ragged_rows()
    chunks = [
        UngroupedScores(ids[first : first + 700], reward[first : first + 700], scores[first : first + 700] * [1, -1])
        for first in range(0, len(ids), 700)
    ]
    grouped = group_on_disk(chunks, folder=tmp_path, n_rows=len(ids), n_constraints=2)
    assert grouped is not None
    assert len(grouped.scores.partitions) == 5
    problem = DualProblem.from_samples(grouped.scores, thresholds=_ragged().thresholds_m, beta=0.6)
    np.testing.assert_allclose(solve_dual(problem).multipliers, MULTIPLIERS["ragged"], rtol=1e-9)
