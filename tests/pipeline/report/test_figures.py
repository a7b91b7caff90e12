from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from helpers.figures import require_nothing_cut_off
from matplotlib.figure import Figure

from pipeline.config.loading import load_config
from pipeline.report.figures import (
    Bound,
    Comparison,
    DualCurve,
    FrontierCurve,
    GoldComparison,
    LadderCurve,
    Measured,
    Outcome,
    ScoreDistribution,
    TrainingCurve,
    comparison_figure,
    distribution_figure,
    dual_figure,
    frontier_figure,
    gold_figure,
    ladder_figure,
    sample_size_figure,
    training_figure,
)
from pipeline.report.style import COLUMN_INCHES, paper_style, save_figure

pytestmark = pytest.mark.slow

NAME = "harmless"
LAM = np.linspace(0.0, 2.0, 21)
STAR = Measured(1.0, (0.8, 1.3))
STEPS = np.arange(0.0, 101.0, 10.0)


def _dual(name: str = NAME, star: Measured = STAR) -> Figure:
    return dual_figure(DualCurve(name, LAM, (LAM - 1.0) ** 2, 2.0 * (LAM - 1.0), star))


def _frontier(name: str = NAME, direction: str = ">=", threshold: float = 0.8) -> Figure:
    score = np.linspace(0.0, 2.0, 15) * (1.0 if direction == ">=" else -1.0)
    return frontier_figure(
        FrontierCurve(
            bound=Bound(name, "<=" if direction == "<=" else ">=", threshold if direction == ">=" else -threshold),
            is_margin=True,
            reward_name=name,
            score_k=np.sort(score),
            reward_k=1.0 - np.sort(score) ** 2,
            multiplier_k=np.abs(np.sort(score)),
            reference=Outcome(Measured(0.0), Measured(0.0)),
            predicted=Outcome(Measured(0.8), Measured(0.36)),
            predicted_test=Outcome(Measured(0.9), Measured(0.3)),
            realised=Outcome(Measured(0.7, (0.6, 0.8)), Measured(0.3, (0.2, 0.4))),
        )
    )


def _frontier_beside_a_paper(recipe: str, constraint: str) -> Figure:
    config = load_config(Path(recipe))
    assert config.published is not None
    published = config.published.points()[constraint]
    score = np.linspace(0.0, max(point.score.value for point in published), 15)
    curve = FrontierCurve(
        bound=Bound(constraint, ">=", float(score[5])),
        is_margin=True,
        reward_name="helpful",
        score_k=score,
        reward_k=1.0 - score**2,
        multiplier_k=score,
        reference=Outcome(Measured(0.0), Measured(0.0)),
        predicted=Outcome(Measured(float(score[5])), Measured(0.5)),
        published=published,
    )
    return frontier_figure(curve)


def _training(name: str = NAME, fraction: bool = True) -> Figure:
    loss = 40.0 + np.exp(-STEPS / 30)
    return training_figure(TrainingCurve(STEPS, loss, STEPS, loss, 100, 1 - np.exp(-STEPS / 30) if fraction else None))


def _comparison(name: str = NAME) -> Figure:
    reward = Comparison(name, None, Measured(0.0), Measured(1.0), Measured(0.9, (0.7, 1.1)))
    bound = Comparison(name, Bound(name, "<=", -0.5), Measured(0.0), Measured(-0.5), Measured(-0.4, (-0.6, -0.2)))
    return comparison_figure([reward, bound])


def _gold(name: str = NAME) -> Figure:
    return gold_figure([GoldComparison(name, (0.0, 1.0), (5.0, 4.0))])


def _ladder(name: str = NAME, *, corrected: float | None = 0.9, quarter: float = 1.3) -> Figure:
    rungs = np.array([128.0, 64.0, 32.0]), np.array([1.0, 1.1, quarter])
    return ladder_figure(LadderCurve(name, *rungs, STAR, corrected))


def _distributions(name: str = NAME, *, cut: float | None = 0.5) -> Figure:
    share = np.full((3, 8), 0.125)
    found = ScoreDistribution(name, np.linspace(-1.0, 3.0, 9), share, ("reference", "tilted", "trained"), cut)
    return distribution_figure([found, replace(found, share_kb=share[:2], policies=("reference", "tilted"))])


