"""An experiment's result on disk: Parquet for machines, Markdown for readers, a figure for both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from pipeline.contracts.artifacts import atomic_write_bytes
from pipeline.contracts.shards import write_parquet
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


def write_result(result: Result, folder: Path, *, origin: str, metadata: Mapping[str, str]) -> list[Path]:
    """Write ``<name>.parquet``, ``.md``, ``.png`` and ``.svg`` into a folder.

    Args:
        result: of the experiment.
        folder: where to.
        origin: one line that says of which recipe and seeds; the last one of the page.
        metadata: of the table.

    Returns:
        The paths, the table first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{result.name}.parquet"
    write_parquet(table, result.table, metadata=metadata)
    pictures = save_figure(result.figure, folder / result.name)
    page = folder / f"{result.name}.md"
    atomic_write_bytes(page, _markdown(result, origin).encode())
    return [table, page, *pictures]


def write_index(folder: Path, names: Iterable[str], *, origin: str) -> Path:
    """Write ``README.md``: the findings of every experiment that has a page in the folder, of this call or before.

    Of a page of another origin the findings are not repeated: numbers of two recipes must not stand together.
    """
    lines = ["# Experiments", "", origin, ""]
    for name in names:
        page = folder / f"{name}.md"
        if page.is_file():
            title, _, *rest = page.read_text(encoding="utf-8").splitlines()
            lines += [f"## [{title.removeprefix('# ')}]({name}.md)", ""]
            lines += rest[: rest.index("")] if rest[-1] == origin else [f"Made otherwise: {rest[-1]}"]
            lines.append("")
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


def _markdown(result: Result, origin: str) -> str:
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
        origin,
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
