"""The frontier of a grid: its table has every swept constraint, its figure every line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.figures import require_nothing_cut_off

from pipeline.report.summary import text_summary
from pipeline.report.swept import SweptConstraint, SweptGrid, grid_view, sweep_figure

MARGINS = np.linspace(0.0, 1.0, 11)


def grid(*names: str, infeasible_from: float = np.inf, n_others: int = 3) -> SweptGrid:
    """The first constraint is a margin; a second one has absolute thresholds."""
    others = np.linspace(0.1, 0.3, n_others) if len(names) > 1 else np.array([0.0])
    margin, other = (column.ravel() for column in np.meshgrid(MARGINS, others, indexing="ij"))
    feasible = margin < infeasible_from
    solved = np.where(feasible, 1.0, np.nan)
    columns: dict[str, Any] = {
        "feasible": feasible,
        "status": np.where(feasible, "certified", "infeasible"),
        "reward": (0.4 - margin**2 - other) * solved,
        "kl": margin * solved,
        "ess_median": 9.0 * solved,
    }
    for name, values in zip(names, (margin, other), strict=False):
        columns |= {f"margin_{name}": values, f"threshold_{name}": values + 0.5}
        columns |= {f"multiplier_{name}": values * solved, f"predicted_{name}": values * solved}
    swept = tuple(SweptConstraint(name, ">=", is_margin=place == 0, family=place) for place, name in enumerate(names))
    return SweptGrid(pa.table(columns), "helpful", 0.4, swept)


def test_the_table_says_what_was_asked_and_what_it_costs() -> None:
    text = text_summary(grid_view(grid("harmless", infeasible_from=0.85)))
    assert "Frontier: 11 thresholds, 9 of them feasible" in text
    row = next(line for line in text.splitlines() if line.startswith("6 "))
    assert row.split() == ["6", "+0.500", "0.500", "0.150", "0.500", "9.000"]
    assert "infeasible" in next(line for line in text.splitlines() if line.startswith("10 "))
    assert "nan" not in text


def test_a_long_grid_is_shown_evenly_with_both_constraints() -> None:
    text = text_summary(grid_view(grid("harmless", "calm")))
    assert "33 thresholds, 33 of them feasible; 24 of them here" in text
    assert "calm" in text


@pytest.mark.parametrize("n_others", [2, 9])
def test_there_is_a_line_for_each_threshold_of_the_others(n_others: int) -> None:
    figure = sweep_figure(grid("harmless", "calm", n_others=n_others, infeasible_from=0.7))
    require_nothing_cut_off(figure)
    top, bottom = figure.axes
    assert len(bottom.lines) == n_others
    _, labels = top.get_legend_handles_labels()
    assert len([label for label in labels if label.startswith("calm ≥")]) == (n_others if n_others <= 5 else 0)
    assert "not to be met" in labels


@pytest.mark.parametrize("infeasible_from", [np.inf, 0.55, -1.0])
def test_one_constraint_is_one_line(infeasible_from: float) -> None:
    figure = sweep_figure(grid("$a$ \x07", infeasible_from=infeasible_from))
    require_nothing_cut_off(figure)
    assert len(figure.axes[1].lines) == 1
