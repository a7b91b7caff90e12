"""The plane of several runs: every run in it, whatever its numbers are, and nothing cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.figures import require_nothing_cut_off

from pipeline.report.compared import ComparedScore, Plane, PlanePoint
from pipeline.report.plane_figure import plane_figure
from pipeline.report.style import INK, save_figure

REWARD = ComparedScore("helpful", "helpful", True, 0.6, 0.5, (0.4, 0.6))
BOUND = ComparedScore("harmless", "harmless", True, 0.8, 0.9, (0.8, 1.0), ">=", 0.8, 0.7, (0.6, 0.8), "satisfied")


def plane(*points: PlanePoint, is_gain: bool = True) -> Plane:
    return Plane("helpful", "harmless", is_gain, points)


@pytest.mark.parametrize(
    "points",
    [
        [PlanePoint("one", BOUND, REWARD)],
        [PlanePoint("one", replace(BOUND, realised=None, ci95=None), replace(REWARD, realised=None, ci95=None))],
        [PlanePoint("open", replace(BOUND, ci95=(None, 1.0)), REWARD)],
        [PlanePoint(f"a run with a long name, number {n}", replace(BOUND, demanded=n / 9), REWARD) for n in range(9)],
        [PlanePoint("$x_1$ \x07 名前", replace(BOUND, predicted=1e6, realised=1e6, ci95=(1e6, 1e6)), REWARD)],
    ],
)
def test_nothing_is_cut_off(points: list[PlanePoint], tmp_path: Path) -> None:
    figure = plane_figure(plane(*points))
    require_nothing_cut_off(figure)
    assert save_figure(figure, tmp_path / "plane")[0].stat().st_size > 0


def test_every_run_has_a_label_and_its_own_mark() -> None:
    points = [PlanePoint(f"run {n}", BOUND, REWARD) for n in range(12)]
    axes = plane_figure(plane(*points)).axes[0]
    _handles, labels = axes.get_legend_handles_labels()
    assert labels[:13].count("reference") == 1
    assert {f"run {n}" for n in range(12)} <= set(labels)
    marks = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_markersize() == 7}
    assert len(marks) == 12


def test_demands_that_differ_have_the_colours_of_their_runs() -> None:
    def lines(*demands: float) -> list[object]:
        points = [PlanePoint(f"run {n}", replace(BOUND, demanded=at), REWARD) for n, at in enumerate(demands)]
        axes = plane_figure(plane(*points)).axes[0]
        return [line.get_color() for line in axes.lines if line.get_label() == "_demand"]

    own = [
        line.get_color()
        for line in plane_figure(plane(*[PlanePoint(f"{n}", BOUND, REWARD) for n in range(3)])).axes[0].lines
        if line.get_markersize() == 7
    ]
    assert lines(0.8, 0.8, 0.8) == [INK]
    assert lines(0.8, 0.8, 0.5) == [INK, own[2]]


def test_a_mean_has_no_reference_at_zero() -> None:
    _, labels = (
        plane_figure(plane(PlanePoint("one", BOUND, REWARD), is_gain=False)).axes[0].get_legend_handles_labels()
    )
    assert "reference" not in labels
