"""``dualign validate FOLDER`` of a hand-off: what one folder of ``exports/`` says of itself, on anybody's machine.

Reads files only: no model, no torch, no network, and nothing that the folder brings is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.contracts.artifacts import (
    MANIFEST,
    Manifest,
    artifact_faults,
    file_sha256,
    is_complete,
    read_json_object,
    read_manifest,
)
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.shards import read_parquet
from pipeline.contracts.solution import Solution, read_solution
from pipeline.contracts.tables import SPLITS
from pipeline.formats.all_formats import FORMATS
from pipeline.formats.croissant import CROISSANT
from pipeline.formats.export_format import CARD, SOLUTION, ExportFormat, Part, Row
from pipeline.steps.validation import Check, Link, Validation

_LINES_AT_ONCE = 1000
_OWN_FILES = ("settings.json", MANIFEST, CARD, CROISSANT)


def is_hand_off(folder: Path) -> bool:
    """Whether a folder is a hand-off and no run: its manifest is that of an export to a format."""
    if not is_complete(folder):
        return False
    try:
        return _format_name(read_manifest(folder)) is not None
    except CorruptArtifactError:
        return (folder / SOLUTION).exists() and not (folder / "prompts").exists()


def validate_hand_off(folder: Path, *, show_progress: bool = False) -> Validation:
    """Check hashes, the solution, the rows against what they were drawn by, and the files beside them.

    Args:
        folder: of the hand-off.
        show_progress: whether to show a progress bar.

    Raises:
        CorruptArtifactError: the manifest is damaged.
        InputError: it is of a format that this release does not know.
    """
    manifest = read_manifest(folder)
    name = _format_name(manifest)
    if name not in FORMATS:
        raise InputError(
            f"{folder / MANIFEST}: `settings.format` is {name!r}; this release knows {', '.join(FORMATS)}"
        )
    kind = FORMATS[name]
    found = Validation()
    found.chain.append(Link(name, manifest.identity, manifest.run, manifest.counts, tuple(manifest.inputs)))
    checks: list[Check] = [
        ("files", lambda: _check_files(folder, manifest)),
        (SOLUTION, lambda: _check_solution(folder, manifest, kind)),
        (CROISSANT, lambda: _check_croissant(folder, manifest)),
        *(
            (part.pattern(split), lambda part=part, split=split: _check_rows(folder, manifest, part, split))
            for part in kind.parts
            for split in SPLITS
        ),
        ("splits", lambda: _check_splits(folder, kind)),
    ]
    found.perform(
        checks,
        unreadable=lambda what: f"{folder / what} cannot be checked, as it holds what no export writes",
        show_progress=show_progress,
    )
    return found


def _format_name(manifest: Manifest) -> str | None:
    name = manifest.settings.get("format") if manifest.step == "export" else None
    return name if isinstance(name, str) else None


def _check_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    yield from artifact_faults(folder, manifest)
    if SOLUTION not in manifest.files:
        yield (
            f"{folder} is not complete by itself: it has no {SOLUTION}. An earlier release made it; remove it and "
            "export it again"
        )
    documents = manifest.details.get("documents")
    for name in (CARD, CROISSANT):
        recorded = documents.get(name) if isinstance(documents, dict) else None
        if recorded is None:
            yield f"{folder / MANIFEST}: `details.documents` does not record {name}"
        elif file_sha256(folder / name) != recorded:
            yield f"{folder / name} is not the file that {folder / MANIFEST} records (sha256 differs)"
    if not isinstance(manifest.details.get("command"), str):
        yield f"{folder / MANIFEST}: `details.command` is missing; it must say what made the folder"
    known = {*manifest.files, *_OWN_FILES}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in known and path.suffix in {".parquet", ".jsonl"}:
            yield f"{path} is not in the manifest"


def _check_solution(folder: Path, manifest: Manifest, kind: ExportFormat) -> Iterator[str]:
    if SOLUTION in manifest.files:
        yield from kind.check(folder, _solution(folder))


def _solution(folder: Path) -> Solution:
    return read_solution(folder / SOLUTION)


def _check_croissant(folder: Path, manifest: Manifest) -> Iterator[str]:
    document = read_json_object(folder / CROISSANT)
    listed = {
        str(one["contentUrl"]): one.get("sha256")
        for one in document.get("distribution", [])
        if isinstance(one, dict) and one.get("@type") == "cr:FileObject"
    }
    for name, recorded in manifest.files.items():
        if listed.get(name) != recorded:
            yield f"{folder / CROISSANT} has another sha256 of {name} than the manifest"
    for name in sorted(listed.keys() - manifest.files.keys()):
        yield f"{folder / CROISSANT} names {name}, which the manifest does not"


def _check_rows(folder: Path, manifest: Manifest, part: Part, split: str) -> Iterator[str]:
    count = 0

    def counted() -> Iterator[Row]:
        nonlocal count
        for row in _read_rows(folder, part, split):
            count += 1
            yield row

    where = folder / part.pattern(split)
    for fault in part.check(counted()):
        yield f"{where}: {fault}"
    if manifest.count(part.count(split)) != count:
        yield f"{where}: {count} rows, {manifest.count(part.count(split))} in the manifest"


def _check_splits(folder: Path, kind: ExportFormat) -> Iterator[str]:
    """No prompt is trained on that is kept to judge, where the rows say whose they are."""
    for part in kind.parts:
        if "prompt_id" not in part.schema.names:
            continue
        train, test = ({row["prompt_id"] for row in _read_rows(folder, part, split)} for split in SPLITS)
        if train & test:
            n_both, first = len(train & test), min(train & test)
            yield f"{folder}: {n_both} prompts of {part.name} are in both splits (first: {first})"


def _read_rows(folder: Path, part: Part, split: str) -> Iterator[Row]:
    if not part.lines:
        for path in sorted(folder.glob(part.pattern(split))):
            yield from read_parquet(path, schema=part.schema).to_pylist()
        return
    path = folder / part.path(split)
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        rows = (_read_line(path, number, line, part.schema) for number, line in enumerate(stream, start=1))
        first = 1
        while batch := list(islice(rows, _LINES_AT_ONCE)):
            try:
                pa.Table.from_pylist(batch, schema=part.schema)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                last = first + len(batch) - 1
                what = f"a line of {first} to {last} does not fit its columns"
                raise CorruptArtifactError(f"{path} is damaged: {what} ({error})") from error
            first += len(batch)
            yield from batch


def _read_line(path: Path, number: int, line: str, schema: pa.Schema) -> Row:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{path} is damaged: line {number} is not JSON ({error})") from error
    if not isinstance(row, dict) or set(row) != set(schema.names):
        what = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise CorruptArtifactError(f"{path} is damaged: line {number} has {what}, expected {sorted(schema.names)}")
    return row
