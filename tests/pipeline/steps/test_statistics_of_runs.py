"""Runs whose constraints are on shares, categories, tails and equalities: solved, handed on, validated, budgeted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.tiny_runs import dualign, replace_file, run_folder, write_recipe

import dualign as face
from pipeline.steps.validate import validate_run

pytestmark = pytest.mark.slow

CONSTRAINTS: dict[str, dict[str, Any]] = {
    "unsafe": {"score": "harmless", "statistic": "share", "at_least": -0.4, "direction": ">=", "margin": 0.02},
    "tone": {"score": "harmless", "direction": ">=", "margin": 0.01, "where": {"category": ["t0", "t1"]}},
    "length": {"score": "harmless", "between": [-5, 5]},
    "tail": {"score": "harmless", "statistic": "cvar", "level": 0.3, "direction": ">=", "margin": -0.5},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(
        tmp_path_factory.mktemp("statistics"),
        prompts=[
            {"prompt": f"question {k}", "topic": f"t{k % 3}", "split": "test" if k % 4 == 0 else "train"}
            for k in range(36)
        ],
    )
    tree = yaml.safe_load(path.read_text())
    tree["prompts"]["split_column"] = "split"
    path.write_text(yaml.safe_dump({**tree, "constraints": CONSTRAINTS}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    assert dualign("stage1", recipe) == 0
    return run_folder(recipe)


def test_every_statistic_is_solved_and_found_again_in_the_hand_off_table(run: Path) -> None:
    dual = json.loads((run / "dual" / "dual.json").read_text())
    assert [one["name"] for one in dual["constraints"]] == [
        *("unsafe", "tone", "length.at_least", "length.at_most", "tail")
    ]
    assert all(one["slack"] >= -1e-8 for one in dual["constraints"])
    assert dual["constraints"][4]["certified_at"] is not None
    assert any("`tone` is of 18 train prompts" in warning for warning in dual["warnings"])
    assert validate_run(run).faults == []
    tilted = face.load_run(run).tilted
    assert [name for name in tilted.column_names if name.startswith(("constraint_", "score_"))] == [
        *("constraint_unsafe", "constraint_tone", "constraint_length.at_least", "constraint_length.at_most"),
        *("constraint_tail", "score_harmless"),
    ]


def test_a_column_that_is_not_what_its_scores_make_it_is_a_fault(run: Path) -> None:
    path = min((run / "tilted").glob("data/train-*.parquet"))
    before = pq.read_table(path)
    try:
        place = before.schema.get_field_index("constraint_unsafe")
        values = before["constraint_unsafe"].to_numpy() + np.eye(1, before.num_rows)[0]
        replace_file(path, before.set_column(place, before.schema.field(place), pa.array(values)))
        assert any(
            "the column of unsafe is not what its scores make it in 1 rows" in f for f in validate_run(run).faults
        )
    finally:
        replace_file(path, before)


def test_a_kl_budget_of_a_run_is_spent_and_beta_read_from_its_solution(recipe: Path, run: Path) -> None:
    assert dualign("solve", recipe, "--redo", "--kl", "0.1") == 0
    dual = json.loads((run / "dual" / "dual.json").read_text())
    assert dual["kl"]["predicted"] == pytest.approx(0.1, abs=1e-7)
    assert dualign("export", recipe, "--kl", "0.1") == 0
    assert validate_run(run).faults == []
    assert dualign("solve", recipe, "--redo", "--kl", "0.1", "--beta", "1.0") == 2


def test_what_demands_ask_of_prompts_is_known_before_anything_is_drawn(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {**CONSTRAINTS["tone"], "where": {"category": ["t9"]}}
    other = recipe.with_name("other.yaml")
    other.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "constraints": {"tone": wanted}}))
    assert dualign("stage1", other, run="other") == 2
    assert "constraint `tone`: no prompt has the category 't9'" in capsys.readouterr().err
    assert not (run_folder(recipe, "other") / "samples").exists()
    assert dualign("stage1", other, "--dry-run", run="other") == 2
