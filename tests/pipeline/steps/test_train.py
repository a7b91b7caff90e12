"""What the step records of its settings."""

import json

import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import Manifest, begin_step, write_manifest
from pipeline.contracts.errors import CorruptArtifactError, StaleArtifactError
from pipeline.contracts.training_verdict import read_training_verdict
from pipeline.steps.train import recorded_settings

BEFORE = {
    "objective": "tilted_pairwise",
    "learning_rate": 0.0002,
    "epochs": 1.0,
    "tokens_per_step": 16384,
    "responses_per_group": 8,
    "warmup_ratio": 0.05,
    "weight_decay": 0.0,
    "held_out_fraction": 0.1,
    "evaluations": 12,
    "patience": 4,
    "negligible_mass": 0.0,
    "match_prediction": False,
    "dtype": "float32",
    "adapter": "none",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "seed": 0,
}
"""What version 0.1.0 recorded of a recipe that sets nothing of training."""


def test_a_policy_trained_before_is_the_one_that_is_asked_for(tmp_path):
    config = load_config(write_recipe(tmp_path))
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "settings.json").write_text(json.dumps({"settings": BEFORE, "inputs": {}}))
    begin_step(tmp_path / "trained", settings=recorded_settings(config), inputs={}, remedy="")


def test_another_norm_of_gradients_is_another_policy(tmp_path):
    recipe = write_recipe(tmp_path)
    config = load_config(recipe, {"training.max_grad_norm": "0.5"})
    assert recorded_settings(config) == {**BEFORE, "max_grad_norm": 0.5}
    begin_step(tmp_path / "trained", settings=recorded_settings(load_config(recipe)), inputs={}, remedy="")
    with pytest.raises(StaleArtifactError, match=r"max_grad_norm: null then, 0\.5 now"):
        begin_step(tmp_path / "trained", settings=recorded_settings(config), inputs={}, remedy="")


def test_what_changes_speed_alone_is_not_recorded(tmp_path):
    recipe = write_recipe(tmp_path)
    change = {
        "training.tokens_per_microbatch": "100",
        "training.gradient_checkpointing": "true",
        "training.report_to": "[wandb]",
    }
    assert recorded_settings(load_config(recipe, change)) == BEFORE


VERDICT = {
    "closed_fraction": 0.01,
    "closed_fraction_ci95": [-0.03, 0.05],
    "n_checkpoints": 4,
    "n_prompts": 40,
    "reasons": ["what was found"],
    "advice": ["draw more"],
}


@pytest.mark.parametrize(
    ("verdict", "code", "code_if_required"), [("paid", 0, 0), ("undecided", 0, 6), ("did not pay", 6, 6)]
)
@pytest.mark.parametrize("command", ["train", "stage2"])
def test_the_exit_tells_a_script_whether_training_paid(
    command, verdict, code, code_if_required, tmp_path, capsys, monkeypatch
):
    """After all steps, and again when finished work is kept."""
    recipe = write_recipe(tmp_path)
    folder = run_folder(recipe)
    done = []

    def perform(run, steps, **_):
        done.append(tuple(steps))
        write_manifest(
            folder / "policy",
            Manifest(
                step="train",
                run="tiny",
                settings={},
                inputs={},
                files={},
                details={"verdict": {"verdict": verdict, **VERDICT}},
            ),
        )

    monkeypatch.setattr("pipeline.steps.runner.run_steps", perform)
    assert dualign(command, recipe) == code
    assert dualign(command, recipe, "--require-improvement") == code_if_required
    assert done == [("train",) if command == "train" else ("train", "evaluate", "report")] * 2
    said = capsys.readouterr().err
    assert said.count(f"training of run `tiny` {verdict.upper()}: what was found") == [code, code_if_required].count(6)


def test_a_policy_of_an_older_version_has_no_verdict_and_is_let_pass(tmp_path):
    write_manifest(tmp_path, Manifest(step="train", run="old", settings={}, inputs={}, files={}))
    assert read_training_verdict(tmp_path) is None


def test_a_damaged_verdict_is_named(tmp_path):
    details = {"verdict": {"verdict": "splendid", **VERDICT}}
    write_manifest(tmp_path, Manifest(step="train", run="old", settings={}, inputs={}, files={}, details=details))
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json is damaged: `verdict` is 'splendid'"):
        read_training_verdict(tmp_path)
