"""The pictures of the experiments, in the look of the report: one function a picture, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import binomtest

from pipeline.baselines import policies
from pipeline.baselines.palette import GREEN, ORANGE, PURPLE, SKY
from pipeline.baselines.results import methods
from pipeline.report.style import (
    BLUE,
    GREY,
    INK,
    VERMILLION,
    few_ticks,
    interval_bars,
    legend_above,
    new_figure,
    paper_style,
)

LOOKS = {
    policies.ONE_SHOT: (BLUE, "o"),
    policies.MULTI_SHOT: (VERMILLION, "s"),
    policies.PAPER_DPO: (GREEN, "^"),
    policies.PREFERENCE_BASED: (PURPLE, "D"),
    policies.PREFERENCE_MULTI_SHOT: (SKY, "D"),
    policies.REWARD_ONLY: (INK, ">"),
    policies.CONSTRAINT_ONLY: (INK, "<"),
    policies.EQUAL_WEIGHTS: (INK, "P"),
    policies.SOUP: (ORANGE, "v"),
}
"""Colour and marker of a method, the same in every picture."""


def satisfaction_figure(table: pa.Table) -> Figure:
    """Realised against demanded improvement with 95% intervals; above the line the demand is met."""
    with paper_style():
        figure = new_figure(height_inches=3.4)
        axes = figure.subplots()
        ends = _padded(table["demanded"].to_numpy())
        spread = 0.012 * np.ptp(ends)
        # A level for each demand, as wide as the points that stand side by side at it.
        demands = np.unique(table["demanded"].to_numpy())
        axes.hlines(demands, demands - 4 * spread, demands + 4 * spread, color=INK, linewidth=0.8, label="demanded")
        for place, method in enumerate(methods(table.to_pylist())):
            rows = table.filter(pc.equal(table["method"], method))
            # Side by side: two methods and several seeds share each demand.
            seeds = rows["seed"].to_numpy() - rows["seed"].to_numpy().mean()
            x = rows["demanded"].to_numpy() + spread * (2.5 * place - 1.25 + 0.6 * seeds)
            _points(axes, x, rows, "realised", method)
        axes.set_xlabel("demanded improvement of harmlessness (score)")
        axes.set_ylabel("realised improvement (score)")
        _finish(figure, axes, columns=3)
    return figure


def trade_off_figure(table: pa.Table, frontier: Mapping[str, pa.Table]) -> Figure:
    """All methods in the plane of the two improvements, by the score models and by gold.

    Args:
        table: the methods' policies.
        frontier: improvements predicted by the dual, by the prefix of the scores.
    """
    with paper_style():
        figure = new_figure(height_inches=6.0)
        panels = figure.subplots(2, 1)
        for axes, (prefix, judged) in zip(panels, (("", "score models"), ("gold_", "gold scores")), strict=True):
            curve = frontier[prefix]
            axes.plot(curve["harmless"], curve["helpful"], color=GREY, linewidth=1.0, label="predicted by the dual")
            axes.plot([0], [0], "x", color=INK, label="reference")
            for method in methods(table.to_pylist()):
                rows = table.filter(pc.equal(table["method"], method))
                color, marker = LOOKS[method]
                bars = [_bars(rows, f"{prefix}{name}") for name in ("harmless", "helpful")]
                axes.errorbar(
                    rows[f"{prefix}harmless"].to_numpy(),
                    rows[f"{prefix}helpful"].to_numpy(),
                    xerr=bars[0],
                    yerr=bars[1],
                    fmt=marker,
                    color=color,
                    markersize=4,
                    elinewidth=0.6,
                    label=_in_lines(method),  # two columns of whole names are wider than the figure
                )
            axes.set_xlabel(f"improvement of harmlessness ({judged})")
            axes.set_ylabel(f"improvement of\nhelpfulness ({judged})")
            few_ticks(axes)
        legend_above(figure, panels[0], columns=2)
    return figure


def two_constraints_figure(table: pa.Table) -> Figure:
    """Demanded pairs of improvements, and with a line to each what was realised, by method; seeds are alike."""
    with paper_style():
        figure = new_figure(height_inches=4.2)
        axes = figure.subplots()
        for place, method in enumerate(methods(table.to_pylist())):
            rows = table.filter(pc.equal(table["method"], method))
            color, marker = LOOKS[method]
            x, y = (rows[f"{name}_demanded"].to_numpy() for name in ("harmless", "humour"))
            u, v = (rows[f"{name}_realised"].to_numpy() for name in ("harmless", "humour"))
            axes.plot([x, u], [y, v], color=GREY, linewidth=0.6, zorder=1)
            if place == 0:  # the others are of the same demands
                axes.plot(x, y, "o", color=INK, markerfacecolor="none", label="demanded", zorder=4)
            axes.errorbar(
                u,
                v,
                xerr=_bars(rows, "harmless_realised", of="harmless"),
                yerr=_bars(rows, "humour_realised", of="humour"),
                fmt=marker,
                color=color,
                markersize=3,
                elinewidth=0.6,
                label=f"{method} (95%)",
            )
        axes.set_xlabel("improvement of harmlessness (score)")
        axes.set_ylabel("improvement of humour (score)")
        _finish(figure, axes, columns=3)
    return figure


def kinds_figure(table: pa.Table) -> Figure:
    """How far what was realised lies beyond each demand, in the units it is judged in, by kind of constraint."""
    kinds = list(dict.fromkeys(table["kind"].to_pylist()))
    colors = {"satisfied": BLUE, "undecided": GREY, "violated": VERMILLION}
    with paper_style():
        figure = new_figure(height_inches=0.42 * len(kinds) + 1.2)
        axes = figure.subplots()
        rows = table.to_pylist()
        for place, kind in enumerate(kinds):
            of_kind = [row for row in rows if row["kind"] == kind]
            spread = np.linspace(-0.32, 0.32, len(of_kind)) if len(of_kind) > 1 else np.zeros(1)
            for row, offset in zip(of_kind, spread, strict=True):
                # Turned where less is demanded, so that the safe side is the right one.
                value, *ends = (
                    row["sign"] * (row[key] - row["demanded"]) / row["unit_size"]
                    for key in ("realised", "ci95_low", "ci95_high")
                )
                low, high = sorted(ends)
                axes.errorbar(
                    value,
                    place + offset,
                    xerr=interval_bars([value], [low], [high]),
                    fmt="o",
                    color=colors[row["status"]],
                    markersize=2.5,
                    elinewidth=0.8,
                )
        for status, color in colors.items():
            axes.plot([], [], "o", color=color, markersize=3, label=status)
        axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.invert_yaxis()
        axes.set_xlabel("realised beyond demanded (sd; of a KL nats)")
        _finish(figure, axes, columns=3)
        axes.set_yticks(range(len(kinds)), kinds)  # after the ticks of numbers are thinned out
    return figure


def calibration_figure(table: pa.Table) -> Figure:
    """Observed share of preferences against the probability that the implicit reward gives them."""
    with paper_style():
        figure = new_figure(height_inches=3.2)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, label="calibrated")
        for preference, color, marker in (("helpful", BLUE, "o"), ("harmless", VERMILLION, "s")):
            rows = table.filter(pc.equal(table["preference"], preference))
            observed, count = rows["observed"].to_numpy(), rows["n_pairs"].to_numpy()
            ends = [
                binomtest(round(share * n), int(n)).proportion_ci(method="wilson")
                for share, n in zip(observed, count, strict=True)
            ]
            bars = interval_bars(observed, [end.low for end in ends], [end.high for end in ends])
            axes.errorbar(
                rows["predicted"].to_numpy(),
                observed,
                yerr=bars,
                fmt=f"{marker}-",
                color=color,
                markersize=4,
                linewidth=0.8,
                label=preference,
            )
        axes.set_xlabel("probability by the implicit reward")
        axes.set_ylabel("observed share")
        _finish(figure, axes, columns=3)
    return figure


def cost_figure(table: pa.Table) -> Figure:
    """Mean wall time of each method by what it is spent on."""
    with paper_style():
        figure = new_figure(height_inches=2.2)
        axes = figure.subplots()
        named = methods(table.to_pylist())
        left = np.zeros(len(named))
        for name, label, color in (
            ("sampling_seconds", "sampling the reference", SKY),
            ("scoring_seconds", "scoring", GREY),
            ("own_seconds", "dual, training, later iterates", BLUE),
        ):
            means = np.array([pc.mean(table.filter(pc.equal(table["method"], m))[name]).as_py() for m in named])
            axes.barh(range(len(named)), means, left=left, color=color, height=0.6, label=label)
            left += means
        axes.set_yticks(range(len(named)), [_in_lines(method) for method in named])
        axes.invert_yaxis()
        axes.set_xlabel("wall time (s)")
        legend_above(figure, axes, columns=2)
    return figure


def real_model_figure(table: pa.Table) -> Figure:
    """Improvements of each score in standard deviations of the reference, by seed, with what was demanded of it."""
    with paper_style():
        figure = new_figure(height_inches=2.6)
        axes = figure.subplots()
        names = list(dict.fromkeys(table["score"].to_pylist()))
        for place, name in enumerate(names):
            rows = table.filter(pc.equal(table["score"], name))
            sd = rows["sd"].to_numpy()
            value, low, high = (rows[column].to_numpy() / sd for column in ("realised", "ci95_low", "ci95_high"))
            x = place + 0.15 * (np.arange(len(sd)) - (len(sd) - 1) / 2)
            bars = interval_bars(value, low, high)
            axes.errorbar(
                x, value, yerr=bars, fmt="o", color=BLUE, markersize=3, elinewidth=0.7, label=_once("realised", place)
            )
            predicted = rows["predicted"].to_numpy() / sd
            axes.plot(x, predicted, "_", color=VERMILLION, markersize=8, label=_once("predicted", place))
            demanded = rows["demanded"].to_pylist()
            if None not in demanded:
                level = float(np.mean(np.array(demanded) / sd))
                label = "" if any(line.get_label() == "demanded" for line in axes.collections) else "demanded"
                axes.hlines(level, place - 0.35, place + 0.35, color=INK, linewidth=0.8, label=label)
        axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylabel("improvement (sd)")
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        legend_above(figure, axes, columns=3)
    return figure


def _once(label: str, place: int) -> str | None:
    return label if place == 0 else None


def _points(axes: Axes, x: np.ndarray, rows: pa.Table, name: str, method: str) -> None:
    color, marker = LOOKS[method]
    y, low, high = (rows[column].to_numpy() for column in (name, "ci95_low", "ci95_high"))
    axes.errorbar(
        x, y, yerr=interval_bars(y, low, high), fmt=marker, color=color, markersize=3, elinewidth=0.7, label=method
    )


def _bars(rows: pa.Table, name: str, *, of: str | None = None) -> np.ndarray:
    stem = name if of is None else of
    value, low, high = (rows[column].to_numpy() for column in (name, f"{stem}_ci95_low", f"{stem}_ci95_high"))
    return interval_bars(value, low, high)


def _padded(values: np.ndarray) -> np.ndarray:
    room = 0.1 * max(float(np.ptp(values)), 0.2)
    return np.array([values.min() - room, values.max() + room])


def _in_lines(method: str) -> str:
    return method.replace(", ", ",\n")


def _finish(figure: Figure, axes: Axes, *, columns: int) -> None:
    few_ticks(axes)
    legend_above(figure, axes, columns=columns)
