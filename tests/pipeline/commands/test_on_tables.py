"""``solve --table``: the same answer from every format, where it went, and what a script gets."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
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


def commands_of(output: Path) -> dict[str, str | None]:
    """What the page says asks for another demand, by constraint, with ``{}`` for its number."""
    text = (output / "report.html").read_text(encoding="utf-8")
    packed = re.search(r'id="data">"([^"]*)"</script>', text)
    assert packed is not None
    data = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return {one["name"]: one["command"] for one in data["constraints"]}


def test_the_command_of_the_page_asks_for_another_demand(tmp_path: Path) -> None:
    harm = 'it\'s (harm) "less"'
    frame().rename(columns={"harmless": harm}).assign(words=np.arange(480) % 7).to_csv(
        tmp_path / "a t.csv", index=False
    )
    asked = ["--reward", "helpful", "--constraint", "'it''s (harm) \"less\"' >= ref + 0.3", "--beta", "0.9"]
    asked += ["--constraint", "1 <= words <= 5", "--seed", "3", "--assurance", f"{harm}=0.9"]
    asked += ["--evaluation-prompts", "50", "--evaluation-responses", "8", "--no-progress"]
    assert main(["solve", "--table", str(tmp_path / "a t.csv"), *asked, "--output", str(tmp_path / "out")]) == 0
    commands = commands_of(tmp_path / "out")
    before = {harm: 0.3, "words.at_least": 1.0, "words.at_most": 5.0}
    assert list(commands) == list(before)
    for name, demand in zip(commands, (0.2, 2.5, 4.25), strict=True):
        command = commands[name]
        assert command is not None
        program, *words = shlex.split(command.replace("{}", str(demand)))
        assert program == "dualign"
        assert main([*words, "--no-progress"]) == 2  # the folder holds the results of another problem
        assert main([*words, "--no-progress", "--force"]) == 0
        dual = json.loads((tmp_path / "out" / "dual.json").read_text())
        asked_for = {one["name"]: one["demanded"] for one in dual["constraints"]}
        for other, found in asked_for.items():
            expected = demand if other == name else before[other]
            assert found["threshold" if found["margin"] is None else "margin"] == pytest.approx(expected)
        assert dual["constraints"][0]["safeguard"]["assurance_level"] == 0.9
        assert (dual["beta"], dual["seed"]) == (0.9, 3)


def test_a_number_that_is_of_several_constraints_has_no_command(tmp_path: Path) -> None:
    frame().assign(topic=np.where(np.arange(480) // 16 % 2, "a", "b")).to_csv(tmp_path / "t.csv", index=False)
    asked = ["--reward", "helpful", "--constraint", "each(topic): harmless >= ref + 0.2", "--beta", "1"]
    words = ["solve", "--table", str(tmp_path / "t.csv"), *asked, "--output", str(tmp_path / "out"), "--no-progress"]
    assert main(words) == 0
    assert commands_of(tmp_path / "out") == {"harmless[topic=a]": None, "harmless[topic=b]": None}
