"""Tables that users bring for their scorers: Parquet, CSV or JSON Lines, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.contracts.errors import InputError
from pipeline.contracts.table_files import TableFile, file_format
from pipeline.contracts.table_rows import TableRows


def open_table(path: Path, columns: Sequence[str] = (), *, setting: str) -> TableRows:
    """A table that is one file.

    Args:
        path: the file.
        columns: the columns it must have.
        setting: the setting that names it, for messages.

    Raises:
        InputError: no such file or column, or it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"`{setting}` is {str(path)!r}; there is no such file")
    table = TableRows(TableFile(path, file_format(path, what=f"`{setting}`"), {}), what=f"`{setting}`")
    missing = [column for column in columns if column not in table.names]
    if missing:
        raise InputError(f"`{setting}` {path} has no column {missing[0]!r}; its columns are {table.names}")
    return table
