"""The frontier of a grid of thresholds, without a run: its table and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib import colormaps
from matplotlib.figure import Figure

from pipeline.contracts.problem import Direction
from pipeline.report.style import (
    BLUE,
    GREY,
    VERMILLION,
    few_ticks,
    legend_above,
    new_figure,
    paper_style,
    printable,
)
from pipeline.report.views import Cell, Row, TableView, decimals, number, signed

_MOST_ROWS = 24
_TYPESET: Mapping[Direction, str] = {">=": "≥", "<=": "≤", "=": "="}
_MOST_LABELS = 5
"""Lines of a figure that have a label each; more are told apart by their shade alone."""


@dataclass(frozen=True)
class SweptConstraint:
    """A constraint whose threshold varies.

    Attributes:
        name: of the constraint.
        direction: of the constraint.
        is_margin: whether its thresholds were given over the reference.
        family: number of the demand that it comes from; those of an ``each`` move together.
    """

    name: str
    direction: Direction
    is_margin: bool
    family: int

    @property
    def column(self) -> str:
        """The column of the table that has its thresholds as they were given."""
        return f"{'margin' if self.is_margin else 'threshold'}_{self.name}"


@dataclass(frozen=True, eq=False)
class SweptGrid:
    """Solved problems that differ in their thresholds.

    Attributes:
        rows: the content of ``frontier.parquet``.
        reward: name of the reward.
        reference_reward: its mean under the reference policy, reward units.
        swept: the constraints that vary, the first of them slowest.
    """

    rows: pa.Table
    reward: str
    reference_reward: float
    swept: tuple[SweptConstraint, ...]

    @property
    def n_feasible(self) -> int:
        """How many thresholds can be met."""
        return sum(self.rows["feasible"].to_pylist())


def grid_view(grid: SweptGrid) -> TableView:
    """Rows of a grid, evenly along it where there are many."""
    count = grid.rows.num_rows
    places = np.unique(np.linspace(0, count - 1, min(_MOST_ROWS, count)).round().astype(int))
    columns: list[tuple[Cell, str]] = []
    for one in grid.swept:
        asked = f"{one.direction} ref +" if one.is_margin else one.direction
        columns.append((Cell(one.name, asked), one.column))
        columns.append((Cell("lambda*", one.name if len(grid.swept) > 1 else ""), f"multiplier_{one.name}"))
    columns += [(Cell(grid.reward, "predicted"), "reward"), (Cell("KL", "nats"), "kl"), (Cell("ESS"), "ess_median")]
    digits = {name: decimals(_finite(grid.rows[name])) for _, name in columns}
    rows = []
    for place, row in zip(places.tolist(), grid.rows.take(pa.array(places)).to_pylist(), strict=True):
        cells = [_cell(row, name, digits[name], feasible=row["feasible"]) for _, name in columns]
        rows.append(Row((Cell(str(place + 1)), *cells, Cell("" if row["feasible"] else row["status"]))))
    shown = "" if len(rows) == count else f"; {len(rows)} of them here"
    return TableView(
        title=f"Frontier: {count} thresholds, {grid.n_feasible} of them feasible{shown}",
        header=(Cell("point"), *(head for head, _ in columns), Cell()),
        rows=tuple(rows),
        facts=(("reference", f"{grid.reward} {number(grid.reference_reward, digits['reward'])}"),),
    )


def _cell(row: Mapping[str, Any], name: str, digits: int, *, feasible: bool) -> Cell:
    value = row[name]
    if value is None or not np.isfinite(value) or not (feasible or name.startswith(("margin_", "threshold_"))):
        return Cell("-")
    return Cell(signed(value, digits) if name.startswith("margin_") else number(value, digits))


def sweep_figure(grid: SweptGrid) -> Figure:
    """The best predicted reward for each threshold of the first constraint, above its price lambda*.

    Where several constraints vary, there is a line for each combination of the others' thresholds.
    """
    first = grid.swept[0]
    lines = _lines(grid)
    labelled = 1 < len(lines) <= _MOST_LABELS
    with paper_style():
        figure = new_figure(height_inches=3.8)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1.0])
        for place, (label, part) in enumerate(lines):
            colour = BLUE if len(lines) == 1 else colormaps["viridis"](0.85 * place / (len(lines) - 1))
            asked_k, solved_k = _column(part, first.column), np.array(part["feasible"].to_pylist(), dtype=bool)
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 2.5}
            for axes, name in ((top, "reward"), (bottom, f"multiplier_{first.name}")):
                shown = label if labelled and axes is top else "_line"
                values_k = np.where(solved_k, _column(part, name), np.nan)
                axes.plot(asked_k, values_k, label=printable(shown), **style)
            top.plot(
                asked_k[~solved_k],
                np.full(int((~solved_k).sum()), 0.03),
                "x",
                transform=top.get_xaxis_transform(),  # no reward, and so at the foot
                color=VERMILLION,
                markersize=4,
                label="not to be met" if place == 0 and not solved_k.all() else "_no",
            )
        top.axhline(grid.reference_reward, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), label="reference")
        top.set_ylabel(f"predicted {printable(grid.reward)}")
        bottom.set_ylabel("price λ*\n(reward per score)")
        bottom.set_ylim(bottom=min(0.0, bottom.get_ylim()[0]) if first.direction == "=" else 0.0)
        asked = f"{_TYPESET[first.direction]} reference +" if first.is_margin else _TYPESET[first.direction]
        bottom.set_xlabel(f"{printable(first.name)} {asked}")
        few_ticks(top, bottom)
        figure.align_ylabels()
        legend_above(figure, top, columns=2)
    return figure


def _lines(grid: SweptGrid) -> list[tuple[str, pa.Table]]:
    """The rows of each combination of thresholds of what does not move with the first constraint, with its label."""
    others = [one for one in grid.swept if one.family != grid.swept[0].family]
    if not others:
        return [("", grid.rows)]
    keys = list(zip(*(grid.rows[one.column].to_pylist() for one in others), strict=True))
    found = []
    for key in dict.fromkeys(keys):
        part = grid.rows.filter(pa.array([other == key for other in keys]))
        label = ", ".join(
            f"{one.name} {_TYPESET[one.direction]} {'ref + ' if one.is_margin else ''}{value:.3g}"
            for one, value in zip(others, key, strict=True)
        )
        found.append((label, part))
    return found


def _column(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def _finite(column: pa.ChunkedArray) -> Sequence[float]:
    return [value for value in column.to_pylist() if value is not None and np.isfinite(value)]
