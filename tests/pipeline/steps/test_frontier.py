"""``dualign frontier``: the table and the figure of any grid, said and written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.contracts.errors import InputError
from pipeline.dual.from_table import TableRequest
from pipeline.dual.table_sources import ScoreFiles
from pipeline.report.swept import sweep_figure
from pipeline.steps.frontier import read_grid, solve_grid


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    n = 30 * 16
    harmless = rng.normal(size=n)
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    columns = {
        "prompt_id": np.repeat(np.arange(30), 16),
        "helpful": rng.normal(size=n) - harmless / 2,
        "harmless": harmless,
        "calm": rng.uniform(size=n),
        "flat": np.ones(n),
        "topic": np.repeat(np.where(np.arange(30) % 2, "odd", "even"), 16),
    }
    pq.write_table(pa.table(columns), path)
    return path


def frontier(
    table: Path, output: Path, *constraints: str, reward: str = "helpful", given: tuple[str, ...] = ()
) -> int:
    asked = [text for one in constraints for text in ("--constraint", one)]
    where = ["--beta", "1", "--output", str(output), "--no-progress"]
    return main(["frontier", "--table", str(table), "--reward", reward, *asked, *where, *given])


def test_it_prints_the_table_and_where_table_and_figure_are(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frontier(table, tmp_path / "out", "harmless >= ref + 0:0.4:0.1") == 0
    out = capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "frontier.parquet").to_pylist()
    assert len(rows) == 5
    line = next(line for line in out.splitlines() if line.startswith("4 "))
    assert "+0.300" in line
    assert f"{rows[3]['multiplier_harmless']:.3f}" in line
    assert f"{rows[3]['reward']:.3f}" in line
    assert f"{rows[3]['kl']:.3f}" in line
    for name in ("frontier.parquet", "figures/frontier.png", "figures/frontier.svg"):
        assert f"wrote {tmp_path / 'out' / name}" in out
        assert (tmp_path / "out" / name).is_file()


def test_json_has_every_row_and_null_for_what_cannot_be_met(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("harmless >= ref + 0:4:2", "calm <= 0.45:0.5:0.05")
    assert frontier(table, tmp_path / "out", *grid, given=("--json",)) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out, parse_constant=pytest.fail)
    assert (found["n_thresholds"], len(found["rows"])) == (6, 6)
    assert 0 < found["n_feasible"] < 6
    assert [row["reward"] is not None for row in found["rows"]] == [row["feasible"] for row in found["rows"]]
    assert "Frontier: 6 thresholds" in captured.err


def test_what_moves_together_is_one_line(table: Path) -> None:
    grid = read_grid(["each(topic): harmless >= ref + 0:0.2:0.1"])
    columns, labels = ("prompt_id", "helpful", "harmless"), ("topic",)
    source = ScoreFiles(table, columns, labels)
    request = TableRequest(source, "prompt_id", "helpful", grid.first, beta=1.0, show_progress=False)
    solved = solve_grid(request, grid, scratch=table.parent)
    assert [one.name for one in solved.swept] == ["harmless[topic=even]", "harmless[topic=odd]"]
    assert len(sweep_figure(solved).axes[1].lines) == 1
    multipliers = [solved.rows[f"multiplier_{one.name}"].to_pylist() for one in solved.swept]
    assert all(value > 0 for values in multipliers for value in values[1:])


def test_a_constant_reward_is_said_with_what_follows(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frontier(table, tmp_path / "out", "harmless >= ref + 0:0.2:0.1", reward="flat") == 0
    assert "'flat' is the same for all responses of every prompt" in capsys.readouterr().err


def test_a_grid_needs_a_range() -> None:
    with pytest.raises(InputError, match="holds a range"):
        read_grid(["harmless >= 0"])
    assert read_grid(["a >= 0", "b <= 0:1:0.5"]).swept == (1,)


def test_thresholds_of_which_none_can_be_met_end_as_such(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frontier(table, tmp_path / "out", "calm >= 7:8:1") == 3
    assert "calm >= 7:8:1 cannot be met by any policy" in capsys.readouterr().err
    assert pq.read_table(tmp_path / "out" / "frontier.parquet")["feasible"].to_pylist() == [False, False]
