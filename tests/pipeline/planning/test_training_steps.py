"""The steps that a plan says against those that training takes, on whole tiny runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import dualign, run_folder, write_recipe

from pipeline.config.loading import load_config
from pipeline.config.sections import TrainingSettings
from pipeline.contracts.artifacts import read_manifest
from pipeline.planning.dry_run import plan_run
from pipeline.planning.training_steps import StepCount, bound_steps
from pipeline.run.run import Run
from pipeline.steps.order import STAGES

pytestmark = pytest.mark.slow

TRAINING = {
    "epochs": 1.5,
    "tokens_per_step": 300,
    "tokens_per_microbatch": 300,
    "responses_per_group": 3,
    "held_out_fraction": 0.2,
    "evaluations": 1,
    "patience": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: a second thread only waits
    yield
    torch.set_num_threads(threads)


def planned(recipe: Path, **overrides: Any) -> StepCount | None:
    config = load_config(recipe, {key: str(value) for key, value in overrides.items()})
    return plan_run(Run(config, "tiny", recipe.parent / "data", show_progress=False), STAGES["run"]).steps


def taken(recipe: Path) -> int:
    return read_manifest(run_folder(recipe) / "policy").counts["steps"]


def write_with_pairs(folder: Path) -> Path:
    """Three pairs of each prompt, of which some are test and some held-out prompts, and some too long."""
    rows = [
        {"prompt": f"question {number}", "a": f"rest {turn}", "b": "call a friend " * (1 + 40 * (number % 7 == turn))}
        for number in range(24)
        for turn in range(3)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"source": str(folder / "pairs.jsonl"), "response_columns": ["a", "b"]}
    return write_recipe(
        folder, sampling={"max_new_tokens": 24}, training={**TRAINING, "objective": "dpo", "pairs": pairs}
    )


def test_before_sampling_bounds_hold_then_the_number_is_that_of_training(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, training=TRAINING)
    before = planned(recipe)
    assert before is not None
    assert before.fewest is not None
    assert before.basis == "if prompts have 1 to 35 tokens and responses 1 to 12"
    assert dualign("sample", recipe) == 2  # prepare is not done
    assert dualign("prepare", recipe) == 0
    assert planned(recipe) == before
    assert dualign("sample", recipe) == 0
    sampled = planned(recipe)
    assert sampled is not None
    assert sampled.fewest == sampled.most
    assert "if each of them gets its scores" in sampled.basis
    # Of other settings than those of the samples, nothing was counted.
    assert planned(recipe, **{"sampling.samples_per_prompt": 9}) != sampled
    assert planned(recipe, seed=1) == before
    natural = {"training.optimizer": "natural_gradient", "training.adapter": "lora"}
    assert planned(recipe, **natural) == StepCount(1, 1, "of the natural gradient")
    assert planned(recipe, **{"prompts.limit": 5}).most < sampled.most
    assert dualign("run", recipe) in {0, 6}  # whether so short a training pays is another question
    exported = planned(recipe)
    assert exported == StepCount(taken(recipe), taken(recipe), "counted in the tilted table")
    assert before.fewest <= taken(recipe) <= before.most
    skipped = planned(recipe, **{"training.negligible_mass": 0.1, "training.objective": "tilted_nll"})
    assert skipped == StepCount(None, taken(recipe), "before responses of negligible weight are left out")


def test_responses_that_are_cut_off_and_dropped_are_not_counted(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, training=TRAINING, sampling={"max_new_tokens": 40}, solve={"on_length": "drop"})
    assert dualign("prepare", recipe) == 0
    assert dualign("sample", recipe) == 0
    sampled = planned(recipe)
    kept = planned(recipe, **{"solve.on_length": "keep"})
    assert sampled.most < kept.most
    assert dualign("run", recipe) in {0, 6}  # whether so short a training pays is another question
    assert planned(recipe).most == sampled.most == taken(recipe)


def test_of_pairs_those_of_held_out_and_test_prompts_are_not_counted(tmp_path: Path) -> None:
    recipe = write_with_pairs(tmp_path)
    before = planned(recipe)
    assert before.fewest is None
    assert dualign("prepare", recipe) == 0
    assert dualign("sample", recipe) == 0
    sampled = planned(recipe)
    assert sampled.fewest == sampled.most
    assert planned(recipe, **{"training.pairs.limit": 4}).basis == before.basis
    assert dualign("run", recipe) in {0, 6}  # whether so short a training pays is another question
    assert planned(recipe) == StepCount(taken(recipe), taken(recipe), "counted in the tilted table")
    assert sampled.most == taken(recipe) < before.most
    shutil.rmtree(run_folder(recipe) / "pairs")
    assert planned(recipe).fewest is None


def test_bounds_by_hand() -> None:
    training = TrainingSettings(epochs=2, tokens_per_step=1000, responses_per_group=8)
    sizes: dict[str, Any] = {"n_prompts": 10, "responses_per_prompt": 20, "prompt_tokens": 30, "at_most": False}
    found = bound_steps(training, most_response_tokens=100, **sizes)
    # 200 responses of 15 + 1 and of 60 + 30 + 100 tokens: 3.2 and 38 thousand; 10 prompts of 2 groups are fewer
    assert (found.fewest, found.most) == (6, 40)
    assert bound_steps(training, most_response_tokens=100, **{**sizes, "at_most": True}).fewest is None
