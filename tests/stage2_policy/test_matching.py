"""A real run with two constraints: each part of what was learnt is moved by a factor of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import save_tiny_classifier
from helpers.tiny_runs import dualign, run_folder, write_recipe
from safetensors.numpy import load_file

from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import TrainingDidNotPayError
from stage2_policy.parts import parts_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n_constraints", [1, 2])
def test_a_policy_of_several_constraints_is_moved_part_by_part(tmp_path: Path, n_constraints: int) -> None:
    save_tiny_classifier(tmp_path / "humour", seed=7)
    names = ("harmless", "humour")
    recipe = write_recipe(
        tmp_path,
        scorers={name: {"model": str(tmp_path / name)} for name in ("helpful", *names)},
        constraints={name: {"direction": ">=", "margin": 0.01} for name in names[:n_constraints]},
        training={
            "epochs": 2,
            "tokens_per_step": 600,
            "learning_rate": 1e-3,
            "held_out_fraction": 0.25,
            "evaluations": 1,
        },
    )
    assert dualign("stage1", recipe) == 0
    moved, plain = (run_folder(recipe, run) for run in ("tiny", "plain"))
    shutil.copytree(moved, plain)
    # So little cannot pay, which the exit code says; the policy is there.
    assert dualign("train", recipe, run="plain") in {0, TrainingDidNotPayError.exit_code}
    asked = ("--training.match_prediction", "true")
    assert dualign("train", recipe, *asked) in {0, TrainingDidNotPayError.exit_code}

    details = read_manifest(moved / "policy").details
    before, after, reference = (
        load_file(folder / "model.safetensors") for folder in (plain / "policy", moved / "policy", tmp_path / "policy")
    )
    parts = parts_of(before)
    assert list(details["part_factors"]) == (list(parts) if n_constraints == 2 else [])
    for part, weights in parts.items():
        factor = details["stretch"] * details["part_factors"].get(part, 1.0)
        for name in weights:
            expected = reference[name] + factor * (before[name] - reference[name])
            np.testing.assert_allclose(after[name], expected, atol=2e-6)
    card = (moved / "policy" / "README.md").read_text()
    assert ("and each part of the change by" in card) == (n_constraints == 2)
