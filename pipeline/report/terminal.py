"""The table at the end of each stage, for a terminal or a pipe of 80 columns or more.

Only ASCII of our own, so that it prints wherever the user's own names do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipeline.report.views import Cell, TableView, Tone, stage1_view, stage2_view

_STYLES: Mapping[Tone, str] = {"good": "bold green", "doubtful": "bold yellow", "bad": "bold red", "neutral": "bold"}

_VERDICT_WIDTH = max(map(len, ("satisfied", "undecided", "violated", "binding", "inactive")))


def stage1_table(dual: Mapping[str, Any]) -> Group:
    """What a person reads when stage 1 ends.

    Args:
        dual: the content of ``dual/dual.json``.

    Returns:
        A renderable for :class:`rich.console.Console`.
    """
    return render_view(stage1_view(dual))


def stage2_table(evaluation: Mapping[str, Any], dual: Mapping[str, Any]) -> Group:
    """What a person reads when stage 2 ends.

    Args:
        evaluation: the content of ``evaluation/evaluation.json``.
        dual: the content of ``dual/dual.json`` the policy was trained from.

    Returns:
        A renderable for :class:`rich.console.Console`.
    """
    return render_view(stage2_view(evaluation, dual))


def print_stage1(dual: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print :func:`stage1_table`, by default to standard output."""
    (console or Console()).print(stage1_table(dual))


def print_stage2(evaluation: Mapping[str, Any], dual: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print :func:`stage2_table`, by default to standard output."""
    (console or Console()).print(stage2_table(evaluation, dual))


def render_view(view: TableView) -> Group:
    """A renderable of any table of results, for :class:`rich.console.Console`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="")
    for place, head in enumerate(view.header):
        first = place == 0
        table.add_column(
            _stack(head, style="bold"),
            justify="left" if place <= 1 else "right",
            no_wrap=not first,
            min_width=_VERDICT_WIDTH if first else None,
            overflow="fold",
        )
    for row in view.rows:
        name, *values = row.cells
        cells = [_stack(name, style="bold", detail_style=_STYLES[row.tone] if row.tone != "neutral" else "dim")]
        table.add_row(*cells, *(_stack(value) for value in values))
    parts: list[Text | Table] = [Text(), Text(view.title, style="bold"), Text(), table, Text()]
    if view.verdict:
        parts += [Text(view.verdict, style=_STYLES[view.tone]), Text()]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, text in view.facts:
        grid.add_row(label, Text(text))
    parts.append(grid)
    parts.extend(Text(f"warning: {warning}", style="yellow") for warning in view.warnings)
    return Group(*parts, Text())


def _stack(cell: Cell, *, style: str = "", detail_style: str = "dim") -> Text:
    text = Text(cell.value, style=style)
    if cell.detail:
        text.append("\n")
        text.append(cell.detail, style=f"not bold {detail_style}" if detail_style == "dim" else detail_style)
    return text
