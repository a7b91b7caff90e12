"""``dualign show``: what the run's own steps printed, again, and the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.solved_runs import finish, write_evaluated, write_solved_run, write_trained

from pipeline.cli import main
from pipeline.steps.show import read_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the runs `solved` and `evaluated`, and `begun`, which is not solved."""
    data = tmp_path_factory.mktemp("data")
    for name in ("solved", "evaluated"):
        write_solved_run(data / "runs" / name)
    write_trained(data / "runs" / "evaluated")
    write_evaluated(data / "runs" / "evaluated")
    finish(data / "runs" / "begun" / "prompts", "prepare")
    return data


def show(data: Path, *given: str) -> int:
    return main(["show", *given, "--data-dir", str(data)])


def test_a_solved_run_shows_what_is_predicted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(data, "solved") == 0
    out = capsys.readouterr().out
    assert "solved, stage 1: the tilted optimum" in out
    assert "Evaluation: NOT YET" in out
    assert "harmless: at least 0.300 above the reference demanded" in out


def test_an_evaluated_run_shows_both_stages_and_one_verdict(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(data, "evaluated") == 0
    out = capsys.readouterr().out
    assert out.index("evaluated, stage 1") < out.index("evaluated, stage 2")
    assert "Evaluation: NOT YET" not in out
    assert out.count("Trust in lambda*") == 1
    assert "Evaluation: SATISFIED" in out
    assert "realised +0.350 [0.330, 0.370]" in " ".join(out.split())
    assert "Training: PAID" in out


def test_json_is_the_files(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data / "runs" / "evaluated"
    assert show(data, "evaluated", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == "evaluated"
    assert found["dual"] == json.loads((folder / "dual" / "dual.json").read_text())
    assert found["evaluation"] == json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert found["training"]["verdict"] == "paid"
    assert show(data, "--run", "solved", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluation"] is None
    assert found["training"] is None


def test_a_folder_of_results_is_enough(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(data, str(data / "runs" / "solved" / "dual")) == 0
    assert "stage 1" in capsys.readouterr().out
    assert read_results(data / "runs" / "solved" / "dual").dual["status"] == "certified"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["evaluted"], "there is no run 'evaluted'; did you mean `evaluated`?"),
        (["begun"], "run `begun` is not solved yet: finished are prepare; the next step is `dualign sample"),
        (["solved", "--run", "evaluated"], "two runs are named"),
        (["x" * 5000], "there is no run"),
    ],
)
def test_a_run_that_cannot_be_shown(
    data: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    for json_option in ([], ["--json"]):
        assert show(data, *given, *json_option) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


def test_a_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "mine"
    write_solved_run(folder)
    path = folder / "dual" / "dual.json"
    path.write_text(path.read_text().replace('"certified"', '"guessed"'))
    assert show(tmp_path, "mine") == 2
    assert str(path) in capsys.readouterr().err
