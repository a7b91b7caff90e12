"""The figure of the iterative baseline: what each iterate's multiplier was, and what slack it showed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.style import (
    BLUE,
    GREY,
    INK,
    VERMILLION,
    interval_bars,
    legend_above,
    new_figure,
    paper_style,
    printable,
    save_figure,
)

_KEPT = "iterate kept"


def write_trajectory_figure(trajectory: pa.Table, stem: Path) -> list[Path]:
    """Draw ``trajectory.parquet``: above the slacks with their intervals, below the multipliers, by iterate.

    Args:
        trajectory: its rows.
        stem: path of the figure without its ending.

    Returns:
        The PNG and the SVG.
    """
    return save_figure(trajectory_figure(trajectory), stem)


def trajectory_figure(trajectory: pa.Table) -> Figure:
    """The slacks of each iterate with their intervals above its multipliers; the kept iterate is marked."""
    names = list(dict.fromkeys(trajectory["constraint"].to_pylist()))
    kept = pc.filter(trajectory["iterate"], trajectory["kept"])[0].as_py()
    with paper_style():
        figure = new_figure(height_inches=3.3)
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.axhline(0.0, color=INK, linewidth=0.6)
        for place, name in enumerate(names):
            rows = trajectory.filter(pc.equal(trajectory["constraint"], name))
            iterate, slack, low, high, multiplier = (
                rows[column].to_numpy()
                for column in ("iterate", "slack", "slack_ci95_low", "slack_ci95_high", "multiplier")
            )
            color, marker = (BLUE, GREY)[place % 2], "osD^v"[place % 5]
            bars = interval_bars(slack, low, high)
            label = printable(name)
            top.errorbar(
                iterate, slack, yerr=bars, fmt=f"{marker}-", color=color, capsize=2, elinewidth=1, label=label
            )
            bottom.plot(iterate, multiplier, f"{marker}-", color=color, label="_curve")
        for axes in (top, bottom):
            axes.axvline(kept, color=VERMILLION, linewidth=1.0, label=_KEPT)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        top.set_ylabel("slack, train prompts\n(score)")
        bottom.set_ylabel("multiplier λ\n(reward per score)")
        bottom.set_ylim(bottom=0.0)
        bottom.set_xlabel("iterate (0: one-shot)")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels()
        # Side by side where they fit: a column holds some 56 characters, and an entry has a handle as wide as six.
        labels = [*names, _KEPT]
        fits = sum(len(label) + 6 for label in labels) <= 56
        legend_above(figure, top, columns=len(labels) if fits else 1)
    return figure
