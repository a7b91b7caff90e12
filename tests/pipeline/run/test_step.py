"""How steps begin, stand and end, without any model."""

import time
from pathlib import Path

import pytest

from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import is_complete, read_manifest
from pipeline.contracts.errors import MissingExtraError, StaleArtifactError, require_extra
from pipeline.run.run import Run
from pipeline.run.step import derived_step_is_current, finish_step


@pytest.fixture
def run(tmp_path):
    return Run(config=load_config(Path("embedded")), name="r", data_dir=tmp_path)


def finish(run, folder, settings, inputs):
    finish_step(run.name, folder, "solve", settings=settings, inputs=inputs, files={}, started=time.monotonic())


def test_a_derived_step_stands_while_its_inputs_stand(run):
    folder = run.folder / "dual"
    assert not derived_step_is_current(folder, step="solve", settings={"beta": 1.0}, inputs={"samples": "a"})
    finish(run, folder, {"beta": 1.0}, {"samples": "a"})
    assert derived_step_is_current(folder, step="solve", settings={"beta": 1.0}, inputs={"samples": "a"})
    (folder / "data").mkdir()
    (folder / "data" / "train-00000-of-00001.parquet").write_text("old")
    assert not derived_step_is_current(folder, step="solve", settings={"beta": 1.0}, inputs={"samples": "b"})
    assert not is_complete(folder)
    assert not (folder / "data").exists()


def test_a_derived_step_with_other_settings_is_refused_and_kept(run):
    folder = run.folder / "dual"
    derived_step_is_current(folder, step="solve", settings={"beta": 1.0}, inputs={})
    finish(run, folder, {"beta": 1.0}, {})
    with pytest.raises(StaleArtifactError, match=r"beta: 1\.0 then, 2\.0 now\n.*--redo"):
        derived_step_is_current(folder, step="solve", settings={"beta": 2.0}, inputs={})
    assert read_manifest(folder).settings == {"beta": 1.0}


def test_a_missing_package_names_its_extra():
    require_extra("sample", "numpy", purpose="sampling")
    with pytest.raises(MissingExtraError, match=r"sampling needs the package `no_such_pkg`.*dualign\[sample\]"):
        require_extra("sample", "numpy", "no_such_pkg", purpose="sampling")


def test_parquet_metadata_names_run_and_configuration(run):
    metadata = run.table_metadata()
    assert metadata["run"] == "r"
    assert len(metadata["config_sha256"]) == 64
    assert "pyarrow" in metadata
