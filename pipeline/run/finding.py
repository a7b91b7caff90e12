"""Finding a run by its name or folder, and how far it has come: for commands that read what others have made."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.contracts.artifacts import is_complete
from pipeline.contracts.errors import InputError
from pipeline.contracts.section import nearest

STEP_FOLDERS = {
    "prepare": "prompts",
    "sample": "samples",
    "score": "scores",
    "solve": "dual",
    "export": "tilted",
    "train": "policy",
    "evaluate": "evaluation",
    "report": "report",
}
"""The folder of each step within a run, in their order; ``scores`` has one folder a scorer."""


def find_run(name: str, *, data_dir: Path) -> Path:
    """The folder of a run.

    Args:
        name: of the run, or its folder, or that of other results.
        data_dir: holds ``runs/``.

    Raises:
        InputError: there is neither; names the nearest run.
    """
    runs = data_dir / "runs"
    for folder in (runs / name, Path(name)):
        if os.path.isdir(folder):  # noqa: PTH112  # of a name too long for a file, False
            return folder
    known = sorted(path.name for path in runs.glob("*") if path.is_dir()) if runs.is_dir() else []
    where = nearest(Path(name).name, known) if known else f"; {runs} has none (--data-dir names another place)"
    raise InputError(f"there is no run {name!r}{where}")


def finished_steps(folder: Path) -> list[str]:
    """The steps of a run that have finished, in their order."""
    return [step for step in STEP_FOLDERS if _is_finished(folder, step)]


def require_solved(folder: Path) -> None:
    """Refuse a folder that has no solution yet.

    Raises:
        InputError: it is no run, or its dual is not solved; names the steps that have finished and the next one.
    """
    fault = unsolved(folder)
    if fault is not None:
        raise InputError(fault)


def unsolved(folder: Path) -> str | None:
    """Why a folder has no solution, and what to do; None where it has one."""
    done = finished_steps(folder)
    if "solve" in done:
        return None
    name = folder.resolve().name
    if not done:
        return f"{folder} is not a run: no step of it has finished"
    following = next(step for step in STEP_FOLDERS if step not in done)
    return (
        f"run `{name}` is not solved yet: finished are {', '.join(done)}; the next step is `dualign {following} "
        f"--run {name}`, with its --config"
    )


def _is_finished(folder: Path, step: str) -> bool:
    place = folder / STEP_FOLDERS[step]
    if step == "score":  # a table for each scorer
        return place.is_dir() and any(is_complete(path) for path in place.iterdir() if path.is_dir())
    return is_complete(place)
