"""What `--redo` replaces is put aside until its successor is complete, and only what steps write is ever removed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from pipeline.contracts.artifacts import MANIFEST, is_complete, read_manifest
from pipeline.contracts.errors import CorruptArtifactError, InputError

log = logging.getLogger("dualign")

ASIDE = "replaced"
"""Folder of a run that holds what was put aside, by the names it had in the run."""

_WRITTEN = (
    "manifest.json",
    "settings.json",
    "failures.json",
    "looks.json",
    "info.parquet",
    "prompt_info.parquet",
    "repeats.parquet",
    "README.md",
    "provenance.json",
    "config.yaml",
    "measured.json",
    "trajectory.parquet",
    "trajectory.*",
    "training_log.json",
    "dual.json",
    "frontier.parquet",
    "evaluation.json",
    "report.html",
    "figures/*.png",
    "figures/*.svg",
    "figures/*.pdf",
    "data/train-*-of-*.parquet",
    "data/test-*-of-*.parquet",
    "data/train.jsonl",
    "data/test.jsonl",
    "parts/train-*",
    "parts/test-*",
    "checkpoints/*",
    "mapped/sealed.json",
    "mapped/*.arrow",
    "adapter/*",
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    ".*.??????*",
    ".lock*",
)
"""What steps write besides the files that manifests list, by the ends of their paths: a step that was killed has no
manifest yet, or a card that its manifest leaves out."""


def put_aside(run_folder: Path, names: Iterable[str]) -> None:
    """Move finished artifacts of a run out of the way of their successors, and remove unfinished ones.

    What is aside already stays there if what would follow it is not finished.

    Args:
        run_folder: of the run.
        names: of the artifacts' folders within the run.
    """
    for name in names:
        folder, aside = run_folder / name, run_folder / ASIDE / name
        if not folder.is_dir():
            continue
        if not _holds_finished_work(folder):
            remove_written(folder)
            log.info("%s: not finished, removed to be done anew", name)
            continue
        if aside.exists():
            remove_written(aside)
        if aside.exists():  # a stranger's files are in it
            raise InputError(f"{aside} holds files that no step wrote; move them away")
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.replace(aside)
        log.info("%s: put aside in %s until its successor is complete", name, aside)


def drop_replaced(run_folder: Path, names: Iterable[str]) -> None:
    """Remove what was put aside, its successors being complete."""
    for name in names:
        if (run_folder / ASIDE / name).is_dir():
            remove_written(run_folder / ASIDE / name)
    for folder in sorted((run_folder / ASIDE).rglob("*"), reverse=True):
        _remove_if_empty(folder)
    _remove_if_empty(run_folder / ASIDE)


def remove_written(folder: Path) -> None:
    """Remove what steps wrote into a folder, and the folder with it unless a stranger's files are left."""
    listed = _listed(folder)
    # Manifests go first: what is no longer whole must not look so.
    paths = sorted(folder.rglob("*"), key=lambda path: (path.name != MANIFEST, -len(path.parts)))
    for path in paths:
        if path.is_symlink() or (path.is_file() and (path in listed or _is_written(path.relative_to(folder)))):
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        _remove_if_empty(path)
    _remove_if_empty(folder)
    left = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    if left:
        log.warning("%s: %d files that no step wrote are left there, such as %s", folder, len(left), left[0].name)


def clear_tables(folder: Path) -> None:
    """Remove the tables of a step's folder before they are written anew.

    Raises:
        InputError: the folder is a link, or has files among its tables that no step wrote: readers of the folder would
            read them too.
    """
    if folder.is_symlink():
        raise InputError(f"{folder} is a link to {folder.resolve()}; a step writes into folders of its own run only")
    for name in ("data", "parts"):
        table = folder / name
        if table.is_symlink():
            raise InputError(f"{table} is a link to {table.resolve()}; a step writes into folders of its own run only")
        for path in sorted(table.iterdir()) if table.is_dir() else ():
            if path.is_dir() or not _is_written(path.relative_to(folder)):
                raise InputError(
                    f"{path} was not written by a step, and would be read as part of {table}; move it away"
                )
        for path in sorted(table.iterdir()) if table.is_dir() else ():
            path.unlink()
        _remove_if_empty(table)


def _holds_finished_work(folder: Path) -> bool:
    return is_complete(folder) or any(folder.glob(f"*/{MANIFEST}"))


def _listed(folder: Path) -> set[Path]:
    """The files that the manifests in a folder list."""
    found: set[Path] = set()
    for path in folder.rglob(MANIFEST):
        try:
            found.update(path.parent / name for name in read_manifest(path.parent).files)
        except CorruptArtifactError:  # then what it would list is known by its name alone
            continue
    return found


def _is_written(path: Path) -> bool:
    if "checkpoints" in path.parts[:-1]:
        return True
    tails = {"/".join(path.parts[-n:]) for n in (1, 2)}
    return any(fnmatch(tail, pattern) for tail in tails for pattern in _WRITTEN)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
