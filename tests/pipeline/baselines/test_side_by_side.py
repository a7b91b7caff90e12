"""Experiments several at a time: the same results, one error, and no process that outlives the one that was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import write_recipe

from pipeline.baselines.command import run_experiments
from pipeline.baselines.side_by_side import count_jobs
from pipeline.baselines.study import Study
from pipeline.config.loading import load_config
from pipeline.contracts.cores import usable_cores
from pipeline.contracts.errors import InputError
from stage1_dual.dual import InfeasibleError

pytestmark = pytest.mark.slow

NAMES = ["sample_sizes", "convergence"]  # both of one run, which the first to come makes


@pytest.fixture
def study(tmp_path: Path) -> Study:
    recipe = write_recipe(tmp_path)
    return Study(
        config=load_config(recipe),
        data_dir=tmp_path / "data",
        name="tiny",
        seeds=(0,),
        margins=(0.005, 0.01),
        pairs=(),
        dpo_epochs=1.0,
        sizes={},
        show_progress=False,
    )


def test_results_are_those_of_one_at_a_time(study: Study, tmp_path: Path) -> None:
    together = run_experiments(study, NAMES, jobs=2)
    alone = run_experiments(replace(study, data_dir=tmp_path / "other"), NAMES, jobs=1)
    assert sorted(result.name for result in together) == sorted(NAMES) == sorted(result.name for result in alone)
    one, other = (
        pq.read_table(folder / "runs" / "tiny" / "results" / "sample_sizes.parquet")
        for folder in (study.data_dir, tmp_path / "other")
    )
    assert one.schema == other.schema
    for name in one.column_names:
        if not pa.types.is_floating(one.schema.field(name).type):
            assert one[name] == other[name]
            continue
        # On one core or on several a score differs in its last bits.
        np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), rtol=1e-3, atol=1e-5, equal_nan=True)


def test_what_stops_one_experiment_is_raised_as_it_is(study: Study) -> None:
    impossible = replace(study, margins=(50.0, 60.0))
    with pytest.raises(InfeasibleError) as raised:
        run_experiments(impossible, ["constraint_satisfaction", "sample_sizes"], jobs=2)
    assert raised.value.certificate.direction.sum() == pytest.approx(1.0)


def test_the_number_of_jobs_is_at_most_that_of_experiments(study: Study) -> None:
    assert count_jobs(None, n_experiments=1) == 1
    assert count_jobs(None, n_experiments=1000) == usable_cores()
    assert count_jobs(3, n_experiments=2) == 2
    with pytest.raises(InputError, match=r"--jobs is 0; it must be at least 1"):
        run_experiments(study, NAMES, jobs=0)
    assert not study.data_dir.exists()


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "dualign", "baselines", "--quick", "--jobs", "2", "--data-dir", tmp_path]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while "==== two_constraints" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2, (tmp_path / "log").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
