"""The order of the steps is that of the commands and of their files."""

from __future__ import annotations

import importlib
from pathlib import Path

from pipeline.steps.order import STAGES, SUMMARIES

ROOM = Path(__file__).parents[3] / "pipeline" / "steps"


def test_the_stages_one_after_the_other_are_the_run() -> None:
    assert [*STAGES["stage1"], *STAGES["stage2"]] == list(STAGES["run"]) == list(SUMMARIES)


def test_every_step_is_the_function_of_its_name_in_the_file_of_its_name() -> None:
    for step in SUMMARIES:
        module = importlib.import_module(f"pipeline.steps.{step}")
        assert Path(module.__file__ or "") == ROOM / f"{step}.py"
        assert callable(getattr(module, step)), step


def test_a_summary_is_one_line_of_the_help() -> None:
    for step, summary in SUMMARIES.items():
        assert summary.strip() == summary, step
        assert 10 < len(summary) < 75, step
        assert "\n" not in summary, step
