"""Preference pairs against the tilt they were drawn by, and read by TRL's own trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from helpers.hand_offs import N_TRAIN, SETTINGS, read_rows, write_tilted
from helpers.tiny_models import save_tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.formats.writing import write_exports
from pipeline.run.run import Run

pytestmark = pytest.mark.slow


def test_labels_follow_bradley_terry_in_nats(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    weight = {(row["prompt_id"], row["sample_index"]): row["weight"] for row in tilted.to_pylist()}
    rows = read_rows(folder / "trl-preference")
    for row in rows:
        odds = weight[row["prompt_id"], row["chosen_index"]] / weight[row["prompt_id"], row["rejected_index"]]
        assert row["chosen_score"] - row["rejected_score"] == pytest.approx(np.log(odds), abs=1e-9)
        assert row["label_probability"] == pytest.approx(odds / (1 + odds), abs=1e-9)
        assert row["chosen"] != row["rejected"]

    # The better of a pair is chosen as often as the probabilities say.
    better = np.array([max(row["label_probability"], 1 - row["label_probability"]) for row in rows])
    won = np.array([row["label_probability"] > 0.5 for row in rows])
    assert len(rows) == N_TRAIN * SETTINGS.pairs_per_prompt
    assert abs(won.sum() - better.sum()) < 4 * np.sqrt(np.sum(better * (1 - better)))
    assert 0 < won.sum() < len(won)


PREFILLING = (
    "<bos>{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>[think]\n{% endif %}\n"
)


def test_dpo_trainer_of_trl_keeps_a_prefilled_text_in_the_prompt(run: Run, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    reference = run.data_dir / "policy"
    tokenizer = AutoTokenizer.from_pretrained(reference)
    tokenizer.chat_template = PREFILLING
    tokenizer.save_pretrained(reference)
    completions = ["so so[/think] call a friend", "walk", "rest"]
    write_tilted(run, completions=completions)
    write_exports(run, ["trl-preference"], SETTINGS)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=DPOConfig(output_dir=str(tmp_path / "out"), beta=1.0, bf16=False, report_to="none", use_cpu=True),
        train_dataset=load_dataset(
            str(run.folder / "exports" / "trl-preference"), split="train", cache_dir=str(tmp_path / "cache")
        ),
        processing_class=AutoTokenizer.from_pretrained(reference),
    )
    rows = trainer.train_dataset
    assert len(rows) > 0
    for row in rows:
        assert tokenizer.decode(row["prompt_ids"]).endswith("<assistant>[think]\n")
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            assert tokenizer.decode(answer) in {f"{text}<eos>" for text in completions}


def test_dpo_trainer_of_trl_learns_from_the_preferences(exported: tuple[Path, pa.Table], tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    reference = save_tiny_policy(tmp_path / "reference", bos="template")
    config = DPOConfig(
        output_dir=str(tmp_path / "out"),
        beta=1.0,
        learning_rate=2e-4,
        max_steps=30,
        per_device_train_batch_size=64,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    dataset = load_dataset(str(exported[0] / "trl-preference"), split="train", cache_dir=str(tmp_path / "cache"))
    torch.set_num_threads(1)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(reference),
    )
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)
    assert np.mean(losses[-5:]) < losses[0] - 0.03
