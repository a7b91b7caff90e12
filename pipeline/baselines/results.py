"""An experiment's result on disk: Parquet for machines, Markdown for readers, a figure for both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from pipeline.contracts.artifacts import atomic_write_bytes
from pipeline.contracts.tables import with_metadata
from pipeline.report.style import save_figure

Rows = list[dict[str, Any]]
"""Rows of a table on their way into it."""


@dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
        name: of the experiment, and of its files.
        title: one line.
        table: every row.
        figure: the picture.
        findings: sentences with the numbers that matter, in order.
        summary: a small table for the Markdown page; the whole table where not given.
    """

    name: str
    title: str
    table: pa.Table
    figure: Figure
    findings: Sequence[str]
    summary: pa.Table | None = None


def write_result(result: Result, folder: Path, *, metadata: Mapping[str, str]) -> list[Path]:
    """Write ``<name>.parquet``, ``.md``, ``.png`` and ``.svg`` into a folder.

    Returns:
        The paths, the table first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{result.name}.parquet"
    schema = with_metadata(result.table.schema, metadata)
    pq.write_table(result.table.replace_schema_metadata(schema.metadata), table, compression="zstd")
    pictures = save_figure(result.figure, folder / result.name)
    page = folder / f"{result.name}.md"
    atomic_write_bytes(page, _markdown(result).encode())
    return [table, page, *pictures]


def write_index(folder: Path, names: Iterable[str]) -> Path:
    """Write ``README.md``: the findings of every experiment that has a page in the folder, of this call or before."""
    lines = ["# Experiments", ""]
    for name in names:
        page = folder / f"{name}.md"
        if page.is_file():
            title, _, *rest = page.read_text(encoding="utf-8").splitlines()
            lines += [f"## [{title.removeprefix('# ')}]({name}.md)", "", *rest[: rest.index("")], ""]
    path = folder / "README.md"
    atomic_write_bytes(path, "\n".join(lines).encode())
    return path


def methods(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The methods that rows are of, in the order of their first."""
    return list(dict.fromkeys(row["method"] for row in rows))


def markdown_table(table: pa.Table) -> list[str]:
    """The lines of a Markdown table; numbers with three significant digits after the point at most."""
    lines = [f"| {' | '.join(table.column_names)} |", "|---" * table.num_columns + "|"]
    lines += [f"| {' | '.join(_cell(value) for value in row.values())} |" for row in table.to_pylist()]
    return lines


def _markdown(result: Result) -> str:
    shown = result.table if result.summary is None else result.summary
    lines = [
        f"# {result.title}",
        "",
        *(f"- {finding}" for finding in result.findings),
        "",
        f"![{result.title}]({result.name}.png)",
        "",
        *markdown_table(shown),
        "",
        f"All rows: `{result.name}.parquet`.",
        "",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return str(value).replace("|", "\\|")
