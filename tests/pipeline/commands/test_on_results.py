"""``validate --json``: the artifacts and the faults for a script; the exit code as without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.solved_runs import write_solved_run

from pipeline.cli import main

pytestmark = pytest.mark.slow


def test_faults_are_in_the_object_and_in_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "mine"
    write_solved_run(folder)
    assert main(["validate", "mine", "--data-dir", str(tmp_path), "--json", "--no-progress"]) == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["folder"] == str(folder)
    assert {link["name"] for link in found["artifacts"]} >= {"prompts", "samples", "dual"}
    assert found["faults"]  # its prompts and samples have no rows
    assert f"{folder} has {len(found['faults'])} faults" in captured.err


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "mine", "--data-dir", str(tmp_path), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "there is no run 'mine'" in captured.err