def _close_outcomes() -> FrontierCurve:
    """A run whose prediction, on train and on test prompts, and outcome lie on each other."""
    score = np.linspace(0.0, 2.0, 31)
    return FrontierCurve(
        bound=Bound(NAME, ">=", 0.8),
        is_margin=True,
        reward_name="helpful",
        score_k=score,
        reward_k=1.0 - score**2 / 2,
        multiplier_k=score,
        reference=Outcome(Measured(0.0), Measured(0.0)),
        predicted=Outcome(Measured(0.85), Measured(0.64)),
        predicted_test=Outcome(Measured(0.86), Measured(0.63)),
        realised=Outcome(Measured(0.84, (0.8, 0.88)), Measured(0.62, (0.6, 0.64))),
    )


FIGURES: dict[str, Callable[[], Figure]] = {
    "dual": _dual,
    "dual, no interval": lambda: _dual(star=Measured(0.0)),
    "frontier": _frontier,
    "frontier, upper bound": lambda: _frontier(direction="<="),
    "frontier, threshold far away": lambda: _frontier(threshold=-3.0),
    "frontier, beside MoCAN": lambda: _frontier_beside_a_paper("mocan-alpaca-7b", "harmless"),
    "frontier, beside two methods": lambda: _frontier_beside_a_paper("llama-2-7b-hh", "humour"),
    "sample size": lambda: sample_size_figure(np.array([0.02, 0.3, 0.31, 0.5, 1.0]), n_responses=64.0),
    "ladder": _ladder,
    "ladder, no correction": lambda: _ladder(corrected=None, quarter=np.nan),
    "training": _training,
    "training, no fraction": lambda: _training(fraction=False),
    "comparison": _comparison,
    "gold": _gold,
    "distributions": _distributions,
    "distributions, no cut": lambda: _distributions(cut=None),
    "frontier, outcomes on each other": lambda: frontier_figure(_close_outcomes()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_a_column_wide_and_not_empty(name: str, tmp_path: Path) -> None:
    png, svg, pdf = save_figure(FIGURES[name](), tmp_path / "figure")
    image = matplotlib.image.imread(png)
    height, width, _ = image.shape
    assert width == round(300 * COLUMN_INCHES)
    assert 0.3 < height / width < 1.4
    assert 0.01 < np.mean(image[..., :3].min(axis=-1) < 0.6) < 0.6
    assert svg.read_text().lstrip().startswith("<?xml")
    assert svg.read_text().count("<text") > 4  # letters that can be searched, not outlines of them
    assert pdf.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(name: str) -> None:
    figure = FIGURES[name]()
    require_nothing_cut_off(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_the_legend_is_not_over_data(name: str) -> None:
    figure = FIGURES[name]()
    with paper_style():
        figure.draw_without_rendering()
    (legend,) = figure.legends
    frame = legend.get_window_extent()
    assert not any(frame.overlaps(axes.get_window_extent()) for axes in figure.axes)


@pytest.mark.parametrize("make", [_dual, _frontier, _comparison, _gold, _distributions, _ladder])
def test_a_long_name_is_whole_or_shortened_but_not_cut_off(make: Callable[[str], Figure]) -> None:
    require_nothing_cut_off(make("factual_consistency_with_retrieved_documents_nli_score"))
    require_nothing_cut_off(make("harmlessness_of_all_answers_in_english"))


@pytest.mark.parametrize("make", [_dual, _frontier, _comparison, _gold, _distributions])
@pytest.mark.parametrize("name", ["a_b$c$_{x}", "質量", "🙂 ok", "\\frac"])
def test_any_name_can_be_drawn(make: Callable[[str], Figure], name: str, tmp_path: Path) -> None:
    """Mathematics is not interpreted, and missing glyphs (a warning, hence an error here) are replaced."""
    assert save_figure(make(name), tmp_path / "figure")[0].stat().st_size > 0


def test_the_same_data_give_the_same_files(tmp_path: Path) -> None:
    first, second = save_figure(_dual(), tmp_path / "a"), save_figure(_dual(), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"<dc:date>" not in first[1].read_bytes()


@pytest.mark.parametrize(("direction", "side"), [(">=", "left"), ("<=", "right")])
def test_the_shade_is_on_the_side_that_is_ruled_out(direction: str, side: str) -> None:
    axes = _frontier(direction=direction).axes[0]
    (shade,) = [patch for patch in axes.patches if patch.get_label() == "ruled out"]
    low, high = shade.get_extents().transformed(axes.transData.inverted()).intervalx
    threshold = 0.8 if direction == ">=" else -0.8
    assert (high if side == "left" else low) == pytest.approx(threshold)
    assert (low if side == "left" else high) == pytest.approx(axes.get_xlim()[0 if side == "left" else 1])


def test_each_published_method_has_a_marker_and_all_its_policies_are_drawn() -> None:
    axes = _frontier_beside_a_paper("mocan-alpaca-7b", "harmless").axes[0]
    drawn = {bars.get_label(): bars.lines[0].get_xdata() for bars in axes.containers}
    assert [len(drawn[name]) for name in ("MoCAN", "DPO helpfulness", "DPO safety")] == [8, 1, 1]
    assert drawn["MoCAN"][0] == -1.36  # figure 3 of arXiv 2405.19544, lambda 0.1


def test_the_far_end_of_a_frontier_does_not_crowd_out_the_run() -> None:
    score = np.linspace(0.0, 50.0, 101)
    origin, near = Outcome(Measured(0.0), Measured(0.0)), Outcome(Measured(1.0), Measured(5.0))
    bound = Bound(NAME, ">=", 1.0)
    figure = frontier_figure(FrontierCurve(bound, True, NAME, score, -score, score, origin, near))
    low, high = figure.axes[0].get_xlim()
    assert low < 0.0 < near.score.value < high < 25.0


def test_outcomes_that_lie_on_each_other_are_enlarged_where_nothing_is_drawn() -> None:
    curve = _close_outcomes()
    top = frontier_figure(curve).axes[0]
    (inset,) = top.child_axes
    low, high = inset.get_xlim()
    assert low < 0.8 < 0.88 < high < 1.0
    with paper_style():
        top.figure.draw_without_rendering()
    box = inset.get_window_extent()
    for score, gain in [(0.0, 0.0), *zip(curve.score_k, curve.reward_k, strict=True)]:
        assert not box.contains(*top.transData.transform((score, gain)))


def test_outcomes_that_are_apart_need_no_inset() -> None:
    far = replace(_close_outcomes(), predicted=Outcome(Measured(1.6), Measured(-0.2)))
    assert frontier_figure(far).axes[0].child_axes == []


def test_a_single_step_has_no_panel_of_losses() -> None:
    nothing, ends = np.empty(0), np.array([0.0, 1.0])
    figure = training_figure(TrainingCurve(nothing, nothing, ends, np.array([0.47, 0.39]), 1, np.array([0.0, 0.16])))
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == ["gap to optimum", "closed fraction"]


def test_the_training_gap_is_on_an_axis_of_powers_where_it_spans_one() -> None:
    gap = np.array([0.62, 0.2, 0.08, 0.05, 0.04, 0.039, 0.038, 0.037, 0.037, 0.036, 0.036])
    figure = training_figure(TrainingCurve(STEPS, gap, STEPS, gap, 100))
    with paper_style():
        figure.draw_without_rendering()
    middle = figure.axes[1]
    assert middle.get_yscale() == "log"
    low, high = middle.get_ylim()
    labels = [one.get_text() for one in middle.get_yticklabels() if low <= one.get_position()[1] <= high]
    assert labels == ["0.05", "0.1", "0.2", "0.5"]
    assert _training().axes[1].get_yscale() == "linear"


def test_prompts_left_of_the_line_lean_on_fewer_than_two_responses() -> None:
    axes = sample_size_figure(np.array([0.02, 0.3, 0.5]), n_responses=40.0).axes[0]
    (line,) = [one for one in axes.lines if "ESS = 2" in str(one.get_label())]
    assert line.get_xdata()[0] == pytest.approx(0.05)
