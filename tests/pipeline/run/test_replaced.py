"""What `--redo` replaces stays until its successor is there; a stranger's files stay whatever happens."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

from pipeline.contracts.artifacts import content_sha256, file_sha256, is_complete
from pipeline.contracts.errors import InputError
from pipeline.run.replaced import clear_tables, drop_replaced, put_aside, remove_written

pytestmark = pytest.mark.slow

STEPS = {"prompts", "samples", "scores", "dual", "tilted"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("whole"))
    assert dualign("stage1", recipe) == 0
    return recipe


@pytest.fixture
def recipe(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    copy = tmp_path / "recipe.yaml"
    copy.write_text(whole.read_text())
    return copy


def content(folder: Path) -> str:
    return content_sha256(
        {
            str(path.relative_to(folder)): file_sha256(path)
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }
    )


@pytest.mark.parametrize(
    ("step", "setting", "value"),
    [
        ("sample", "reference.model", "/nowhere"),
        ("score", "scorers.harmless.model", "/nowhere"),
        ("prepare", "prompts.source", "/nowhere.jsonl"),
        ("solve", "beta", "-1"),
        ("solve", "constraints.harmless.margin", "1000"),
    ],
)
def test_what_cannot_be_replaced_is_not_lost(
    step: str, setting: str, value: str, recipe: Path, capsys: object
) -> None:
    folder = run_folder(recipe)
    before = {name: content(folder / name) for name in STEPS}
    assert dualign(step, recipe, "--redo", f"--{setting}", value) in {2, 3}
    kept = {name: folder / name if is_finished(folder / name) else folder / "replaced" / name for name in STEPS}
    assert {name: content(path) for name, path in kept.items()} == before


def is_finished(folder: Path) -> bool:
    return is_complete(folder) or any(folder.glob("*/manifest.json"))


def test_a_successor_takes_the_place_and_later_steps_wait(recipe: Path) -> None:
    folder = run_folder(recipe)
    before = {name: content(folder / name) for name in STEPS}
    assert dualign("score", recipe, "--redo") == 0
    assert not (folder / "replaced" / "scores").exists()
    assert {path.name for path in (folder / "replaced").iterdir()} == {"dual", "tilted"}
    assert content(folder / "replaced" / "dual") == before["dual"]
    assert dualign("stage1", recipe) == 0
    assert not (folder / "replaced").exists()


def test_a_redo_that_is_killed_loses_nothing(recipe: Path) -> None:
    folder = run_folder(recipe)
    before = {name: content(folder / name) for name in ("samples", "scores", "dual", "tilted")}
    kill = (
        "import os, signal, sys\n"
        "import pipeline.steps.runner as runner\n"
        "from dataclasses import replace\n"
        "from pipeline.cli import main\n"
        "def perform(run): os.kill(os.getpid(), signal.SIGKILL)\n"
        "runner.STEPS['sample'] = replace(runner.STEPS['sample'], perform=perform)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["sample", "--redo", "--config", str(recipe), "--run", "tiny", "--no-progress"]
    data = ["--data-dir", str(recipe.parent / "data")]
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", kill, *arguments, *data], cwd=root, capture_output=True, check=False)
    assert done.returncode == -9
    assert {name: content(folder / "replaced" / name) for name in before} == before
    assert dualign("stage1", recipe) == 0
    assert not (folder / "replaced").exists()


def test_a_strangers_files_are_left_and_named(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_folder(recipe)
    (folder / "samples" / "my notes.txt").write_text("mine")
    (folder / "scores" / "harmless" / "plots").mkdir()
    (folder / "scores" / "harmless" / "plots" / "a.ipynb").write_text("mine too")
    logger = logging.getLogger("dualign")
    logger.addHandler(caplog.handler)
    try:
        assert dualign("stage1", recipe, "--redo-from", "sample") == 0
        logger.addHandler(caplog.handler)
    finally:
        logger.removeHandler(caplog.handler)
    assert (folder / "replaced" / "samples" / "my notes.txt").read_text() == "mine"
    assert (folder / "replaced" / "scores" / "harmless" / "plots" / "a.ipynb").read_text() == "mine too"
    assert sum(path.is_file() for path in (folder / "replaced").rglob("*")) == 2


def test_a_file_among_the_tables_stops_the_step_before_readers_take_it_for_data(recipe: Path, capsys: object) -> None:
    folder = run_folder(recipe)
    mine = folder / "tilted" / "data" / "mine.parquet"
    mine.write_text("mine")
    next((folder / "tilted" / "data").glob("train-*")).unlink()
    assert dualign("stage1", recipe) == 2
    assert mine.read_text() == "mine"


def test_a_step_does_not_write_through_a_link(recipe: Path, tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    (target / "data").mkdir(parents=True)
    (target / "data" / "train-00000-of-00001.parquet").write_text("theirs")
    shutil.rmtree(run_folder(recipe) / "tilted")
    (run_folder(recipe) / "tilted").symlink_to(target)
    assert dualign("stage1", recipe) == 2
    assert (target / "data" / "train-00000-of-00001.parquet").read_text() == "theirs"
    assert {path.name for path in target.iterdir()} == {"data"}


def test_an_unfinished_successor_does_not_push_out_what_is_aside(tmp_path: Path) -> None:
    finished, unfinished = tmp_path / "a", tmp_path / "a"
    finished.mkdir()
    (finished / "manifest.json").write_text("{}")
    (finished / "dual.json").write_text("first")
    put_aside(tmp_path, ["a"])
    unfinished.mkdir()
    (unfinished / "settings.json").write_text("{}")
    put_aside(tmp_path, ["a"])
    assert (tmp_path / "replaced" / "a" / "dual.json").read_text() == "first"
    assert not unfinished.exists()
    drop_replaced(tmp_path, ["a"])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_step_wrote_is_known_without_a_manifest(tmp_path: Path) -> None:
    for name in (
        "checkpoints/checkpoint-3/optimizer.pt",
        "mapped/sealed.json",
        "mapped/samples-prompts.arrow",
        "mapped/.lock",
        "model.safetensors",
        "tokenizer.json",
        "parts/train-000.parquet",
    ):
        (tmp_path / "policy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "policy" / name).write_text("x")
    remove_written(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_links_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "report").symlink_to(tmp_path / "target")
    with pytest.raises(InputError, match=r"report is a link to .*target; a step writes into folders of its own run"):
        clear_tables(tmp_path / "report")
