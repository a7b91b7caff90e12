"""Resampled lines against the weights they were resampled by."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from helpers.hand_offs import N_TRAIN, SETTINGS
from helpers.tiny_models import save_tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_sft_trainer_of_trl_learns_the_last_message_alone(exported: tuple[Path, pa.Table], tmp_path: Path) -> None:
    """As the card splits the rows."""
    from trl import SFTConfig, SFTTrainer

    reference = save_tiny_policy(tmp_path / "reference", bos="template")
    tokenizer = AutoTokenizer.from_pretrained(reference)
    rows = load_dataset(str(exported[0] / "openai-jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            assistant_only_loss=False,
            completion_only_loss=True,
            max_length=None,
            bf16=False,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=rows.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
        ),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == len(rows)
    for read, row in zip(trainer.train_dataset, rows, strict=True):
        learnt = tokenizer.decode([token for token in read["labels"] if token != -100])
        assert learnt == row["messages"][-1]["content"] + "<eos>"
