"""Checkpoints cut short, emptied, damaged or robbed of a file: training goes on from a whole one, and says so."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.train_settings import changed
from transformers import TrainerCallback

import stage2_policy.fit
from pipeline.contracts.errors import InputError
from stage2_policy.checkpointing import _seal, last_checkpoint
from stage2_policy.settings import TrainSettings
from stage2_policy.trainer import train_policy

pytestmark = pytest.mark.slow

SETTINGS = TrainSettings(
    objective="tilted_nll",
    learning_rate=1e-3,
    epochs=6,
    tokens_per_step=300,
    tokens_per_microbatch=160,
    responses_per_group=2,
    held_out_fraction=0.25,
    evaluations=5,
    patience=5,
)
SEED = 1


class Interrupt(TrainerCallback):
    """Stops the process's training after a step, as a kill would: nothing after it is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def log_of(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "training_log.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(stage_one: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("undisturbed")
    train_policy(**vars(stage_one), output=output, settings=SETTINGS, seed=SEED, show_progress=False)
    return output


@pytest.fixture(scope="module")
def interrupted(stage_one: Any, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed between two checkpoints, with at least two checkpoints behind it."""
    output = tmp_path_factory.mktemp("interrupted")
    steps = log_of(undisturbed)[-1]["step"]
    original = stage2_policy.fit.StopOnDivergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage2_policy.fit, "StopOnDivergence", lambda: Interrupt(int(steps) - 1))
        with pytest.raises(KeyboardInterrupt):
            train_policy(**vars(stage_one), output=output, settings=SETTINGS, seed=SEED, show_progress=False)
    assert stage2_policy.fit.StopOnDivergence is original
    assert len(list((output / "checkpoints").iterdir())) == 2
    assert (output / "mapped" / "sealed.json").is_file()
    return output


def newest(output: Path) -> Path:
    return max((output / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))


def empty(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(b"")


def flip(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "nothing": lambda checkpoint: None,
    "optimiser emptied": empty("optimizer.pt"),
    "optimiser gone": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "state emptied": empty("trainer_state.json"),
    "scheduler emptied": empty("scheduler.pt"),
    "random state gone": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "a bit of the weights flipped": flip,
    "seal missing": lambda checkpoint: (checkpoint / "sealed.json").unlink(),
    "seal emptied": empty("sealed.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_killed_run_with_a_damaged_checkpoint_ends_as_an_undisturbed_one(
    damage: str, stage_one: Any, undisturbed: Path, interrupted: Path, tmp_path: Path, caplog: Any
) -> None:
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    last = newest(output)
    DAMAGES[damage](last)
    with caplog.at_level(logging.INFO, logger="dualign"):
        train_policy(**vars(stage_one), output=output, settings=SETTINGS, seed=SEED, show_progress=False)

    assert ("is not used" in caplog.text and str(last) in caplog.text) == (damage != "nothing")
    assert log_of(output) == log_of(undisturbed)
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert {path.name for path in output.iterdir() if path.is_dir()} == set()


def test_the_mean_loss_is_that_of_all_steps(undisturbed: Path) -> None:
    log = log_of(undisturbed)
    losses = [entry["loss"] for entry in log if "loss" in entry]

    assert len(losses) == log[-1]["step"]  # so short a run logs every step
    assert log[-1]["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert not any("train_runtime" in entry for entry in log)


def test_equal_runs_leave_equal_files(stage_one: Any, undisturbed: Path, tmp_path: Path) -> None:
    train_policy(**vars(stage_one), output=tmp_path, settings=SETTINGS, seed=SEED, show_progress=False)
    names = {path.name for path in undisturbed.iterdir() if path.is_file()} - {"README.md"}

    assert {name for name in names if (tmp_path / name).read_bytes() != (undisturbed / name).read_bytes()} == set()


def test_a_checkpoint_whose_best_one_is_gone_is_not_continued(interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted / "checkpoints", tmp_path / "checkpoints")
    last = newest(tmp_path)
    state = json.loads((last / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = "checkpoints/checkpoint-1000"
    (last / "trainer_state.json").write_text(json.dumps(state))

    (last / "sealed.json").unlink()
    _seal(last)
    found = last_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found != last


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None


def test_a_full_disk_while_training_is_one_message(stage_one: Any, tmp_path: Path, monkeypatch: Any) -> None:
    class FullDisk(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise OSError(28, "No space left on device", "optimizer.pt")

    monkeypatch.setattr(stage2_policy.fit, "SealCheckpoints", FullDisk)
    with pytest.raises(InputError, match=r"optimizer\.pt cannot be written or read: No space left on device"):
        train_policy(
            **vars(stage_one), output=tmp_path, settings=changed(SETTINGS, epochs=1), seed=SEED, show_progress=False
        )
