"""``dualign compare``: honest rows for runs at any stage, of any scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.solved_runs import finish, write_evaluated, write_solved_run, write_trained

from pipeline.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two margins, one evaluated; one of another constraint, one of another reward, one not solved."""
    data = tmp_path_factory.mktemp("data")
    runs = data / "runs"
    write_solved_run(runs / "mild", constraint="harmless >= ref + 0.1")
    write_solved_run(runs / "steep")
    write_solved_run(runs / "absolute", constraint="other <= -0.2")
    write_solved_run(runs / "swapped", constraint="other >= ref + 0.1", reward="harmless")
    write_trained(runs / "steep")
    write_evaluated(runs / "steep", realised=0.2)
    finish(runs / "begun" / "prompts", "prepare", seconds=1.0)
    return data


def compare(data: Path, *given: str) -> int:
    return main(["compare", *given, "--data-dir", str(data)])


def compared(data: Path, capsys: pytest.CaptureFixture[str], *given: str) -> dict:
    assert compare(data, *given, "--json") == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_json_has_what_the_files_say(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mild, steep = compared(data, capsys, "mild", "steep")["runs"]
    dual = json.loads((data / "runs" / "mild" / "dual" / "dual.json").read_text())
    bound = mild["constraints"][0]
    assert (mild["state"], mild["evaluation"], mild["closed_fraction"]) == ("solved", None, None)
    assert bound["multiplier"] == dual["constraints"][0]["multiplier"]
    assert bound["demanded"] == pytest.approx(0.1)
    solved = dual["constraints"][0]
    assert bound["predicted"] == pytest.approx(
        (solved["predicted_corrected"] or solved["predicted"]) - solved["reference"], abs=1e-12
    )
    assert bound["realised"] is None

    assert (steep["state"], steep["evaluation"], steep["trust"]) == ("evaluated", "violated", dual["trust"]["verdict"])
    bound = steep["constraints"][0]
    assert bound["realised"] == pytest.approx(0.2)
    assert bound["ci95"] == pytest.approx([0.18, 0.22])
    assert bound["status"] == "violated"
    assert steep["reward"]["realised"] == pytest.approx(0.3)
    assert steep["reward"]["ci95"] == [0.25, 0.35]
    assert steep["closed_fraction"] == 0.93
    assert steep["kl"] == {"predicted": 0.5, "realised": 0.6, "realised_ci95": [0.55, 0.65]}
    assert steep["total_seconds"] == pytest.approx(1 + 60 + 2 + 3 + 0.5 + 100 + 30)
    assert steep["seconds"]["score"] == 5


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_the_tables_fit_and_have_every_run(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert compare(data, "mild", "steep", "begun") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    text = " ".join(out.split())
    assert "violated" in text
    assert "[0.180, 0.220]" in text
    assert "3 min 16 s" in text
    assert "run `begun` is not solved yet" in text
    assert "not evaluated, predictions alone: mild" in text


def test_runs_of_different_scores_are_told_apart(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = compared(data, capsys, "mild", "absolute", "swapped")["notes"]
    assert any("different rewards (helpful, harmless)" in note for note in notes)
    assert any("different constraints" in note for note in notes)
    assert not any("different" in note for note in compared(data, capsys, "mild", "steep")["notes"])
    assert not any("different prompts" in note for note in notes)


def test_the_folder_has_a_plane_for_each_pair_of_scores(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert compare(data, "mild", "steep", "absolute", "begun", "--output", str(output)) == 0
    assert {path.name for path in (output / "figures").glob("*.png")} == {"plane_1.png", "plane_2.png"}
    assert len(json.loads((output / "compare.json").read_text())["runs"]) == 4
    assert compare(data, "mild", "--output", str(output)) == 0
    assert {path.name for path in (output / "figures").glob("*.png")} == {"plane_1.png"}
    assert "steep" not in (output / "compare.html").read_text()


def test_what_is_not_there_is_said_for_all_at_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(data, "mild", "milt", "nowhere", str(data / "runs" / "mild")) == 2
    err = capsys.readouterr().err
    assert "there is no run 'milt'; did you mean `mild`?" in err
    assert "there is no run 'nowhere'" in err
    assert "are one run" in err


def test_folders_of_one_name_are_told_apart(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(data / "runs" / run / "dual") for run in ("mild", "steep")]
    assert [run["run"] for run in compared(data, capsys, *names)["runs"]] == names
