"""The table at the end of each stage, for a terminal or a pipe; below about 80 columns its rows are stacked.

Only ASCII of our own, so that it prints wherever the user's own names do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.contracts.training_verdict import TrainingVerdict
from pipeline.report.views import (
    Cell,
    Row,
    TableView,
    Tone,
    badge_lines,
    printable_view,
    stage1_view,
    stage2_view,
)

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


def stage2_table(
    evaluation: Mapping[str, Any], dual: Mapping[str, Any], training: TrainingVerdict | None = None
) -> Group:
    """What a person reads when stage 2 ends.

    Args:
        evaluation: the content of ``evaluation/evaluation.json``.
        dual: the content of ``dual/dual.json`` the policy was trained from.
        training: whether training paid, or None where that was not judged.

    Returns:
        A renderable for :class:`rich.console.Console`.
    """
    return render_view(stage2_view(evaluation, dual, training))


def print_stage1(dual: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print :func:`stage1_table`, by default to standard output."""
    (console or Console()).print(stage1_table(dual))


def print_stage2(
    evaluation: Mapping[str, Any],
    dual: Mapping[str, Any],
    training: TrainingVerdict | None = None,
    *,
    console: Console | None = None,
) -> None:
    """Print :func:`stage2_table`, by default to standard output."""
    (console or Console()).print(stage2_table(evaluation, dual, training))


def print_view(view: TableView) -> None:
    """Print :func:`render_view` to standard output."""
    Console().print(render_view(view))


def render_view(view: TableView) -> Group:
    """A renderable of any table of results, for :class:`rich.console.Console`."""
    view = printable_view(view)
    parts: list[RenderableType] = [Text(), Text(view.title, style="bold"), Text()]
    for badge in view.badges:
        first, *others = badge_lines(badge)
        parts.append(Text(first, style=_STYLES[badge.tone]))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in others]
    parts += [*([Text()] if view.badges and view.answers else []), *(Text(answer) for answer in view.answers)]
    parts += [*([Text()] if view.badges or view.answers else []), _Rows(view), Text()]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, text in view.facts:
        grid.add_row(Text(label), Text(text))
    parts.append(grid)
    parts.extend(Text(f"warning: {warning}", style="yellow") for warning in view.warnings)
    return Group(*parts, Text())


@dataclass(frozen=True)
class _Rows:
    """The rows of a view: as a table where its columns fit, and below each other where they do not."""

    view: TableView

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table() if self._needed_width() <= options.max_width else self._stacked()

    def _needed_width(self) -> int:
        """Columns for all cells whole, but for names, which may fold to the width of a verdict."""
        columns = zip(
            *(cells[1:] for cells in (self.view.header, *(row.cells for row in self.view.rows))), strict=True
        )
        # Before each column the padding of the one before it and the divider, a space, of the box.
        return _VERDICT_WIDTH + sum(2 + max(map(_width, column)) for column in columns)

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="")
        for place, head in enumerate(self.view.header):
            first = place == 0
            table.add_column(
                _stack(head, style="bold"),
                justify="left" if place <= 1 else "right",
                no_wrap=not first,
                min_width=_VERDICT_WIDTH if first else None,
                overflow="fold",
            )
        for row in self.view.rows:
            name, *values = row.cells
            table.add_row(_name(name, row), *(_stack(value) for value in values))
        return table

    def _stacked(self) -> Group:
        parts: list[RenderableType] = []
        for row in self.view.rows:
            name, *values = row.cells
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True, style="dim")
            grid.add_column(overflow="fold")
            for head, cell in zip(self.view.header[1:], values, strict=True):
                if cell.value:
                    detail = " ".join(cell.detail.split("\n"))
                    if detail and "[" not in detail:  # an interval needs no name, any other number does
                        detail = f"({head.detail} {detail})"
                    # As texts: a name such as harmless[topic=a] is no markup.
                    grid.add_row(Text(f"  {head.value}"), Text(f"{cell.value} {detail}".rstrip()))
            parts += [_name(name, row), grid]
        return Group(*parts)


def _name(cell: Cell, row: Row) -> Text:
    return _stack(cell, style="bold", detail_style=_STYLES[row.tone] if row.tone != "neutral" else "dim")


def _width(cell: Cell) -> int:
    return max(cell_len(line) for text in (cell.value, cell.detail) for line in text.split("\n"))


def _stack(cell: Cell, *, style: str = "", detail_style: str = "dim") -> Text:
    text = Text(cell.value, style=style)
    if cell.detail:
        text.append("\n")
        text.append(cell.detail, style=f"not bold {detail_style}" if detail_style == "dim" else detail_style)
    return text
