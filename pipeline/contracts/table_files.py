"""Which files make up a table that was written elsewhere: one file, or a folder as its writer left it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from pipeline.contracts.errors import InputError

Format = Literal["parquet", "csv", "json"]

FORMATS: Mapping[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
SUFFIXES = ", ".join(FORMATS)

# What may hold rows that would be missed: tables of other formats, and packed or unfinished files.
_OTHER_TABLES = frozenset(
    f".{end}"
    for end in (
        *("arrow", "avro", "feather", "ipc", "orc", "tsv", "xls", "xlsx"),
        *("bz2", "gz", "lz4", "snappy", "xz", "zip", "zst"),
        *("crdownload", "part", "tmp"),
    )
)
# By these a writer says that not every file beside them is a part of the table.
_FOREIGN_LOGS = {
    "_delta_log": "a Delta Lake table, whose files also hold rows that were deleted",
    ".hoodie": "a Hudi table, whose files also hold rows that were replaced",
    "_temporary": "a table whose writer has not finished",
}
_ICEBERG = ".metadata.json"
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class TableFile:
    """One file of a table.

    Attributes:
        path: of the file.
        format: how it is read.
        partition: columns that the names of the folders above it give, and their values.
    """

    path: Path
    format: Format
    partition: Mapping[str, str | None]


@dataclass(frozen=True)
class FoundTable:
    """The files that make up a table.

    Attributes:
        files: in the order in which their rows count.
        left_out: names of what lies beside them and is not read.
    """

    files: tuple[TableFile, ...]
    left_out: tuple[str, ...]


def find_table(source: Path, *, what: str) -> FoundTable:
    """The files of a table that is one file, or a folder of files of one format.

    What begins with ``.`` or ``_`` is not data. Folders inside the folder belong to it, linked ones too, and
    ``key=value`` names of them are columns. A ``.json`` file beside files of another format is a note about them.

    Args:
        source: the file or folder.
        what: the setting or option that names it, for messages.

    Raises:
        InputError: there is nothing of the name, or a folder that cannot be read whole as one table.
    """
    if source.is_file():
        return FoundTable((TableFile(source, file_format(source, what=what), {}),), ())
    if not source.is_dir():
        raise InputError(f"{what} is {str(source)!r}; there is no such file or folder")
    paths, hidden = list_files(source, what=what)
    tables = {path: FORMATS[path.suffix.lower()] for path in paths if path.suffix.lower() in FORMATS}
    if set(tables.values()) - {"json"}:
        tables = {path: found for path, found in tables.items() if path.suffix.lower() != ".json"}
    others = [path for path in paths if path not in tables]
    for path in others:
        if {suffix.lower() for suffix in path.suffixes} & _OTHER_TABLES:
            raise InputError(f"{what} {source} holds {path.name}, which may be data and is not read; move it away")
    if not tables:
        shown = ", ".join(path.name for path in (*others, *hidden)[:3]) or "nothing"
        raise InputError(f"{what} {source} holds no table: names must end in one of {SUFFIXES}; found: {shown}")
    first = {found: path for path, found in reversed(tables.items())}
    if len(first) > 1:
        shown = " and ".join(sorted(path.name for path in first.values()))
        raise InputError(f"{what} {source} holds tables of several formats ({shown}); a table is of one")
    files = tuple(TableFile(path, found, _partition(path, source, what=what)) for path, found in tables.items())
    for file in files:
        if list(file.partition) != list(files[0].partition):
            raise InputError(
                f"{what} {source}: {file.path} lies in folders of {_keys(file)} and {files[0].path} in folders of "
                f"{_keys(files[0])}; the files of a table lie in folders of the same columns"
            )
    return FoundTable(files, tuple(sorted(str(path.relative_to(source)) for path in (*others, *hidden))))


def file_format(path: Path, *, what: str) -> Format:
    """Format of a file by the end of its name, in capitals or not.

    Raises:
        InputError: the name has another end.
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise InputError(f"{what} is {str(path)!r}; its name must end in one of {SUFFIXES}")
    return found


def list_files(source: Path, *, what: str) -> tuple[list[Path], list[Path]]:
    """The files of a folder and of the folders in it, linked ones too, in order; and hidden tables and folders.

    Raises:
        InputError: a folder cannot be read, a link leads nowhere or to what is there already, or a writer left word
            that not all of its files are data.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{what} {source}: {error.filename} cannot be read: {error.strerror}") from error

    paths: list[Path] = []
    hidden: list[Path] = []
    known: dict[str, Path] = {}
    for root, folders, names in os.walk(source, followlinks=True, onerror=refuse):
        here = Path(root)
        for name in (*folders, *names):
            if name in _FOREIGN_LOGS or name.endswith(_ICEBERG):
                kind = _FOREIGN_LOGS.get(name, "an Iceberg table, whose files also hold rows that were deleted")
                raise InputError(f"{what} {source} holds {name}: it is {kind}; write it out as plain files first")
        # A file may be linked to, and so may a folder: what is reached twice would count twice.
        for path in (here, *(here / name for name in names if not _is_hidden(name))):
            real = os.path.realpath(path)
            if real in known:
                raise InputError(f"{what} {source}: {path} and {known[real]} are the same; its rows would count twice")
            known[real] = path
            if not path.exists():
                raise InputError(f"{what} {source}: {path} is a link to nothing")
        paths.extend(here / name for name in names if not _is_hidden(name))
        hidden.extend(here / name for name in names if _is_hidden(name) and Path(name).suffix.lower() in FORMATS)
        hidden.extend(here / name for name in folders if _is_hidden(name))
        folders[:] = [name for name in folders if not _is_hidden(name)]
    return sorted(paths), hidden


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _partition(path: Path, source: Path, *, what: str) -> dict[str, str | None]:
    """Columns and values from ``key=value`` folders, percent signs resolved as Hive writes them."""
    found: dict[str, str | None] = {}
    for part in path.relative_to(source).parent.parts:
        key, equals, value = (unquote(text) for text in part.partition("="))
        if not (equals and key):
            continue
        if key in found:
            raise InputError(f"{what} {source}: {path} lies in two folders of the column {key!r}")
        found[key] = None if value == _NO_VALUE else value
    return found


def _keys(file: TableFile) -> str:
    return ", ".join(map(repr, file.partition)) or "no column"
