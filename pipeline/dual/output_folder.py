"""The folder that the results of a table go to: held by one process at a time, and never given to another problem."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.artifacts import differences, read_json_object, require_writable, run_lock
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.dual.table_sources import ScoreFiles, ScoreSource

UNFINISHED = ".scores-"
"""Begins the names of folders that are gone when the work is done."""

PROBLEM = "problem"
"""Key of ``dual.json``, and of the metadata of a ``frontier.parquet`` that has none beside it: what was asked."""

_IN_METADATA = f"dualign.{PROBLEM}".encode()

FILES = "files"
"""Key of ``dual.json``: the other files of its results, relative to the folder."""


def require_output(output: Path, source: ScoreSource) -> None:
    """Fail before the work where its results could not be written, or would be read as scores the next time.

    Raises:
        InputError: the folder cannot be written, or lies inside the folder of the table.
    """
    table = source.path if isinstance(source, ScoreFiles) else None
    if table is not None and table.is_dir() and output.resolve().is_relative_to(table.resolve()):
        raise InputError(
            f"the output folder {output} lies inside the table {table}: the results would be read as scores"
        )
    require_writable(output)


@contextmanager
def hold_output(output: Path, source: ScoreSource) -> Iterator[None]:
    """Hold an output folder for one process, and clear away what a killed one left unfinished.

    Raises:
        InputError: the folder cannot be written, or lies inside the folder of the table.
        RunLockedError: another process writes there.
    """
    require_output(output, source)
    with run_lock(output):
        for path in output.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path)
        try:
            yield
        finally:
            # While it is held: whoever locks a new file of that name comes after this work.
            (output / ".lock").unlink(missing_ok=True)


def require_same_problem(output: Path, problem: Callable[[], Mapping[str, Any]]) -> None:
    """Refuse a folder that holds the results of another problem, or results of which that cannot be told.

    Args:
        output: the folder.
        problem: gives what is asked now, JSON-serialisable, the table's identity among it; to find that out, its
            files are read.

    Raises:
        InputError: names the folder and what differs.
    """
    dual, frontier = output / "dual.json", output / "frontier.parquet"
    held = next((path for path in (dual, frontier) if os.path.lexists(path)), None)
    if held is None:
        return
    remedy = "choose another --output, or replace them with --force"
    found = _recorded(held)
    if found is None:
        raise InputError(
            f"{output} holds results, and {held.name} does not say of which problem (it is damaged, or of an older "
            f"version): {remedy}"
        )
    differing = list(differences(found, json.loads(json.dumps(problem()))))
    if differing:
        lines = "\n".join(f"  - {line}" for line in differing)
        raise InputError(f"{output} holds the results of another problem:\n{lines}\n{remedy}")


def drop_results(output: Path, *, except_for: Collection[str]) -> None:
    """Take away ``dual.json``, then the files of its results that no new ones of their names will replace.

    Args:
        output: the folder.
        except_for: names of files that will be replaced.
    """
    path = output / "dual.json"
    try:
        names = read_json_object(path).get(FILES, [])
    except CorruptArtifactError:
        names = []
    path.unlink(missing_ok=True)
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name not in except_for and _is_inside(name):
            (output / name).unlink(missing_ok=True)


def _is_inside(name: str) -> bool:
    """Whether a file's name is one of ours: in the folder, or in its folder of figures."""
    parts = Path(name).parts
    return ".." not in parts and (len(parts) == 1 or (len(parts) == 2 and parts[0] == "figures")) and "\0" not in name


def _recorded(path: Path) -> Any:
    try:
        if path.suffix == ".json":
            found = read_json_object(path)
            problem = found.get(PROBLEM)
            return {**problem, "table": found.get("inputs")} if isinstance(problem, dict) else None
        recorded = (pq.read_schema(path).metadata or {}).get(_IN_METADATA)
        return None if recorded is None else json.loads(recorded)
    except (CorruptArtifactError, OSError, ValueError, pa.ArrowException):
        return None
