"""The figures: functions from plain data to a matplotlib figure.

Each figure is one column of a paper wide. Values are in the user's own direction and units; slack is positive where a
constraint is satisfied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.problem import Direction
from pipeline.published import PublishedPoint, PublishedValue
from pipeline.report.style import (
    BLUE,
    FORBIDDEN,
    GREY,
    INK,
    VERMILLION,
    few_ticks,
    interval_bars,
    labelled,
    legend_above,
    log_ticks,
    new_figure,
    paper_style,
    printable,
)

Interval = tuple[float, float]

_UPRIGHT = 18
"""Letters of a name that stands along a vertical axis."""
_WIDE = 4.0
"""An axis of powers is for values whose largest is so many times the smallest."""

_PUBLISHED_MARKERS = "^vx+<>"

_FRONTIER_REACHES = 2.2
"""How far the frontier is shown, in distances between the reference and the farthest outcome or threshold."""


@dataclass(frozen=True)
class Measured:
    """A mean and its 95% interval, where there is one."""

    value: float
    ci95: Interval | None = None


@dataclass(frozen=True)
class Bound:
    """A constraint as far as a figure needs it: what it bounds, from which side, at which absolute threshold."""

    name: str
    direction: Direction
    threshold: float


@dataclass(frozen=True, eq=False)
class DualCurve:
    """The dual along one multiplier, the others held at their optimum.

    Attributes:
        name: the constraint whose multiplier varies.
        lam_k: multipliers, reward per score unit, shape (k,).
        dual_value_k: D, reward units, shape (k,).
        slack_k: slack of this constraint under the tilted policy, score units, shape (k,).
        lam_star: the optimal multiplier with its interval.
    """

    name: str
    lam_k: FloatArray
    dual_value_k: FloatArray
    slack_k: FloatArray
    lam_star: Measured


@dataclass(frozen=True)
class Outcome:
    """A policy in the plane of one constraint score and the reward."""

    score: Measured
    reward: Measured


@dataclass(frozen=True, eq=False)
class FrontierCurve:
    """What the reward costs: solved problems that differ in one threshold.

    Rewards are gains over the reference policy on the same prompts, so that outcomes on other prompts compare. So are
    the scores of a constraint given as a margin; those of an absolute threshold are means.

    Attributes:
        bound: the constraint whose threshold varies; its threshold is the margin where it was given as one.
        is_margin: whether scores and threshold are relative to the reference policy.
        reward_name: name of the reward.
        score_k: score of the constraint under each optimum, score units, ascending, shape (k,).
        reward_k: gain in reward under each optimum, reward units, shape (k,).
        multiplier_k: optimal multiplier of the constraint, reward per score unit, shape (k,).
        reference: the reference policy.
        predicted: this run's optimum on the prompts it was solved on.
        predicted_test: this run's optimum on the test prompts.
        realised: the trained policy on the test prompts.
        published: what others report, as gains over their reference; only beside a margin.
    """

    bound: Bound
    is_margin: bool
    reward_name: str
    score_k: FloatArray
    reward_k: FloatArray
    multiplier_k: FloatArray
    reference: Outcome
    predicted: Outcome
    predicted_test: Outcome | None = None
    realised: Outcome | None = None
    published: Sequence[PublishedPoint] = ()


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """The fine-tuning run.

    Attributes:
        step_t: optimiser step of each training loss, shape (t,).
        loss_t: training loss, nats per prompt, shape (t,).
        heldout_step_e: optimiser step of each held-out evaluation, shape (e,).
        heldout_e: estimated gap to the tilted optimum, (D - L) / beta, on held-out prompts, nats, shape (e,).
        chosen_step: step of the checkpoint that was kept.
        closed_fraction_e: estimate of the closed fraction on held-out prompts, shape (e,); may be None.
    """

    step_t: FloatArray
    loss_t: FloatArray
    heldout_step_e: FloatArray
    heldout_e: FloatArray
    chosen_step: int
    closed_fraction_e: FloatArray | None = None


@dataclass(frozen=True)
class Comparison:
    """One score under the reference, as predicted and as realised.

    Attributes:
        name: the score.
        bound: the constraint on it, or None for the reward.
        reference: mean under the reference policy.
        predicted: mean predicted by the dual for these prompts.
        realised: mean of the trained policy.
    """

    name: str
    bound: Bound | None
    reference: Measured
    predicted: Measured
    realised: Measured


@dataclass(frozen=True, eq=False)
class ScoreDistribution:
    """One score under the policies there are.

    Attributes:
        name: the score.
        edges_e: ends of the bins, score units, ascending, shape (e,); what lies beyond is in the outermost bins.
        share_kb: share of the responses of each policy in each bin, shape (k, e - 1).
        policies: their names, length k: the reference, the tilted one, the trained one.
        cut: where a demand cuts the score, or None.
    """

    name: str
    edges_e: FloatArray
    share_kb: FloatArray
    policies: tuple[str, ...]
    cut: float | None = None


@dataclass(frozen=True)
class GoldComparison:
    """One score as its proxy model sees it and as the ground truth does.

    Attributes:
        name: the score.
        proxy: mean under the reference and under the trained policy by the score model.
        gold: the same two means by the ground truth, in its own units.
    """

    name: str
    proxy: tuple[float, float]
    gold: tuple[float, float]


def dual_figure(curve: DualCurve) -> Figure:
    """The dual (its minimum is lambda*) above the slack (which crosses zero there if the constraint binds)."""
    name = printable(curve.name)
    with paper_style():
        figure = new_figure(height_inches=3.3)
        top, bottom = figure.subplots(2, 1, sharex=True)
        for axes in (top, bottom):
            axes.axvline(curve.lam_star.value, color=VERMILLION, linewidth=1.0, label="optimum λ*")
            if curve.lam_star.ci95 is not None:
                axes.axvspan(*curve.lam_star.ci95, color=VERMILLION, alpha=0.15, linewidth=0, label="its 95% interval")
        top.plot(curve.lam_k, curve.dual_value_k, color=BLUE, label="_curve")
        bottom.axhline(0.0, color=INK, linewidth=0.6)
        bottom.plot(curve.lam_k, curve.slack_k, color=BLUE, label="_curve")
        at_star = np.interp(curve.lam_star.value, curve.lam_k, curve.dual_value_k)
        top.plot([curve.lam_star.value], [at_star], "o", color=VERMILLION, clip_on=False, zorder=5)
        at_star = np.interp(curve.lam_star.value, curve.lam_k, curve.slack_k)
        bottom.plot([curve.lam_star.value], [at_star], "o", color=VERMILLION, clip_on=False, zorder=5)
        top.set_ylabel("dual D(λ) (reward)")
        bottom.set_ylabel("slack (score)")
        bottom.set_xlabel(labelled(f"multiplier λ of {name}", "reward per score"))
        bottom.set_xlim(0.0, float(curve.lam_k[-1]))
        few_ticks(top, bottom)
        figure.align_ylabels()
        legend_above(figure, top, columns=2)
    return figure


def frontier_figure(curve: FrontierCurve) -> Figure:
    """The best predicted reward for each level of the constraint, with this run on it, above its price lambda*."""
    shown_k = _near_the_run(curve)
    with paper_style():
        figure = new_figure(height_inches=4.2)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.8, 1.0])
        top.plot(curve.score_k[shown_k], curve.reward_k[shown_k], color=BLUE, label="best trade-off")
        _show_published(top, curve.published)
        _mark(top, curve.reference, "reference", fmt="s", color=GREY, size=5)
        _mark_outcomes(top, curve)
        bottom.plot(curve.score_k[shown_k], curve.multiplier_k[shown_k], color=BLUE, label="_curve")
        for axes in (top, bottom):
            axes.margins(x=0.06, y=0.08)
        bottom.set_ylim(bottom=0.0)
        limits = top.get_xlim()
        for axes in (top, bottom):
            _show_bound(axes, curve.bound, limits)
        top.set_ylabel(f"gain in {printable(curve.reward_name, most=_UPRIGHT)} (reward)")
        bottom.set_ylabel("price λ*\n(reward per score)")
        quantity = "change against the reference, score" if curve.is_margin else "mean score"
        bottom.set_xlabel(labelled(curve.bound.name, quantity))
        few_ticks(top, bottom)
        _enlarge_outcomes(top, curve, shown_k)
        figure.align_ylabels()
        legend_above(figure, top, columns=2 if curve.published else 3)
        if curve.published:
            figure.legends[0].set_title("thin and grey: published by others")
    return figure


def _mark_outcomes(axes: Axes, curve: FrontierCurve) -> None:
    _mark(axes, curve.predicted, "predicted", fmt="o", color=BLUE, size=5)
    # A ring around and a diamond within: outcomes that agree stay apart to the eye.
    if curve.predicted_test is not None:
        _mark(axes, curve.predicted_test, "predicted (test)", fmt="o", color=BLUE, size=8, hollow=True)
    if curve.realised is not None:
        _mark(axes, curve.realised, "realised (95%)", fmt="D", color=VERMILLION, size=3)


_NEAR = 0.2
"""Outcomes that spread over less of both axes than this lie on each other and are enlarged."""
_INSET = (0.42, 0.42)
_INSET_GAP = 0.1


def _enlarge_outcomes(axes: Axes, curve: FrontierCurve, shown_k: NDArray[np.bool_]) -> None:
    """An inset with the run's own outcomes, where these lie on each other and there is room for it."""
    outcomes = [one for one in (curve.predicted, curve.predicted_test, curve.realised) if one is not None]
    if len(outcomes) < 2:
        return
    limits = np.array([axes.get_xlim(), axes.get_ylim()])
    ends = np.array([[_reach(one.score) for one in outcomes], [_reach(one.reward) for one in outcomes]])
    low, high = ends.min(axis=(1, 2)), ends.max(axis=(1, 2))
    if np.any(high - low > _NEAR * np.ptp(limits, axis=1)):
        return
    points = [(curve.reference.score.value, curve.reference.reward.value)]
    points += [(one.score.value, one.reward.value) for one in curve.published]
    taken = np.concatenate(
        [
            np.column_stack([curve.score_k[shown_k], curve.reward_k[shown_k]]),
            points,
            np.array([low, high, (low + high) / 2]),
        ]
    )
    place = _free_place((taken - limits[:, 0]) / np.ptp(limits, axis=1))
    if place is None:
        return
    inset = axes.inset_axes((*place, *_INSET))
    inset.plot(curve.score_k, curve.reward_k, color=BLUE, linewidth=1.0)
    _mark_outcomes(inset, curve)
    room = 0.18 * np.maximum(high - low, 1e-9 * np.ptp(limits, axis=1))
    inset.set_xlim(low[0] - room[0], high[0] + room[0])
    inset.set_ylim(low[1] - room[1], high[1] + room[1])
    if low[0] - room[0] < curve.bound.threshold < high[0] + room[0]:
        _show_bound(inset, curve.bound, inset.get_xlim())
    inset.xaxis.set_major_locator(MaxNLocator(nbins=3))
    inset.yaxis.set_major_locator(MaxNLocator(nbins=3))
    inset.tick_params(labelsize=5.5, length=2, pad=1.5)
    for label in inset.get_xticklabels():  # lines of the axes around it may pass behind
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})
    for spine in inset.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.4)
    axes.indicate_inset_zoom(inset, edgecolor=GREY, linewidth=0.5, alpha=0.8)


