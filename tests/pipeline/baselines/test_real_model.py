"""The experiment on a published model, on random checkpoints: its numbers are those of its runs."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import rows_of, write_recipe

from pipeline.baselines.command import run_experiments
from pipeline.baselines.study import Study
from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import read_json

pytestmark = pytest.mark.slow


def test_rows_and_examples_are_those_of_the_runs(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        training={"epochs": 1, "tokens_per_step": 1024, "evaluations": 1, "learning_rate": 1e-3},
        evaluation={"samples_per_prompt": 4, "bootstrap_replicates": 100},
    )
    study = Study(
        config=load_config(Path("baselines")),  # the embedded world is not built for it
        data_dir=tmp_path / "data",
        name="tiny",
        seeds=(0, 1),
        margins=(0.1,),
        pairs=(),
        dpo_epochs=1.0,
        sizes={},
        real_model=load_config(recipe),
        show_progress=False,
    )
    (result,) = run_experiments(study, ["real_model"])
    assert not (tmp_path / "data" / "models").exists()
    rows = pq.read_table(study.folder / "results" / "real_model.parquet").to_pylist()
    assert [(row["score"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in ("helpful", "harmless")
    ]
    for row in rows:
        run = tmp_path / "data" / "runs" / row["run"]
        evaluation = read_json(run / "evaluation" / "evaluation.json")
        assert row["closed_fraction"] == evaluation["lagrangian"]["closed_fraction"]
        if row["score"] == "harmless":
            (bound,) = evaluation["constraints"]
            assert row["demanded"] == pytest.approx(0.05)
            assert row["realised"] == pytest.approx(bound["improvement"], abs=1e-12)
            assert row["status"] == bound["status"]
    prompts = sorted({row["prompt_id"] for row in rows_of(run / "evaluation" / "samples")})
    first = rows_of(tmp_path / "data" / "runs" / "tiny" / "real_model" / "seed0" / "policy" / "evaluation" / "samples")
    shown = " ".join(next(row["completion"] for row in first if row["prompt_id"] == prompts[0]).split())
    assert f"Policy: “{shown}”" in "\n".join(result.findings)
    assert "not violated by" in (study.folder / "results" / "real_model.md").read_text()
