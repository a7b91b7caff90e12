"""Every step compares what it reads with the manifest that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

pytestmark = pytest.mark.slow

ORDER = ["prepare", "sample", "score", "solve", "export", "report"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("whole"))
    assert dualign("stage1", recipe) == 0
    assert dualign("report", recipe) == 0
    other = ("--seed", "7", "--run", "other")
    assert dualign("stage1", recipe, *other) == 0
    return recipe


@pytest.fixture
def recipe(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    copy = tmp_path / "recipe.yaml"
    copy.write_text(whole.read_text())
    return copy


def flip(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("step", "folder"),
    [
        ("score", "samples/data"),
        ("solve", "scores/harmless/data"),
        ("solve", "samples/data"),
        ("export", "scores/helpful/data"),
    ],
)
def test_shards_of_another_run_are_refused(
    step: str, folder: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = min((run_folder(recipe) / folder).glob("train-*"))
    shutil.copy(min((run_folder(recipe, "other") / folder).glob("train-*")), path)
    assert dualign(step, recipe) == 2
    message = capsys.readouterr().err
    assert f"{path} is not the file that" in message
    assert "manifest.json records (sha256 differs)" in message


@pytest.mark.parametrize(
    ("step", "name"), [("export", "dual/dual.json"), ("report", "dual/dual.json"), ("report", "tilted/data")]
)
def test_a_changed_digit_is_refused(step: str, name: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_folder(recipe) / name
    flip(path if path.is_file() else min(path.glob("train-*")))
    assert dualign(step, recipe) == 2
    assert "is not the file that" in capsys.readouterr().err


@pytest.mark.parametrize("step", ORDER)
def test_what_is_whole_passes(step: str, recipe: Path) -> None:
    assert dualign(step, recipe) == 0
