"""NeMo RL's formats, by what its readers require (PreferenceDataset, OpenAIFormatDataset and their processors)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from datasets import load_dataset
from helpers.hand_offs import read_lines, read_rows

pytestmark = pytest.mark.slow


def test_pairs_are_those_of_trl_in_ranks(exported: tuple[Path, pa.Table], tmp_path: Path) -> None:
    folder = exported[0]
    # As its loader reads a local file; preference_preprocessor takes two completions, the lower rank being preferred.
    rows = load_dataset(
        "json", data_files=str(folder / "nemo-rl/preference/train.jsonl"), cache_dir=str(tmp_path / "cache")
    )["train"]
    expected = read_rows(folder / "trl-preference")
    assert len(rows) == len(expected) > 0
    for row, pair in zip(rows, expected, strict=True):
        assert row["context"] == pair["prompt"]
        ranked = {one["rank"]: one["completion"] for one in row["completions"]}
        assert ranked == {0: pair["chosen"], 1: pair["rejected"]}


def test_lines_end_in_the_one_message_that_is_learnt(exported: tuple[Path, pa.Table]) -> None:
    folder = exported[0]
    rows = read_lines(folder / "nemo-rl/sft/train.jsonl")
    lines = read_lines(folder / "openai-jsonl/data/train.jsonl")
    for row, line in zip(rows, lines, strict=True):
        assert [turn["content"] for turn in row["messages"]] == [turn["content"] for turn in line["messages"]]
        # normalize_message_loss_mask: one binary integer a message, and only assistants' turns are learnt.
        assert len(row["message_loss_mask"]) == len(row["messages"])
        learnt = [turn for turn, mask in zip(row["messages"], row["message_loss_mask"], strict=True) if mask]
        assert learnt == row["messages"][-1:]
        assert learnt[0]["role"] == "assistant"
