"""The page of several runs: whole, of its own, and with every number that the tables have."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.compare_page import write_compare_page
from pipeline.report.compared import ComparedRun, compared_scores

pytestmark = pytest.mark.slow


def of(run: Any, name: str) -> ComparedRun:
    reward, constraints = compared_scores(run.dual, run.evaluation)
    return ComparedRun(
        name,
        f"data/runs/{name}",
        "evaluated",
        None,
        {"solve": 1.0, "train": 100.0},
        trust="ok",
        evaluation=run.evaluation["status"],
        beta=1.0,
        kl_predicted=0.5,
        reward=reward,
        constraints=constraints,
    )


def test_the_page_has_every_run_and_every_number(one_bound: Any, two_bounds: Any, tmp_path: Path) -> None:
    runs = [of(one_bound, "mild"), of(two_bounds, "<steep> & long")]
    waiting = ComparedRun("begun", "data/runs/begun", "unsolved", "run `begun` is not solved yet", {})
    page, *figures = write_compare_page([*runs, waiting], ["run `begun` is not solved yet"], output=tmp_path)
    tree = ET.fromstring(page.read_text(encoding="utf-8"))
    words = " ".join("".join(tree.itertext()).split())
    assert "3 runs compared" in words
    assert "run `begun` is not solved yet" in words
    assert "1 min 41 s" in words
    for run in runs:
        assert run.name in words
        for bound in run.constraints:
            assert f"{bound.realised:.3f}".replace("-", "\N{MINUS SIGN}") in words
    images = tree.findall(".//img")
    assert len(images) == 2  # harmless, which both demand, and toxicity
    assert "mild: predicted +" in images[0].attrib["alt"]
    assert {path.name for path in figures} >= {"plane_1.png", "plane_1.svg", "plane_2.png"}


def test_it_asks_for_nothing_and_runs_nothing(one_bound: Any, tmp_path: Path) -> None:
    text = write_compare_page([of(one_bound, "mild")], [], output=tmp_path)[0].read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)


def test_runs_of_which_none_is_solved_are_a_page_too(tmp_path: Path) -> None:
    waiting = ComparedRun("begun", "data/runs/begun", "unsolved", "run `begun` is not solved yet", {})
    page, *figures = write_compare_page([waiting], [], output=tmp_path)
    assert figures == []
    assert "begun" in "".join(ET.fromstring(page.read_text(encoding="utf-8")).itertext())
