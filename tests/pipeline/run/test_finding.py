"""A run by its name or folder, and how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.solved_runs import finish

from pipeline.contracts.errors import InputError
from pipeline.run.finding import find_run, finished_steps, require_solved, unsolved
from pipeline.steps.order import SUMMARIES
from pipeline.steps.runner import STEPS


def test_a_name_goes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "other", "data/runs/mine"):
        (tmp_path / folder).mkdir(parents=True)
    assert find_run("mine", data_dir=Path("data")) == Path("data/runs/mine")
    assert find_run("other", data_dir=Path("data")) == Path("other")
    assert find_run("data/runs/mine", data_dir=Path("data")) == Path("data/runs/mine")


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data-dir names another place"):
        find_run("mine", data_dir=tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match="did you mean `mine`"):
        find_run("mime", data_dir=tmp_path)


def test_the_steps_are_those_of_the_runner(tmp_path: Path) -> None:
    for name, step in STEPS.items():
        folder = tmp_path / step.folder / "helpful" if name == "score" else tmp_path / step.folder
        assert name not in finished_steps(tmp_path)
        finish(folder, name)
        assert finished_steps(tmp_path)[-1] == name
    assert finished_steps(tmp_path) == list(SUMMARIES)
    assert unsolved(tmp_path) is None


def test_what_is_not_solved_says_what_comes_next(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        require_solved(tmp_path)
    finish(tmp_path / "prompts", "prepare")
    finish(tmp_path / "samples", "sample")
    with pytest.raises(InputError, match=r"finished are prepare, sample; the next step is `dualign score"):
        require_solved(tmp_path)
