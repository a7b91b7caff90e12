"""How a step begins, is recognised as done, and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.contracts.artifacts import (
    MANIFEST,
    Manifest,
    begin_step,
    environment,
    is_complete,
    read_manifest,
    write_json,
    write_manifest,
)
from pipeline.contracts.errors import InputError
from pipeline.run.replaced import clear_tables

log = logging.getLogger("dualign")


def remedy(step: str) -> str:
    """How to redo a step, for messages."""
    stage = {"train": "stage2", "evaluate": "stage2", "report": "stage2", "multishot": None}.get(step, "stage1")
    with_make = "" if stage is None else f", or `make {stage} REDO_FROM={step}`"
    return (
        "Go back to the settings it was made with, choose another --run name, or redo it and all after it: "
        f"`dualign {step} --redo` with the same --config and --run{with_make}."
    )


def derived_step_is_current(
    folder: Path, *, step: str, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> bool:
    """Begin a step that costs seconds; True where its result still stands.

    Other settings are refused like anywhere else; other *inputs* only mean that an earlier step was extended or
    redone, and the result is derived again.

    Raises:
        StaleArtifactError: the step was made with other settings.
        InputError: the folder is a link, or has files among its tables that no step wrote.
    """
    # Several runs may share a finished artifact by a link; what a link leads to is not theirs to make.
    if folder.is_symlink() and not is_complete(folder):
        raise InputError(f"{folder} is a link to {folder.resolve()}; a step writes into folders of its own run only")
    begin_step(folder, settings=settings, inputs={}, remedy=remedy(step))
    if is_complete(folder):
        found = read_manifest(folder)
        if dict(found.inputs) == dict(inputs) and has_all_files(folder, found):
            log.info("%s: done before, kept", step)
            return True
    clear_tables(folder)
    reopen(folder)
    return False


def reopen(folder: Path) -> None:
    """Make a finished step unfinished, before anything in it changes."""
    (folder / MANIFEST).unlink(missing_ok=True)


def finish_step(
    run_name: str,
    folder: Path,
    step: str,
    *,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    files: Mapping[str, str],
    started: float,
    counts: Mapping[str, int] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write the manifest: from here on the step is complete."""
    write_manifest(
        folder,
        Manifest(
            step=step,
            run=run_name,
            settings=settings,
            inputs=inputs,
            files=files,
            counts=counts or {},
            details=details or {},
            environment=environment(),
            wall_seconds=time.monotonic() - started,
        ),
    )


def has_all_files(folder: Path, manifest: Manifest) -> bool:
    """Whether the files of a finished table are there: a damaged one is mended by deleting it and running again."""
    return all((folder / name).is_file() for name in manifest.files)


def record_failures(folder: Path, failures: Sequence[Mapping[str, object]]) -> None:
    """Write the rows that failed and why, or remove the list of an earlier call if none did."""
    path = folder / "failures.json"
    if failures:
        write_json(path, list(failures))
    else:
        path.unlink(missing_ok=True)