def _reach(found: Measured) -> Interval:
    return found.ci95 or (found.value, found.value)


def _free_place(taken_kx: FloatArray) -> tuple[float, float] | None:
    """Where an inset covers nothing, in fractions of the axes; None where there is no such place.

    Args:
        taken_kx: what is drawn, in fractions of the axes, shape (k, 2).
    """
    width, height = _INSET
    for bottom in np.linspace(_INSET_GAP, 0.97 - height, 7):
        for left in np.linspace(_INSET_GAP, 0.98 - width, 7):
            # Room for the numbers of its axes, on its left and below.
            low, high = (left - _INSET_GAP, bottom - _INSET_GAP), (left + width + 0.03, bottom + height + 0.03)
            if not np.all((taken_kx > low) & (taken_kx < high), axis=1).any():
                return float(left), float(bottom)
    return None


@dataclass(frozen=True, eq=False)
class LadderCurve:
    """The multiplier of one constraint against the number of responses it is solved on.

    Attributes:
        name: the constraint.
        responses_r: median responses per prompt of each rung, most first, shape (r,).
        multiplier_r: lambda* on it, reward per score unit, NaN where there is none, shape (r,).
        lam_star: lambda* on all responses, with its interval over prompts, moved where there is a correction.
        corrected: lambda* corrected for the number of responses, or None.
    """

    name: str
    responses_r: FloatArray
    multiplier_r: FloatArray
    lam_star: Measured
    corrected: float | None


