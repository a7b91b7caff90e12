"""Weighted responses against the means of the tilted policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.hand_offs import N_TRAIN, read_rows

pytestmark = pytest.mark.slow


def test_weighted_rows_give_the_tilted_means(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    reward = {(row["prompt_id"], row["sample_index"]): row["reward"] for row in tilted.to_pylist()}
    rows = read_rows(folder / "weighted-sft")
    mean = sum(row["weight"] * reward[row["prompt_id"], row["sample_index"]] for row in rows) / N_TRAIN
    train = tilted.filter(pa.compute.equal(tilted["split"], "train"))

    assert mean == pytest.approx(np.sum(train["weight"].to_numpy() * train["reward"].to_numpy()) / N_TRAIN)
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
