"""The figure of a plan: how far slacks may be off, by prompts and responses, with lines of equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pipeline.report.style import (
    BLUE,
    FORBIDDEN,
    GREY,
    INK,
    VERMILLION,
    legend_above,
    new_figure,
    paper_style,
    save_figure,
)
from stage1_dual.dual import Pilot, SamplePlan, SizeRequest

_LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the error in units of what is allowed: the plan lies on 1."""

_GRID = 25


def write_plan_figure(pilot: Pilot, request: SizeRequest, plan: SamplePlan, stem: Path) -> list[Path]:
    """Draw the error over prompts and responses, and the plan.

    Args:
        pilot: what was measured.
        request: what was asked for.
        plan: what was found.
        stem: path of the figure without its ending.

    Returns:
        The files.
    """
    return save_figure(plan_figure(pilot, request, plan), stem)


def plan_figure(pilot: Pilot, request: SizeRequest, plan: SamplePlan) -> Figure:
    """Both axes are logarithmic; errors are in units of what is allowed, at the confidence that is asked for."""
    assert plan.n_prompts is not None  # the caller's question
    responses_x = _around(plan.n_responses, lowest=8)
    prompts_y = _around(plan.n_prompts, lowest=30)
    error_yx = np.empty((_GRID, _GRID))
    for x, responses in enumerate(responses_x):
        prediction = pilot.predict(round(float(responses)))
        for y, prompts in enumerate(prompts_y):
            error_yx[y, x] = prediction.reach(prompts, request.within_m, confidence=request.confidence)
    with paper_style():
        figure = new_figure(height_inches=3.0)
        axes = figure.subplots()
        # First: labels lie along lines as they are when they are put there.
        axes.set(xscale="log", yscale="log", xlabel="responses a prompt", ylabel="prompts")
        axes.set(xlim=(responses_x[0], responses_x[-1]), ylim=(prompts_y[0], prompts_y[-1]))
        fewest = pilot.fewest_responses()
        if fewest > responses_x[0]:
            axes.axvspan(responses_x[0], min(fewest, responses_x[-1]), color=FORBIDDEN, linewidth=0)
        lines = axes.contour(responses_x, prompts_y, error_yx, levels=_LEVELS, colors=BLUE, linewidths=[1, 1, 2, 1, 1])
        axes.clabel(lines, fmt=lambda level: f"{level:g}", fontsize=7)
        costs_yx = prompts_y[:, np.newaxis] * responses_x
        steps = 10.0 ** np.arange(np.floor(np.log10(costs_yx.min())) + 1, np.log10(costs_yx.max()))
        equal = axes.contour(
            responses_x, prompts_y, costs_yx, levels=steps, colors=GREY, linewidths=0.7, linestyles=":"
        )
        places = {cost: place for cost in steps if (place := _label_place(cost, responses_x, prompts_y)) is not None}
        axes.clabel(equal, list(places), fmt=lambda cost: f"{cost:,.0f}", fontsize=6, manual=list(places.values()))
        axes.plot([], [], color=BLUE, label="error / allowed")
        axes.plot([], [], color=GREY, linestyle=":", linewidth=0.7, label="responses in all")
        axes.plot(
            [plan.n_responses],
            [plan.n_prompts],
            "o",
            color=VERMILLION,
            markeredgecolor=INK,
            label="the plan",
            zorder=3,
        )
        for axis, values in ((axes.xaxis, responses_x), (axes.yaxis, prompts_y)):
            axis.set_major_locator(FixedLocator(_ticks(values)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        legend_above(figure, axes, columns=3)
    return figure


def _label_place(cost: float, responses_x: np.ndarray, prompts_y: np.ndarray) -> tuple[float, float] | None:
    """Where a line of equal cost bears its number, if it is long enough: apart from those of the errors."""
    low, high = max(responses_x[0], cost / prompts_y[-1]), min(responses_x[-1], cost / prompts_y[0])
    if high < 4 * low:
        return None
    responses = float(low**0.2 * high**0.8)
    return responses, cost / responses


def _around(value: float, *, lowest: float) -> np.ndarray:
    """Numbers from an eighth to eight times, evenly spaced in their logarithm, none below the lowest."""
    return np.asarray(np.geomspace(max(lowest, value / 8), max(8 * value, 8 * lowest), _GRID))


def _ticks(values: np.ndarray) -> Sequence[float]:
    """Round numbers inside: 1, 2 and 5 of each power of ten, as many as are read apart."""
    every = [digit * 10.0**power for power in range(9) for digit in (1, 2, 5)]
    inside = [tick for tick in every if values[0] <= tick <= values[-1]]
    return inside if len(inside) <= 7 else inside[::2]