def ladder_figure(curve: LadderCurve) -> Figure:
    """Lambda* against one over the number of responses; the line through two rungs ends at the correction."""
    inverse_r = 1.0 / curve.responses_r
    known_r = np.isfinite(curve.multiplier_r)
    with paper_style():
        figure = new_figure(height_inches=2.3)
        axes = figure.subplots()
        # The interval is that of the corrected value where there is one.
        place, star, label = inverse_r[0], curve.lam_star, "on all (95%)"
        if curve.corrected is not None:
            ends = ([0.0, inverse_r[1]], [curve.corrected, curve.multiplier_r[1]])
            axes.plot(*ends, color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), label="_line")
            place, star, label = 0.0, Measured(curve.corrected, curve.lam_star.ci95), "corrected (95%)"
        axes.plot(inverse_r[known_r], curve.multiplier_r[known_r], "o", color=BLUE, label="on K responses")
        bars = axes.errorbar(
            place,
            star.value,
            yerr=_bars(star),
            fmt="D",
            color=VERMILLION,
            markersize=4,
            capsize=2.5,
            label=label,
            zorder=5,
        )
        for artist in bars.get_children():
            artist.set_clip_on(False)
        axes.set_xlim(0.0, 1.08 * float(inverse_r[-1]))
        axes.set_xticks([0.0, *inverse_r], ["∞", *(f"{responses:g}" for responses in curve.responses_r)])
        axes.margins(y=0.15)
        axes.set_xlabel("responses per prompt K (scaled as 1 / K)")
        axes.set_ylabel(f"λ* of {printable(curve.name, most=_UPRIGHT)}")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        legend_above(figure, axes, columns=2)
    return figure


