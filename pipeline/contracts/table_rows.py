"""How the rows of a table that was written elsewhere are read: one way for each format, for all who read them.

- CSV is RFC 4180 in UTF-8: with or without a byte order mark, any line ends, line breaks inside quotes, fields of any
  length. Its fields are texts, and who wants a number asks for one (:func:`number_in`): ``007`` and ``2024-01-01``
  stay what they are, and a column is of one kind from its first row to its last.
- JSON Lines is one object a line; a file may also be one array of objects.
- Parquet holds its own types. Nothing is guessed from the folders it lies in, but for those a table's folder holds.

CSV and JSON are held in memory.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.errors import InputError
from pipeline.contracts.table_files import TableFile

# How files of text spell a number that is not there.
_MISSING = frozenset(("", "NA", "N/A", "#N/A", "null", "NULL", "None"))


class TableRows:
    """The columns and rows of one file.

    Args:
        file: the file.
        what: the setting or option that names it, for messages.

    Raises:
        InputError: it cannot be read, is malformed, or has two columns of one name.
    """

    def __init__(self, file: TableFile, *, what: str) -> None:
        self._file = file
        self._place = f"{what} {file.path}"
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise InputError(f"{self._place} has the column {repeated[0]!r} twice")
        twice = [name for name in self.names if name in file.partition]
        if twice:
            raise InputError(f"{self._place} has the column {twice[0]!r}, and so has the name of its folder")

    @property
    def is_text(self) -> bool:
        """Whether every value is a text, as in CSV."""
        return self._file.format == "csv"

    @cached_property
    def schema(self) -> pa.Schema | None:
        """Types of the columns, where the file says them."""
        if self._file.format != "parquet":
            return None
        with self._faults_named(), pq.ParquetFile(self._file.path) as file:
            return file.schema_arrow

    @cached_property
    def names(self) -> list[str]:
        """Names of the columns in the file."""
        return list(self._columns) if self.schema is None else list(self.schema.names)

    @cached_property
    def n_rows(self) -> int:
        """Rows in the file."""
        if self.schema is None:
            return len(next(iter(self._columns.values()), ()))
        with self._faults_named():
            return int(pq.read_metadata(self._file.path).num_rows)

    def column(self, name: str) -> list[Any]:
        """The values of a column, in the order of the rows.

        Raises:
            InputError: the file cannot be read.
        """
        return [row[name] for row in self.rows([name])]

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows, each with these columns.

        Raises:
            InputError: the file cannot be read.
        """
        wanted = list(dict.fromkeys(columns))
        if self.schema is None:
            lists = [self._columns[name] for name in wanted]
            yield from (dict(zip(wanted, values, strict=True)) for values in zip(*lists, strict=True))
            return
        with self._faults_named(), pq.ParquetFile(self._file.path) as file:
            for batch in file.iter_batches(columns=wanted):
                yield from batch.select(wanted).to_pylist()

    @cached_property
    def _columns(self) -> Mapping[str, list[Any]]:
        with self._faults_named():
            return read_csv(self._file.path) if self._file.format == "csv" else read_json_lines(self._file.path)

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise InputError(f"{self._place} cannot be read: a text in it is not UTF-8 ({error})") from error
        except InputError as error:
            raise InputError(f"{self._place} cannot be read: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self._place} cannot be read: {error}") from error


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a line of names, as texts; empty lines are none.

    Raises:
        InputError: not UTF-8, two columns of one name, quotes that do not close, or a row with more or fewer fields
            than the first line; names the line.
    """
    # The module's own limit on a field, 128 KiB, is one for the process.
    csv.field_size_limit(sys.maxsize)
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            for row in reader:
                if row and rows and len(row) != len(rows[0]):
                    raise InputError(
                        f"line {reader.line_num} ends a row of {len(row)} fields; the first line has {len(rows[0])}"
                    )
                if row:
                    rows.append(row)
        except csv.Error as error:
            raise InputError(f"line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error
    names = rows[0] if rows else []
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"the column {repeated[0]!r} is there twice")
    columns = list(zip(*rows[1:], strict=True)) or [()] * len(names)
    return {name: list(column) for name, column in zip(names, columns, strict=True)}


def read_json_lines(path: Path) -> dict[str, list[Any]]:
    """The columns of a file with one JSON object a line, or of one array of objects; what an object lacks is None.

    Raises:
        InputError: not UTF-8, not JSON, nested too deeply, or something else than objects; names the line.
    """
    objects: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8-sig") as stream:
            start = stream.read(1)
            while start.isspace():
                start = stream.read(1)
            stream.seek(0)
            if start == "[":
                found = _parse(stream.read(), "the array")
                objects.extend(_object(one, f"item {place}") for place, one in enumerate(found))
            else:
                objects.extend(
                    _object(_parse(line, f"line {number}"), f"line {number}")
                    for number, line in enumerate(stream, 1)
                    if not line.isspace()
                )
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    names = dict.fromkeys(name for one in objects for name in one)
    return {name: [one.get(name) for one in objects] for name in names}


def number_in(text: str, *, place: str) -> float | None:
    """The number a field of a CSV file holds; None where it is empty or says that there is none.

    Raises:
        InputError: it holds something else.
    """
    text = text.strip()
    if text in _MISSING:
        return None
    try:
        if "_" in text:  # which Python would take for a thousands separator
            raise ValueError
        return float(text)
    except ValueError:
        raise InputError(f"{place} is {text[:60]!r}, which is not a number") from None


def integer_in(text: str, *, place: str) -> int | None:
    """The whole number a field of a CSV file holds; None where it is empty or says that there is none.

    Raises:
        InputError: it holds something else.
    """
    number = number_in(text, place=place)
    if number is None:
        return None
    if not (math.isfinite(number) and number == math.floor(number) and abs(number) < 2**53):
        raise InputError(f"{place} is {text[:60]!r}, which is not a whole number")
    return int(number)


def _parse(text: str, place: str) -> Any:
    try:
        found = json.loads(text, object_pairs_hook=_distinct)
        if "\\ud" in text.lower():
            # Half of a surrogate pair is JSON, but no text that could be written again.
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{place} is nested too deeply") from None
    except UnicodeEncodeError:
        raise InputError(f"{place} holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise InputError(f"{place} is not JSON: {error}") from error
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{place} holds {str(value)[:60]!r}; it must be an object with the columns as its keys")
    return value


def _not_utf8(path: Path) -> InputError:
    """Says where the first byte lies that is not UTF-8."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                other = " (it looks like UTF-16)" if number == 1 and line[:2] in {b"\xff\xfe", b"\xfe\xff"} else ""
                return InputError(
                    f"line {number} is not UTF-8: byte {error.start + 1} of it is 0x{line[error.start]:02x}{other}; "
                    "write the file as UTF-8"
                )
    return InputError("it is not UTF-8")
