"""Checkpoints of a training run that can be trusted: sealed when they are whole, checked before they are continued."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.contracts.artifacts import file_sha256, read_json_object, write_json
from pipeline.contracts.errors import CorruptArtifactError

log = logging.getLogger("dualign")

_SEAL = "sealed.json"
_STATE = "trainer_state.json"


class SealCheckpoints(TrainerCallback):
    """Writes the sha256 of every file of a checkpoint into it, last: a checkpoint without its seal is not whole."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Seal the checkpoint that was just written."""
        PartialState().wait_for_everyone()  # each process writes its own random state
        if PartialState().is_main_process:
            _seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        return control


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint from which training can go on; damaged and half-written ones are removed, and named.

    A checkpoint needs the best one so far beside it, whose weights it does not have.

    Args:
        folder: of the checkpoints of one run.
    """
    whole: dict[str, Path] = {}
    for path in sorted(folder.glob("checkpoint-*"), key=_step):
        damage = _damage(path)
        if damage is None:
            whole[path.name] = path
        else:
            log.warning("train: the checkpoint %s is not used: %s", path, damage)
            shutil.rmtree(path)
    for path in sorted(whole.values(), key=_step, reverse=True):
        best = TrainerState.load_from_json(str(path / _STATE)).best_model_checkpoint
        if best is None or Path(best).name in whole:
            log.info("train: continues from step %d", _step(path))
            return path
        log.warning("train: the checkpoint %s is not used: the best one before it, %s, is gone", path, best)
        shutil.rmtree(path)
    return None


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _seal(path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != _SEAL)
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # the seal must not reach the disk before what it vouches for
    write_json(path / _SEAL, {str(file.relative_to(path)): file_sha256(file) for file in files})


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None where nothing is."""
    if not (path / _SEAL).is_file():
        return "it was not written to its end"
    try:
        sealed = read_json_object(path / _SEAL)
        for name, recorded in sealed.items():
            if file_sha256(path / name) != recorded:
                return f"{name} is not the file that was written"
    except CorruptArtifactError as error:
        return str(error)
    return None if _STATE in sealed else f"it has no {_STATE}"
