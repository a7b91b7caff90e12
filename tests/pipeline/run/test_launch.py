from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from pipeline.cli import main
from pipeline.run.launch import find_accelerate_config, process_number


@pytest.mark.parametrize(
    ("name", "kind"),
    [("single_gpu", "NO"), ("multi_gpu", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")],
)
def test_shipped_configurations_are_those_of_accelerate(name: str, kind: str) -> None:
    config = load_config_from_file(str(find_accelerate_config(name)))
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"  # the recipe decides


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data-dir", str(tmp_path), "--accelerate-config"]
    assert main([*arguments, "fsdp"]) == 2
    assert "--accelerate-config 'fsdp': there is no such file; did you mean `fsdp2`?" in capsys.readouterr().err
    assert main([*arguments, "fsdp2", "--processes", "0"]) == 2
    assert "--processes 0: it must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stage2", "evaluate", "run"])
def test_only_training_runs_on_several_processes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([command, "--data-dir", str(tmp_path)]) == 2
    assert "launch `dualign train` alone" in capsys.readouterr().err


def test_what_a_launcher_left_behind_is_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert process_number() == 0
    for rank, size, message in [
        ("x", "2", "RANK='x'; a launcher sets a number"),
        ("0", "two", "WORLD_SIZE='two'; a launcher sets a number"),
        ("1", "", "RANK=1 of WORLD_SIZE=1"),
        ("-1", "2", "RANK='-1'"),
    ]:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert main(["train", "--data-dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
