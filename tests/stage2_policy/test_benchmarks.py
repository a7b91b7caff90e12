"""The benchmarks run: quick, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.tiny_runs import dualign, write_recipe

from stage2_policy.objectives import OBJECTIVES

pytestmark = pytest.mark.slow

_FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark is a script, not a module of a package."""
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ours_against_trl(stage_one_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data_dir = stage_one_run
    arguments = ["--config", str(recipe), "--data-dir", str(data_dir), "--quick", "--output", str(tmp_path / "out")]
    load("stage2_trl", monkeypatch).main(arguments)

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: list(curves) for name, curves in results.items()} == {"ours": ["0.0002"], "DPOTrainer": ["0.0001"]}
    for curves in results.values():
        for curve in curves.values():
            assert [point["seconds"] for point in curve] == sorted(point["seconds"] for point in curve)
            assert curve[0]["seconds"] > 0
    assert (
        "The best of DPOTrainer" in (tmp_path / "out" / "table.md").read_text()
        or "does not reach" in (tmp_path / "out" / "table.md").read_text()
    )
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_rate_and_memory_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--size", "tiny", "--steps", "1", "--output", str(output)]
    rows = load("stage2_gpu", monkeypatch).main(arguments)

    assert [(row.adapter, row.trainer) for row in rows] == [
        (adapter, trainer) for adapter in ("none", "lora") for trainer in ("plain", "ours", "DPOTrainer")
    ]
    assert all(row.responses_per_second > 0 for row in rows)
    assert len(json.loads(output.read_text())) == 6


def test_a_step_on_a_checkpoint(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = load("stage2_step", monkeypatch)
    monkeypatch.setattr(step, "SHAPES", {"chat": (8, 8)})
    arguments = ["--model", str(reference), "--shape", "chat", "--turns", "1", "--steps", "1"]
    step.main([*arguments, "--output", str(tmp_path / "rows.json")])

    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["adapter"], row["dtype"]) for row in rows] == [
        (adapter, dtype) for adapter in ("none", "lora") for dtype in ("float32", "bfloat16")
    ]
    assert all(row["ratio"] == pytest.approx(row["plain"] / row["ours"]) for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_data_of_training_up_to_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(_FOLDER.parent))
    sizes = ["--responses", "600", "--tokens", "4", "--prompt-tokens", "3"]
    load("stage2_data", monkeypatch).main([*sizes, "--output", str(tmp_path / "found.json")])

    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert list(found) == ["first process", "next process"]
    assert all(row["in all"] > row["first step"] > 0 < row["VmHWM"] for row in found.values())
    assert "600 responses of 4 tokens" in capsys.readouterr().out


def test_every_row_of_the_study_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    study = load("stage2_study", monkeypatch)
    for name, objective in study.STUDIED.items():
        monkeypatch.setitem(OBJECTIVES, name, objective)

    settings = {name: row.settings() for name, row in study.ROWS.items()}
    assert {one.objective for one in settings.values()} == OBJECTIVES.keys()
    assert settings["nll 5e-4"].learning_rate == 5e-4
    assert settings["pairwise 1e-3, LoRA of rank 64"].lora_r == 64


def test_the_study_trains_and_samples_with_an_objective_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dualign("stage1", write_recipe(tmp_path)) == 0
    monkeypatch.syspath_prepend(str(_FOLDER))
    study = load("stage2_study", monkeypatch)
    for name in study.STUDIED:  # to be taken out again
        monkeypatch.setitem(OBJECTIVES, name, study.STUDIED[name])
    names = ["kl 2e-4", "pairwise 1e-3, LoRA of rank 16"]
    arguments = ["--runs", "tiny", "--data-dir", str(tmp_path / "data"), "--responses", "2", "--only", *names]
    monkeypatch.setattr(sys, "argv", ["stage2_study.py", *arguments])
    study.main()

    table = (tmp_path / "data" / "runs" / "tiny" / "stage2_study" / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in names]
