from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_runs import write_recipe

from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import environment
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.run.run import Run, require_plain_name


@pytest.mark.parametrize("name", ["mine", "a b", "run-2.1_x+y", "über", "7", "x" * 100])
def test_plain_names(name: str) -> None:
    assert require_plain_name(name, option="--run") == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".hidden", "_a", "a.", "a ", "a\nb", "x" * 101, "a\\b"])
def test_what_is_not_the_name_of_one_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"--run is .*; the name of a run is at most 100"):
        require_plain_name(name, option="--run")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(config=load_config(write_recipe(tmp_path)), name="mine", data_dir=tmp_path / "data")


def test_every_artifact_is_in_the_runs_own_folder(run: Run, tmp_path: Path) -> None:
    assert run.folder == tmp_path / "data" / "runs" / "mine"
    folders = [run.prompts, run.samples, run.scores, run.dual, run.tilted, run.policy, run.evaluation]
    assert len({*folders}) == len(folders)
    assert {folder.parent for folder in folders} == {run.folder}


def test_a_recipe_with_pairs_has_their_set_and_trains_on_it(run: Run, tmp_path: Path) -> None:
    assert run.response_sets() == (run.sampled,) == (run.trained_on,)
    pairs = {"pairs": {"source": str(tmp_path / "pairs.jsonl"), "response_columns": ["first", "second"]}}
    config = load_config(write_recipe(tmp_path, training=pairs))
    sampled, of_data_set = Run(config=config, name="mine", data_dir=tmp_path / "data").response_sets()
    assert (sampled.paired, of_data_set.paired) == (False, True)
    assert of_data_set.root == run.folder / "pairs"
    assert Run(config=config, name="mine", data_dir=tmp_path / "data").trained_on == of_data_set


def test_models_are_whole_paths_and_the_world_is_asked_for_by_name_alone(run: Run, tmp_path: Path) -> None:
    assert run.model(run.config.reference, "reference") == str(tmp_path / "policy")
    assert not run.uses_embedded
    embedded = load_config(Path("embedded"))
    assert Run(config=embedded, name="mine", data_dir=tmp_path / "data").uses_embedded


def test_tables_name_their_run_and_what_made_them(run: Run) -> None:
    metadata = run.table_metadata()
    assert metadata["run"] == "mine"
    assert metadata["numpy"] == environment()["numpy"]
    assert len(metadata["config_sha256"]) == 64


def test_prompts_that_are_not_there(run: Run) -> None:
    with pytest.raises(CorruptArtifactError, match="prompts"):
        run.prompts_table()
