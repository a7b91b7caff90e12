"""Machines that lack what a program takes for granted: each command ends right, or in one message."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

from pipeline.contracts.artifacts import read_json

pytestmark = pytest.mark.slow

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
PYTHON = [sys.executable, "-m", "pipeline"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("table") / "scores.parquet"
    columns = {"prompt_id": np.repeat([f"λ≥{i}" for i in range(40)], 16), "nützlich": rng.normal(size=640)}
    pq.write_table(pa.table({**columns, "g": rng.normal(size=640)}), path)
    return path


def solve(table: Path, output: Path, *more: str) -> list[str]:
    options = ["--reward", "nützlich", "--constraint", "g >= ref + 0.3", "--beta", "1", "--no-progress"]
    return [*PYTHON, "solve", "--table", str(table), *options, "--output", str(output), *more]


def with_streams(command: list[str], redirections: str) -> int:
    return subprocess.run(["bash", "-c", f"{shlex.join(command)} {redirections}"]).returncode


@pytest.mark.parametrize("closed", [">&- 2>/dev/null", "<&- >&- 2>&-"])
def test_closed_streams(table: Path, tmp_path: Path, closed: str) -> None:
    assert with_streams(solve(table, tmp_path / "out"), closed) == 0
    assert read_json(tmp_path / "out" / "dual.json")["status"] == "certified"
    for path in (tmp_path / "out").rglob("*"):  # nothing that was printed is in a file
        assert path.is_dir() or b"wrote " not in path.read_bytes()
    assert with_streams(solve(table, tmp_path / "out", "--seed", "x"), closed) == 2


@pytest.mark.parametrize("command", [["--help"], ["env"], ["run", "--help"]])
def test_closed_streams_of_what_only_prints(command: list[str]) -> None:
    assert with_streams([*PYTHON, *command], ">&- 2>&-") == 0


def test_a_terminal_of_ascii_shows_names_and_signs_of_others(table: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, prompts=[{"prompt": f"λ ≥ {i}", "topic": f"θ{i % 3}"} for i in range(24)])
    run = ["--config", str(recipe), "--data-dir", str(tmp_path / "data"), "--no-progress"]
    for command, shown in (
        (solve(table, tmp_path / "out"), "n\\xfctzlich"),
        ([*PYTHON, "--help"], "prepare \\u2192 sample"),
        ([*PYTHON, "sample", "--dry-run", *run], "\\u03bb \\u2265 "),
        ([*PYTHON, "run", "--dry-run", *run], "prepare \\u2192 sample"),
    ):
        done = subprocess.run(command, env={**os.environ, **ASCII}, capture_output=True, check=True)
        assert shown in " ".join(done.stdout.decode("ascii").split())
    done = subprocess.run(
        solve(table, tmp_path / "out", "--nö", "1"), env={**os.environ, **ASCII}, capture_output=True
    )
    assert (done.returncode, done.stderr.decode("ascii").count("\n")) == (2, 2)


def test_no_home_and_no_temporary_folder(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = [*PYTHON, "stage1", "--config", str(recipe), "--data-dir", str(tmp_path / "data"), "--no-progress"]
    environment = {**os.environ, "HOME": "/proc/none", "TMPDIR": "/proc/none", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--run", "tiny"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Matplotlib" not in done.stderr
    assert (run_folder(recipe) / "dual" / "dual.json").is_file()


def test_no_name_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, refuse)
    assert dualign("stage1", write_recipe(tmp_path)) == 0


def test_a_folder_that_takes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert dualign("run", recipe, "--data-dir", "/proc/self") == 2
    assert "dualign: the output folder /proc/self/runs/tiny cannot be written: " in capsys.readouterr().err
