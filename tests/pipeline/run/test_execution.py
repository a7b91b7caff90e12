"""Which pool of workers a recipe asks for, and on which devices: the machine's accelerators are stood in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.written_runs import written_run

from pipeline.config.loading import load_config
from pipeline.run import execution
from pipeline.run.execution import build_execution, local_device, worker_device
from pipeline.run.run import Run
from stage1_dual.work import InProcess


def _run(tmp_path: Path, **settings: Any) -> Run:
    config = load_config(Path("embedded"), {name.replace("__", "."): str(value) for name, value in settings.items()})
    return written_run(tmp_path, config)


@pytest.fixture(params=["cuda", "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(execution, "local_device", lambda: request.param)
    return str(request.param)


def test_without_a_word_work_is_done_in_this_process_on_its_device(tmp_path, device):
    run = _run(tmp_path)
    assert isinstance(build_execution(run), InProcess)
    assert worker_device(run) == device


def test_the_device_of_this_process_is_what_torch_sees():
    import torch

    assert local_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_actors_are_those_of_the_recipe(tmp_path):
    pytest.importorskip("ray")
    run = _run(
        tmp_path,
        execution__kind="ray",
        execution__address="auto",
        execution__min_actors=2,
        execution__max_actors=3,
        execution__gpus_per_actor=0.5,
        execution__cpus_per_actor=4,
    )
    pool = build_execution(run)
    found = (pool.address, pool.min_actors, pool.max_actors, pool.gpus_per_actor, pool.cpus_per_actor)
    assert found == ("auto", 2, 3, 0.5, 4.0)
    assert worker_device(run) == "cuda"


@pytest.mark.parametrize("per_model", [1, 2])
def test_an_actor_has_the_accelerators_that_one_model_needs_where_there_are_any(tmp_path, device, per_model):
    pytest.importorskip("ray")
    run = _run(tmp_path, execution__kind="ray", sampling__tensor_parallel_size=per_model)
    assert build_execution(run).gpus_per_actor == (per_model if device == "cuda" else 0)
    assert worker_device(run) == device


@pytest.mark.parametrize(
    ("settings", "cpus"),
    [
        ({}, 6),
        ({"execution__max_actors": 4}, 1),
        ({"execution__max_actors": 8}, 1),
        ({"execution__gpus_per_actor": 1}, 1),
        ({"execution__address": "auto"}, 1),
    ],
)
def test_actors_of_a_cluster_on_this_machine_share_its_cores(tmp_path, monkeypatch, settings, cpus):
    pytest.importorskip("ray")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    run = _run(tmp_path, execution__kind="ray", **{"execution__gpus_per_actor": 0, **settings})
    assert build_execution(run).cpus_per_actor == cpus


def test_no_accelerator_asked_for_is_none_used(tmp_path, device):
    run = _run(tmp_path, execution__kind="ray", execution__gpus_per_actor=0)
    assert worker_device(run) == "cpu"
