"""Weighted responses against the means of the tilted policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.hand_offs import N_TRAIN, read_rows

from pipeline.formats.all_formats import FORMATS

pytestmark = pytest.mark.slow


def test_weighted_rows_give_the_tilted_means(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    reward = {(row["prompt_id"], row["sample_index"]): row["reward"] for row in tilted.to_pylist()}
    rows = read_rows(folder / "weighted-sft")
    mean = sum(row["weight"] * reward[row["prompt_id"], row["sample_index"]] for row in rows) / N_TRAIN
    train = tilted.filter(pa.compute.equal(tilted["split"], "train"))

    assert mean == pytest.approx(np.sum(train["weight"].to_numpy() * train["reward"].to_numpy()) / N_TRAIN)
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


def test_the_loss_of_the_card_weights_the_answer_alone() -> None:
    """The code that the card gives, on logits by hand."""
    code = FORMATS["weighted-sft"].usage.split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {"Trainer": object}
    exec(code, namespace)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 4, 5), generator=generator)
    labels = torch.tensor([[-100, -100, 3, 1], [-100, 2, 4, -100]])
    weight = torch.tensor([0.25, 0.75])
    found = namespace["WeightedTrainer"]().compute_loss(
        lambda **inputs: SimpleNamespace(logits=logits), {"weight": weight, "labels": labels, "input_ids": labels}
    )
    logp = logits.log_softmax(-1)
    expected = -(0.25 * (logp[0, 1, 3] + logp[0, 2, 1]) + 0.75 * (logp[1, 0, 2] + logp[1, 1, 4]))
    assert found == pytest.approx(float(expected), abs=1e-6)
