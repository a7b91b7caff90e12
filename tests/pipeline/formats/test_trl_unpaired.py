"""Drawn labels of single responses, and what a policy that is trained on them comes to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.hand_offs import N_SAMPLES, read_rows, tabular_rows
from helpers.tabular_policies import TabularWorld, build_tabular_world, minimise, total_variation
from torch.nn import functional

from pipeline.formats.export_format import ExportSettings
from pipeline.formats.trl_unpaired import build_unpaired

pytestmark = pytest.mark.slow


def test_unpaired_labels_tell_the_tilted_policy_from_the_reference(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    ratio = {(row["prompt_id"], row["sample_index"]): N_SAMPLES * row["weight"] for row in tilted.to_pylist()}
    rows = read_rows(folder / "trl-unpaired")
    probability = np.array([ratio[row["prompt_id"], row["sample_index"]] for row in rows])
    probability = probability / (1 + probability)
    label = np.array([row["label"] for row in rows])

    np.testing.assert_allclose(
        [row["label_probability"] for row in rows], np.where(label, probability, 1 - probability)
    )
    assert abs(label.sum() - probability.sum()) < 4 * np.sqrt(np.sum(probability * (1 - probability)))


def test_the_logistic_loss_of_unpaired_labels_has_the_tilted_policy_as_its_optimum() -> None:
    world = build_tabular_world(n_prompts=3, n_responses=30, seed=0)
    uniform = torch.full_like(world.score, -np.log(30))  # so that each response stands for as many draws
    world = TabularWorld(ref_logp=uniform, score=world.score)
    rows = [
        row
        for prompt, responses in enumerate(tabular_rows(world))
        for row in build_unpaired(responses, ExportSettings(), np.random.default_rng(prompt))
    ]
    probability = torch.tensor(
        [row["label_probability"] if row["label"] else 1 - row["label_probability"] for row in rows],
        dtype=torch.float64,
    )

    def loss(table: torch.Tensor) -> torch.Tensor:
        return functional.binary_cross_entropy_with_logits(
            (table - world.ref_logp).flatten(), probability, reduction="sum"
        )

    assert total_variation(minimise(loss, world.ref_logp), world.tilted) < 1e-3