def sample_size_figure(share_p: FloatArray, *, n_responses: float) -> Figure:
    """How much of each prompt's samples the tilted weights use.

    Args:
        share_p: effective sample size over number of samples of each prompt, 0 to 1, shape (p,).
        n_responses: median responses of a prompt: below 2 of them a prompt leans on a single one.
    """
    with paper_style():
        figure = new_figure(height_inches=2.1)
        axes = figure.subplots()
        axes.hist(share_p, bins=np.linspace(0.0, 1.0, 26).tolist(), color=BLUE, edgecolor="white", linewidth=0.4)
        median = float(np.median(share_p))
        axes.axvline(median, color=VERMILLION, linewidth=1.2, label=f"median {median:.2f}")
        if n_responses > 2:
            dash = (0, (4, 2))
            axes.axvline(
                2 / n_responses, color=INK, linewidth=0.9, linestyle=dash, label=f"ESS = 2 of {n_responses:g}"
            )
        axes.set_xlim(0.0, 1.0)
        axes.set_xlabel("effective sample size / samples of the prompt")
        axes.set_ylabel("prompts")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        legend_above(figure, axes, columns=2)
    return figure


def training_figure(curve: TrainingCurve) -> Figure:
    """Training loss, which a single step has none of; the gap to the optimum on held-out prompts; the closed fraction
    where it was estimated.
    """
    fraction = curve.closed_fraction_e
    n_panels = 1 + (len(curve.step_t) > 0) + (fraction is not None)
    with paper_style():
        figure = new_figure(height_inches=0.6 + 1.1 * n_panels)
        panels = _panels(figure, [1.0] * n_panels, shared=True)
        middle = panels[-1 if fraction is None else -2]
        if len(curve.step_t):
            panels[0].plot(curve.step_t, curve.loss_t, color=GREY, linewidth=0.8, alpha=0.8, label="training prompts")
            panels[0].set_ylabel("loss (nats)")
        middle.plot(curve.heldout_step_e, curve.heldout_e, "o-", color=BLUE, markersize=3, label="_curve")
        middle.set_ylabel("gap to optimum\n(held-out, nats)")
        if fraction is not None:
            panels[-1].plot(curve.heldout_step_e, fraction, "o-", color=BLUE, markersize=3, label="_curve")
            panels[-1].axhline(1.0, color=INK, linewidth=0.6)
            panels[-1].set_ylabel("closed fraction\n(held-out)")
            panels[-1].set_ylim(min(0.0, float(np.min(fraction))), max(1.05, 1.05 * float(np.max(fraction))))
        for axes in panels:
            axes.axvline(curve.chosen_step, color=VERMILLION, linewidth=1.0, label="checkpoint kept")
        panels[-1].set_xlabel("optimiser step")
        panels[-1].set_xlim(left=0.0)
        panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        for axes in panels:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        # An estimate near the optimum may be below 0, and of a narrow range powers have no ticks.
        if np.min(curve.heldout_e) > 0 and np.max(curve.heldout_e) > _WIDE * np.min(curve.heldout_e):
            log_ticks(middle)
        figure.align_ylabels()
        legend_above(figure, panels[0], columns=3)
    return figure


