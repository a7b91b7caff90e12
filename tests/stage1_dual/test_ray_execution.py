"""A real local cluster: the same answer as the threads of this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from helpers.dual_problems import draw_scores

import stage1_dual.dual.on_disk
import stage1_dual.dual.samples
from stage1_dual.dual import (
    DualProblem,
    InputError,
    UngroupedScores,
    climb_ladder,
    group_in_memory,
    group_on_disk,
    solve_dual,
)
from stage1_dual.ray_execution import RayExecutor

pytestmark = pytest.mark.slow


def _unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer_is_named_at_once(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{_unused_port()}"
    with pytest.raises(InputError) as caught:
        RayExecutor.connect(address)
    # Not from Ray, whose own attempts take 30 and 120 seconds.
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert str(caught.value).startswith(f"no Ray cluster answers at {address!r} (")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield RayExecutor.connect("local")
    ray.shutdown()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_same_multipliers_on_a_cluster(
    executor: RayExecutor, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage1_dual.dual.on_disk, "_FILE_ROWS", 20_000)
    monkeypatch.setattr(stage1_dual.dual.samples, "PARTITION_ROWS", 20_000)
    r_pk, g_pkm = draw_scores(n_prompts=1_000, n_responses=64, n_constraints=2, seed=0)
    rows = UngroupedScores(np.repeat(np.arange(1_000, dtype=np.uint64), 64), r_pk.reshape(-1), g_pkm.reshape(-1, 2))
    if where == "memory":
        grouped = group_in_memory(rows)
    else:
        found = group_on_disk(iter([rows]), folder=tmp_path, n_rows=64_000, n_constraints=2)
        assert found is not None
        grouped = found
    assert len(grouped.scores.partitions) > 2
    b_m = g_pkm.mean(axis=(0, 1)) + 0.3
    here = DualProblem.from_samples(grouped.scores, thresholds=b_m, beta=1.0)
    there = DualProblem.from_samples(replace(grouped.scores, executor=executor), thresholds=b_m, beta=1.0)
    expected, solution = solve_dual(here), solve_dual(there)
    np.testing.assert_allclose(solution.multipliers, expected.multipliers, atol=1e-10)
    assert solution.dual_value == pytest.approx(expected.dual_value, abs=1e-10)
    rungs, others = climb_ladder(here, expected).rungs, climb_ladder(there, solution).rungs
    np.testing.assert_allclose(others[2].multipliers_m, rungs[2].multipliers_m, atol=1e-10)
