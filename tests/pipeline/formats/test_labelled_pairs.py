"""Pairs: which are drawn, and what a policy that is trained on their labels comes to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.hand_offs import tabular_rows
from helpers.tabular_policies import build_tabular_world, minimise, total_variation
from torch.nn import functional

from pipeline.formats.export_format import ExportSettings
from pipeline.formats.labelled_pairs import draw_pairs
from pipeline.formats.trl_preference import build_preferences

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n_responses", [16, 7, 2, 1])
def test_pairs_are_distinct_and_any_first_ones_even(n_responses: int) -> None:
    pairs = list(draw_pairs(n_responses, np.random.default_rng(0)))

    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == n_responses * (n_responses - 1) // 2
    for count in range(1, len(pairs) + 1):
        met = np.bincount(np.array(pairs[:count]).reshape(-1), minlength=n_responses)
        assert met.max() - met.min() <= 1 + n_responses % 2


@pytest.mark.parametrize("dpo_beta", [1.0, 0.5])
def test_dpo_at_beta_one_has_the_tilted_policy_as_its_optimum(dpo_beta: float) -> None:
    world = build_tabular_world(n_prompts=3, n_responses=30, seed=0)
    settings = ExportSettings(pairs_per_prompt=10_000)
    rows = [
        (prompt, row)
        for prompt, responses in enumerate(tabular_rows(world))
        for row in build_preferences(responses, settings, np.random.default_rng(prompt))
    ]
    chosen, rejected = (
        torch.tensor([30 * prompt + row[f"{side}_index"] for prompt, row in rows]) for side in ("chosen", "rejected")
    )
    # The mean over the draws of a label: it would have been the other one with the complementary probability.
    probability = torch.tensor([row["label_probability"] for _, row in rows], dtype=torch.float64)

    def loss(table: torch.Tensor) -> torch.Tensor:
        log_ratio = (table - world.ref_logp).flatten()
        delta = dpo_beta * (log_ratio[chosen] - log_ratio[rejected])
        return functional.binary_cross_entropy_with_logits(delta, probability, reduction="sum")

    policy = minimise(loss, world.ref_logp)
    assert total_variation(policy, torch.softmax(world.ref_logp + world.score / dpo_beta, dim=1)) < 1e-3
    assert (total_variation(policy, world.tilted) < 1e-3) == (dpo_beta == 1.0)
