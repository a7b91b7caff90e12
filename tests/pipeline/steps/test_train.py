"""What the step records of its settings."""

import json

import pytest
from helpers.tiny_runs import write_recipe

from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import begin_step
from pipeline.contracts.errors import StaleArtifactError
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
