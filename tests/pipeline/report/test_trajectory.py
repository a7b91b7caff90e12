from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from helpers.figures import require_nothing_cut_off

from pipeline.report.trajectory import trajectory_figure, write_trajectory_figure

NAMES = ["harmless", "a_rather_long_name_of_a_constraint"]


def _trajectory(n_iterates: int = 4, kept: int = 2) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "iterate": iterate,
                "constraint": name,
                "slack": 0.1 * iterate - 0.2 + place,
                "slack_ci95_low": 0.1 * iterate - 0.3 + place,
                "slack_ci95_high": 0.1 * iterate - 0.05 + place,
                "multiplier": 0.5 + 0.1 * iterate + place,
                "kept": iterate == kept,
            }
            for iterate in range(n_iterates)
            for place, name in enumerate(NAMES)
        ]
    )


@pytest.mark.parametrize(("n_iterates", "kept"), [(1, 0), (4, 2)])
def test_every_iterate_is_drawn_and_the_kept_one_marked(n_iterates: int, kept: int) -> None:
    figure = trajectory_figure(_trajectory(n_iterates, kept))
    require_nothing_cut_off(figure)
    top, bottom = figure.axes
    multipliers = [line.get_ydata().tolist() for line in bottom.lines if line.get_label() == "_curve"]
    assert multipliers == [
        pytest.approx([0.5 + 0.1 * iterate + place for iterate in range(n_iterates)]) for place in range(2)
    ]
    for axes in (top, bottom):
        (mark,) = [line for line in axes.lines if line.get_label() == "iterate kept"]
        assert mark.get_xdata() == [kept, kept]


def test_it_is_written_as_png_svg_and_pdf(tmp_path: Path) -> None:
    paths = write_trajectory_figure(_trajectory(), tmp_path / "trajectory")
    assert [path.name for path in paths] == ["trajectory.png", "trajectory.svg", "trajectory.pdf"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_short_names_stand_side_by_side() -> None:
    renamed = _trajectory().to_pandas().replace({"constraint": {NAMES[1]: "humour"}})
    figure = trajectory_figure(pa.Table.from_pandas(renamed, preserve_index=False))
    require_nothing_cut_off(figure)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) == 3
    assert max(box.y0 for box in boxes) < min(box.y1 for box in boxes)