def comparison_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Reference, predicted and realised means, one panel a score, with the side of the threshold that is ruled out."""
    with paper_style():
        figure = new_figure(height_inches=0.35 + 1.05 * len(comparisons))
        panels = _panels(figure, [1.0] * len(comparisons), shared=False)
        for axes, comparison in zip(panels, comparisons, strict=True):
            rows = (
                ("reference", comparison.reference, "s", GREY),
                ("predicted", comparison.predicted, "o", BLUE),
                ("realised", comparison.realised, "D", VERMILLION),
            )
            for place, (_, found, marker, color) in enumerate(rows):
                bars = _bars(found)
                axes.errorbar(
                    found.value, place, xerr=bars, fmt=marker, color=color, markersize=4.5, capsize=2.5, zorder=4
                )
            axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.12)
            unit = "reward" if comparison.bound is None else "mean score"
            axes.set_xlabel(labelled(comparison.name, unit))
            if comparison.bound is not None:
                axes.update_datalim([(comparison.bound.threshold, 0.0)])
                axes.autoscale_view(scaley=False)
                _show_bound(axes, comparison.bound, axes.get_xlim())
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        bounded = next((axes for axes, item in zip(panels, comparisons, strict=True) if item.bound is not None), None)
        if bounded is not None:
            legend_above(figure, bounded, columns=1)
    return figure


def distribution_figure(distributions: Sequence[ScoreDistribution]) -> Figure:
    """Each score under the reference, the tilted and the trained policy, one panel a score."""
    looks: tuple[tuple[str, Any], ...] = ((GREY, "-"), (BLUE, (0, (4, 1.5))), (VERMILLION, "-"))
    with paper_style():
        figure = new_figure(height_inches=0.4 + 1.35 * len(distributions))
        panels = _panels(figure, [1.0] * len(distributions), shared=False)
        for axes, found in zip(panels, distributions, strict=True):
            width_b = np.diff(found.edges_e)
            for (color, line), name, share_b in zip(looks, found.policies, found.share_kb, strict=False):
                axes.stairs(
                    share_b / width_b,
                    found.edges_e,
                    color=color,
                    linestyle=line,
                    linewidth=1.2,
                    label=name,
                    zorder=4 if name == "tilted" else 3,
                )
            if found.cut is not None and found.edges_e[0] < found.cut < found.edges_e[-1]:
                axes.axvline(found.cut, color=INK, linewidth=0.8, linestyle=(0, (1, 1.5)), label="demand")
            axes.set_xlim(float(found.edges_e[0]), float(found.edges_e[-1]))
            axes.set_ylim(bottom=0.0)
            axes.set_xlabel(printable(found.name))
            axes.set_ylabel("density")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        with_cut = [axes for axes in panels if "demand" in axes.get_legend_handles_labels()[1]]
        legend_above(figure, (with_cut or panels)[0], columns=4)
    return figure


def gold_figure(comparisons: Sequence[GoldComparison]) -> Figure:
    """Movement from the reference to the trained policy, by the score model and by the ground truth."""
    with paper_style():
        figure = new_figure(height_inches=0.35 + 0.85 * len(comparisons))
        panels = _panels(figure, [1.0] * len(comparisons), shared=False)
        for axes, comparison in zip(panels, comparisons, strict=True):
            for place, (before, after) in enumerate((comparison.proxy, comparison.gold)):
                axes.plot([before, after], [place, place], color=GREY, linewidth=1.2, label="_move")
                axes.plot(before, place, "s", color=GREY, zorder=4, label="reference" if place == 0 else "_again")
                axes.plot(after, place, "D", color=VERMILLION, zorder=4, label="realised" if place == 0 else "_again")
            axes.set_yticks([0, 1], ["score model", "ground truth"])
            axes.set_ylim(1.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.12)
            axes.set_xlabel(labelled(comparison.name, "mean, each in its own units"))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        legend_above(figure, panels[0], columns=2)
    return figure


def _panels(figure: Figure, height_ratios: Sequence[float], *, shared: bool) -> list[Axes]:
    grid = figure.subplots(len(height_ratios), 1, sharex=shared, height_ratios=height_ratios, squeeze=False)
    return list(grid[:, 0])


def _bars(found: Measured) -> Any:
    if found.ci95 is None:
        return None
    return interval_bars(found.value, *found.ci95)


def _near_the_run(curve: FrontierCurve) -> NDArray[np.bool_]:
    """The part of the frontier to show, shape (k,): its far end, all cost, would squeeze the run into a corner."""
    origin = curve.reference.score.value
    outcomes = [curve.predicted, curve.predicted_test, curve.realised]
    values = [curve.bound.threshold, *(outcome.score.value for outcome in outcomes if outcome is not None)]
    reach = max(abs(value - origin) for value in values)
    span = float(np.ptp(curve.score_k))
    near_k: NDArray[np.bool_] = np.abs(curve.score_k - origin) <= max(_FRONTIER_REACHES * reach, span / 3)
    return near_k


def _mark(
    axes: Axes, outcome: Outcome, label: str, *, fmt: str, color: str, size: float, hollow: bool = False
) -> None:
    axes.errorbar(
        outcome.score.value,
        outcome.reward.value,
        xerr=_bars(outcome.score),
        yerr=_bars(outcome.reward),
        fmt=fmt,
        color=color,
        markerfacecolor="none" if hollow else color,
        markersize=size,
        elinewidth=1.0,
        capsize=2,
        label=label,
        zorder=5,
    )


def _show_published(axes: Axes, published: Sequence[PublishedPoint]) -> None:
    """Others' policies, one hollow grey marker a method: behind the run's own outcomes."""
    methods = list(dict.fromkeys((point.paper, point.method) for point in published))
    for place, (paper, method) in enumerate(methods):
        points = [point for point in published if (point.paper, point.method) == (paper, method)]
        score, reward = [point.score for point in points], [point.reward for point in points]
        axes.errorbar(
            [one.value for one in score],
            [one.value for one in reward],
            xerr=_published_bars(score),
            yerr=_published_bars(reward),
            fmt=_PUBLISHED_MARKERS[place % len(_PUBLISHED_MARKERS)],
            color=GREY,
            markerfacecolor="none",
            markersize=4,
            markeredgewidth=0.7,
            elinewidth=0.6,
            label=printable(method),
            zorder=3,
        )


def _published_bars(values: Sequence[PublishedValue]) -> Any:
    if all(one.ci95 is None for one in values):
        return None
    ends = [one.ci95 or (one.value, one.value) for one in values]
    return interval_bars([one.value for one in values], [low for low, _ in ends], [high for _, high in ends])


def _show_bound(axes: Axes, bound: Bound, limits: tuple[float, float]) -> None:
    """The threshold, and a shade over the side it rules out; an equality is the line itself."""
    room = 0.06 * (limits[1] - limits[0])
    low, high = min(limits[0], bound.threshold - room), max(limits[1], bound.threshold + room)
    if bound.direction != "=":
        ruled_out = (low, bound.threshold) if bound.direction == ">=" else (bound.threshold, high)
        axes.axvspan(*ruled_out, color=FORBIDDEN, linewidth=0, zorder=0, label="ruled out")
    axes.axvline(bound.threshold, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1, label="_threshold")
    axes.set_xlim(low, high)
