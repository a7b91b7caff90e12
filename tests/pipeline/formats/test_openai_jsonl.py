"""Resampled lines against the weights they were resampled by."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.hand_offs import N_TRAIN, SETTINGS

pytestmark = pytest.mark.slow


def test_resampled_lines_come_as_often_as_the_weights_say(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    lines = [json.loads(line) for line in (folder / "openai-jsonl" / "data" / "train.jsonl").read_text().splitlines()]
    expected: dict[tuple[str, str], float] = {}
    for row in tilted.to_pylist():
        if row["split"] == "train":
            key = (json.dumps([turn["content"] for turn in row["prompt"]]), row["completion"])
            expected[key] = expected.get(key, 0.0) + SETTINGS.lines_per_prompt * row["weight"]
    found = dict.fromkeys(expected, 0)
    for line in lines:
        *prompt, answer = line["messages"]
        found[json.dumps([turn["content"] for turn in prompt]), answer["content"]] += 1
        assert all(turn.get("weight") == (0 if turn["role"] == "assistant" else None) for turn in prompt)
        assert answer.keys() == {"role", "content"}

    assert len(lines) == N_TRAIN * SETTINGS.lines_per_prompt
    # Systematic resampling: each response within one of its expectation; two responses may share their text.
    assert max(abs(found[key] - count) for key, count in expected.items()) < 2
