"""One output folder, several solves: killed, at once, or on a disk that is full. Files always belong together."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.contracts.artifacts import run_lock

pytestmark = pytest.mark.slow

N_PROMPTS, N_RESPONSES = 60, 16


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    n = N_PROMPTS * N_RESPONSES
    columns = {
        "prompt_id": np.repeat([f"p{place}" for place in range(N_PROMPTS)], N_RESPONSES),
        "r": rng.normal(size=n),
        "g": rng.normal(size=n),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def arguments(table: Path, margin: float) -> list[str]:
    asked = ["--reward", "r", "--constraint", f"g >= ref + {margin}", "--beta", "1", "--no-progress"]
    return ["solve", "--table", str(table), *asked, "--output", str(table.parent / "out"), "--force"]


def belong_together(output: Path, table: Path) -> bool:
    """Whether the weights are those of the multipliers beside them."""
    multiplier = json.loads((output / "dual.json").read_text())["constraints"][0]["multiplier"]
    scores = pq.read_table(table)
    logit_n = scores["r"].to_numpy() + multiplier * scores["g"].to_numpy()
    weight_pk = np.exp(logit_n).reshape(N_PROMPTS, N_RESPONSES)
    expected_n = (weight_pk / weight_pk.sum(axis=1, keepdims=True)).reshape(-1)
    return bool(np.allclose(pq.read_table(output / "weights.parquet")["weight"].to_numpy(), expected_n))


def visible(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


WHOLE = {"dual.json", "report.html", "weights.parquet", "frontier.parquet", "figures"}


@pytest.mark.parametrize("moment", ["weights.parquet", "frontier.parquet", "figures", "dual.json"])
def test_a_second_solve_killed_at_any_moment_mixes_nothing(moment: str, table: Path) -> None:
    output = table.parent / "out"
    assert main(arguments(table, 0.3)) == 0
    before = {name: (output / name).stat().st_mtime_ns for name in ("dual.json", "weights.parquet")}
    program = [sys.executable, "-m", "pipeline", *arguments(table, 0.6)]
    second = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3]
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and second.poll() is None:
        if any(output.glob(f".scores-*/{moment}")):
            second.send_signal(signal.SIGKILL)
            break
    second.wait()

    if (output / "dual.json").is_file():
        assert belong_together(output, table)
        if second.returncode == -signal.SIGKILL and moment != "dual.json":
            assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    assert main(arguments(table, 0.6)) == 0
    assert visible(output) == WHOLE  # what the killed one left is gone too
    assert belong_together(output, table)


def test_two_at_once_do_not_write_one_folder(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_lock(table.parent / "out"):
        assert main(arguments(table, 0.3)) == 2
    assert "is in use by another process" in capsys.readouterr().err
    assert main(arguments(table, 0.3)) == 0
    assert visible(table.parent / "out") == WHOLE


def test_a_full_disk_is_one_message_and_leaves_what_was_there(table: Path) -> None:
    """A limit on the size of files stands for a disk that fills while results are written."""
    output = table.parent / "out"
    assert main(arguments(table, 0.3)) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments(table, 0.6)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        ),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert main(arguments(table, 0.6)) == 0
    assert belong_together(output, table)


def refused(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    assert main(list(given)) == 2
    return capsys.readouterr().err


def test_another_problem_is_refused_until_forced_and_the_same_is_not(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = table.parent / "out"
    asked = arguments(table, 0.3)[:-1]
    assert main(asked) == 0
    before = (output / "dual.json").read_bytes()
    assert main([*asked, "--seed", "1"]) == 0  # other intervals of the same problem
    assert (output / "dual.json").read_bytes() != before

    before = (output / "dual.json").read_bytes()
    err = refused(capsys, *arguments(table, 0.6)[:-1])
    assert f"{output} holds the results of another problem" in err
    assert "constraints.g.margin: 0.3 then, 0.6 now" in err
    assert "--force" in err
    assert (output / "dual.json").read_bytes() == before
    assert "beta: 1.0 then, 2.0 now" in refused(capsys, *asked, "--beta=2")

    scores = pq.read_table(table).to_pydict()
    scores["r"][0] += 1.0
    pq.write_table(pa.table(scores), table)
    assert "table.t.parquet" in refused(capsys, *asked)
    assert main([*asked, "--force"]) == 0
    assert belong_together(output, table)


def test_results_of_which_nobody_can_tell_the_problem_are_kept(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = table.parent / "out"
    output.mkdir()
    for content in ('{"status": "certified"}', "not JSON"):
        (output / "dual.json").write_text(content)
        assert "does not say of which problem" in refused(capsys, *arguments(table, 0.3)[:-1])
        assert (output / "dual.json").read_text() == content


def test_a_frontier_and_a_solution_do_not_take_each_others_place(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solve = arguments(table, 0.3)[:-1]
    grid = [text.replace("+ 0.3", "+ 0:0.4:0.1") for text in solve]
    grid[0] = "frontier"
    assert main(grid) == 0
    assert main(grid) == 0
    assert "another problem" in refused(capsys, *solve)
    assert main([*solve, "--force"]) == 0
    assert "another problem" in refused(capsys, *grid)


def test_figures_of_a_replaced_problem_go_with_it(table: Path) -> None:
    asked = arguments(table, 0.3)
    scores = pq.read_table(table)
    pq.write_table(scores.append_column("other", scores["g"]), table)
    assert main(asked) == 0
    (table.parent / "out" / "figures" / "mine.txt").write_text("not ours")
    assert main([text.replace("g >=", "other >=") for text in asked]) == 0
    names = {path.stem for path in (table.parent / "out" / "figures").iterdir()}
    assert {"dual_other", "mine"} <= names
    assert not {"dual_g", "frontier_g"} & names
