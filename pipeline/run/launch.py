"""Training on several processes: `dualign train` under ``accelerate launch``, which it starts itself where asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.loading import RECIPES
from pipeline.contracts.errors import InputError
from pipeline.contracts.section import nearest

_CONFIGS = RECIPES / "accelerate_configs"


def process_number() -> int:
    """Number of this process among those that a launcher started together; 0 without a launcher.

    Raises:
        InputError: the environment holds something else than a launcher sets.
    """
    number = _launched("RANK", default=0)
    if number >= _launched("WORLD_SIZE", default=1):
        raise InputError(
            f"the environment says RANK={number} of WORLD_SIZE={_launched('WORLD_SIZE', default=1)}; a launcher sets "
            "both, so that RANK is below WORLD_SIZE: unset what is left over"
        )
    return number


def require_one_process(steps: Sequence[str]) -> None:
    """Refuse to run other steps or commands than training on several processes: each would do all of the work.

    Raises:
        InputError: a launcher started several processes.
    """
    count = _launched("WORLD_SIZE", default=1)
    if count > 1 and tuple(steps) != ("train",):
        raise InputError(f"{count} processes were launched for {', '.join(steps)}; launch `dualign train` alone")


def _launched(name: str, *, default: int) -> int:
    """A number that a launcher sets; an empty variable is none."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise InputError(f"the environment says {name}={text!r}; a launcher sets a number: unset it")
    return int(text)


def find_accelerate_config(name: str) -> Path:
    """The file of a shipped configuration of accelerate, or the file itself.

    Raises:
        InputError: there is no such file.
    """
    for path in (Path(name), _CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = [path.stem for path in _CONFIGS.glob("*.yaml")]
    raise InputError(f"--accelerate-config {name!r}: there is no such file{nearest(name, known)}")


def launch_training(arguments: Sequence[str], *, accelerate_config: str, n_processes: int | None) -> int:
    """Run ``dualign train`` under ``accelerate launch``; returns its exit code.

    Args:
        arguments: of ``dualign train``.
        accelerate_config: name of a shipped configuration, or a file.
        n_processes: how many processes, if not as many as the configuration says.

    Raises:
        InputError: there is no such configuration, or the number of processes is below one.
    """
    path = find_accelerate_config(accelerate_config)
    if n_processes is not None and n_processes < 1:
        raise InputError(f"--processes {n_processes}: it must be at least 1")
    number = [] if n_processes is None else ["--num_processes", str(n_processes)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *number]
    return subprocess.run([*launcher, "--module", "pipeline", "train", *arguments], check=False).returncode
