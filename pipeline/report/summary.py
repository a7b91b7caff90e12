"""What a result shows of itself in a terminal and a notebook: a table of at most 25 lines, and what it leaves out."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from html import escape

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipeline.report.terminal import render_view
from pipeline.report.views import Badge, Cell, Row, TableView, badge_lines, decimals, number, printable_view

MAX_LINES = 25
_WIDTH = 100
_NAME_WIDTH = 30
_FRONTIER_ROWS = 18


def text_summary(view: TableView) -> str:
    """The table as plain text, ASCII of our own, 100 columns wide."""
    return "\n".join(_lines(_shortened(view)))


def html_summary(view: TableView) -> str:
    """The table as HTML, for a notebook; a user's own names are escaped."""
    view = printable_view(_shortened(view))
    head = "".join(f"<th>{_html_cell(cell)}</th>" for cell in view.header)
    rows = "".join(f"<tr>{''.join(f'<td>{_html_cell(cell)}</td>' for cell in row.cells)}</tr>" for row in view.rows)
    facts = [(label, text) for label, text in view.facts] + [("warning", text) for text in view.warnings]
    below = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in facts)
    badges = "".join(f"<p><b>{escape(line)}</b></p>" for badge in view.badges for line in badge_lines(badge))
    answers = "".join(f"<p>{escape(answer)}</p>" for answer in view.answers)
    return (
        f"<div><p><b>{escape(view.title)}</b></p>"
        f"{badges}{answers}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<table><tbody>{below}</tbody></table></div>"
    )


def frontier_view(frontier: pa.Table) -> TableView:
    """Some rows of a frontier, evenly along each constraint's sweep.

    Args:
        frontier: the content of ``frontier.parquet``.
    """
    sweeps = list(dict.fromkeys(frontier["constraint"].to_pylist()))
    most = max(3, _FRONTIER_ROWS // len(sweeps))
    rows = []
    for name in sweeps:
        sweep = frontier.filter(pc.equal(frontier["constraint"], name))
        places = np.unique(np.linspace(0, sweep.num_rows - 1, min(most, sweep.num_rows)).round().astype(int))
        columns = ("threshold", "margin", f"multiplier_{name}", f"predicted_{name}", "reward", "kl", "ess_median")
        digits = {column: decimals(_known(sweep[column])) for column in columns}
        for row in sweep.take(pa.array(places)).to_pylist():
            numbers = (Cell(number(_finite(row[column]), digits[column])) for column in columns)
            rows.append(Row((Cell(name), *numbers, Cell("" if row["feasible"] else row["status"]))))
    feasible = sum(frontier["feasible"].to_pylist())
    shown = "" if len(rows) == frontier.num_rows else f"; {len(rows)} of them here"
    heads = ("constraint", "threshold", "margin", "lambda*", "predicted", "reward", "KL", "ESS", "")
    return TableView(
        title=f"Frontier: {frontier.num_rows} thresholds, {feasible} of them feasible{shown}",
        header=tuple(map(Cell, heads)),
        rows=tuple(rows),
    )


def _known(column: pa.ChunkedArray) -> list[float]:
    return [value for value in column.to_pylist() if _finite(value) is not None]


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _lines(view: TableView) -> list[str]:
    console = Console(
        width=_WIDTH, file=io.StringIO(), color_system=None, force_terminal=False, force_jupyter=False, highlight=False
    )
    with console.capture() as captured:
        console.print(render_view(view))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    while lines and not lines[0]:
        del lines[0]
    while lines and not lines[-1]:
        del lines[-1]
    return lines


def _shortened(view: TableView) -> TableView:
    """The view, or the first of its shorter versions that fits."""
    for shorter in _versions(view):
        if len(_lines(shorter)) <= MAX_LINES:
            return shorter
    raise AssertionError("a table of one row fits")


def _versions(view: TableView) -> Iterator[TableView]:
    """From everything to one row, always with a word on what is left out."""
    yield view
    others = len(view.warnings) - 1
    warnings = tuple(map(_cut, view.warnings[:1])) + ((f"{others} more warnings",) if others > 0 else ())
    view = replace(
        view,
        rows=tuple(replace(row, cells=(_short_name(row.cells[0]), *row.cells[1:])) for row in view.rows),
        badges=tuple(map(_one_line, view.badges)),
        answers=tuple(map(_cut, view.answers[:2]))
        + ((f"and {len(view.answers) - 2} more",) if len(view.answers) > 2 else ()),
        facts=tuple((label, _cut(text)) for label, text in view.facts),
        warnings=warnings,
    )
    yield view
    for kept in range(len(view.rows) - 1, 0, -1):
        left_out = Cell(f"and {len(view.rows) - kept} more rows")
        blank = (Cell(),) * (len(view.header) - 1)
        yield replace(view, rows=(*view.rows[:kept], Row((left_out, *blank))))


def _cut(text: str, width: int = _WIDTH - 20) -> str:
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def _one_line(badge: Badge) -> Badge:
    """The badge with as much of its reasons and advice as fits in a line."""
    whole = " ".join([*badge.reasons, *([f"Advice: {badge.advice}"] if badge.advice else [])])
    return replace(badge, reasons=(_cut(whole, _WIDTH - len(badge.label) - len(badge.verdict) - 4),), advice="")


def _short_name(cell: Cell) -> Cell:
    return replace(cell, value=_cut(cell.value, _NAME_WIDTH))


def _html_cell(cell: Cell) -> str:
    return escape(cell.value) + (f"<br><small>{escape(cell.detail)}</small>" if cell.detail else "")
