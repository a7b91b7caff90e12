"""``solve --table``: the same answer from every format, where it went, and what a script gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.cli import main

pytestmark = pytest.mark.slow


def frame(*, flat: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    harmless = rng.normal(size=30 * 16)
    return pd.DataFrame(
        {
            "prompt_id": np.repeat([f"p{place}" for place in range(30)], 16),
            "helpful": np.ones(harmless.size) if flat else rng.normal(size=harmless.size) - harmless / 2,
            "harmless": harmless,
        }
    )


def solve(table: Path, output: Path, *given: str, margin: float = 0.3) -> int:
    asked = ["--reward", "helpful", "--constraint", f"harmless >= ref + {margin}", "--beta", "1", "--no-progress"]
    return main(["solve", "--table", str(table), *asked, "--output", str(output), *given])


def solved(table: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert solve(table, output, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


def test_json_is_the_file_and_says_where_everything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame().to_parquet(tmp_path / "t.parquet")
    found = solved(tmp_path / "t.parquet", tmp_path / "out", capsys)
    assert found["dual"] == json.loads((tmp_path / "out" / "dual.json").read_text())
    assert found["output"] == str(tmp_path / "out")
    assert set(found["files"]) == {str(path) for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_csv_and_json_lines_are_taken_as_parquet_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame().to_parquet(tmp_path / "t.parquet")
    frame().to_csv(tmp_path / "t.csv", index=False)
    frame().to_json(tmp_path / "t.jsonl", orient="records", lines=True, double_precision=15)
    star = [
        solved(tmp_path / f"t.{kind}", tmp_path / kind, capsys)["dual"]["constraints"][0]["multiplier"]
        for kind in ("parquet", "csv", "jsonl")
    ]
    assert star == pytest.approx([star[0]] * 3, abs=1e-9)


def test_it_says_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame().to_csv(tmp_path / "t.csv", index=False)
    assert solve(tmp_path / "t.csv", tmp_path / "out") == 0
    out = capsys.readouterr().out
    for name in ("dual.json", "report.html", "weights.parquet", "frontier.parquet", "figures/"):
        assert f"wrote {tmp_path / 'out' / name}" in out


def test_a_constant_reward_is_said_with_what_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame(flat=True).to_csv(tmp_path / "t.csv", index=False)
    assert solve(tmp_path / "t.csv", tmp_path / "out") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: The reward is the same for all responses of every prompt" in out
    assert "closest to the reference that meets the constraints" in out


def test_a_failure_leaves_standard_output_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame().to_csv(tmp_path / "t.csv", index=False)
    assert solve(tmp_path / "t.csv", tmp_path / "out", "--json", margin=9.0) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "attainable" in captured.err
