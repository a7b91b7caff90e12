"""The figure of several runs: each in the plane of a constraint and the reward, as predicted and as realised."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from pipeline.contracts.problem import Direction
from pipeline.report.compared import ComparedScore, Plane
from pipeline.report.style import (
    BLUE,
    FORBIDDEN,
    GREY,
    INK,
    VERMILLION,
    few_ticks,
    interval_bars,
    legend_above,
    new_figure,
    paper_style,
    printable,
)

# Okabe and Ito's palette without its yellow, which is too light on white.
_COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
_MARKERS = "DosvP^X"
_SHORT = 18
"""Letters of names of which two stand side by side in a legend."""


def plane_figure(plane: Plane) -> Figure:
    """The runs of a plane: hollow as predicted, filled as realised with 95% intervals, a line between the two.

    Runs are told apart by colour and marker. Where all demand the same the side that it rules out is shaded; where
    they do not, what one run alone demands has its colour.
    """
    demands: dict[tuple[float | None, Direction | None], list[str]] = {}
    for place, point in enumerate(plane.points):
        asked = (point.constraint.demanded, point.constraint.direction)
        demands.setdefault(asked, []).append(_COLOURS[place % len(_COLOURS)])
    columns = 2 if max(len(point.run) for point in plane.points) <= _SHORT else 1
    rows = math.ceil((len(plane.points) + 1) / columns)
    with paper_style():
        figure = new_figure(height_inches=2.5 + 0.17 * rows)
        axes = figure.subplots()
        for place, point in enumerate(plane.points):
            colour = _COLOURS[place % len(_COLOURS)]
            marker = _MARKERS[(place + place // len(_COLOURS)) % len(_MARKERS)]
            score, reward = point.constraint, point.reward
            axes.plot(
                score.predicted,
                reward.predicted,
                marker,
                color=colour,
                markerfacecolor="none",
                markersize=7,
                zorder=4,
                label=printable(point.run) if score.realised is None else "_predicted",
            )
            if score.realised is not None and reward.realised is not None:
                axes.plot(
                    [score.predicted, score.realised],
                    [reward.predicted, reward.realised],
                    color=colour,
                    linewidth=0.7,
                    zorder=3,
                    label="_way",
                )
                axes.errorbar(
                    score.realised,
                    reward.realised,
                    xerr=_bars(score),
                    yerr=_bars(reward),
                    fmt=marker,
                    color=colour,
                    markersize=4,
                    elinewidth=0.9,
                    capsize=2,
                    zorder=5,
                    label=printable(point.run),
                )
        if plane.is_gain:
            axes.plot(0.0, 0.0, "s", color=GREY, markersize=4, label="reference")
        axes.margins(0.08)
        low, high = axes.get_xlim()
        for (demanded, direction), colours in demands.items():
            assert demanded is not None  # of a constraint there is a demand
            colour = colours[0] if len(demands) > 1 and len(colours) == 1 else INK
            axes.axvline(demanded, color=colour, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1, label="_demand")
            low, high = min(low, demanded - 0.06 * (high - low)), max(high, demanded + 0.06 * (high - low))
            if len(demands) == 1 and direction != "=":
                ruled_out = (low, demanded) if direction == ">=" else (demanded, high)
                axes.axvspan(*ruled_out, color=FORBIDDEN, linewidth=0, zorder=0, label="_ruled out")
        axes.set_xlim(low, high)
        kind = "gain over the reference" if plane.is_gain else "value"
        axes.set_xlabel(f"{printable(plane.quantity)} ({kind})")
        axes.set_ylabel(f"gain in {printable(plane.reward)}")
        few_ticks(axes)
        legend_above(figure, axes, columns=columns)
    return figure


def _bars(score: ComparedScore) -> Any:
    """Lengths of error bars; none where an end has no bound."""
    if score.ci95 is None or score.realised is None or None in score.ci95:
        return None
    low, high = score.ci95
    return interval_bars(score.realised, low or 0.0, high or 0.0)
