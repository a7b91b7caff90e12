from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.report.style import (
    COLUMN_INCHES,
    few_ticks,
    interval_bars,
    labelled,
    log_ticks,
    new_figure,
    paper_style,
    printable,
    save_figure,
)


def _drawn() -> Figure:
    with paper_style():
        figure = new_figure(height_inches=2.0)
        axes = figure.subplots()
        axes.plot([0.0, 1.0], [0.0, 1000.0], label="a $ sign")
        few_ticks(axes)
    return figure


def test_files_repeat_to_the_byte_whatever_the_users_settings(tmp_path: Path) -> None:
    first = save_figure(_drawn(), tmp_path / "new" / "one")
    with mpl.rc_context({"savefig.dpi": 50, "font.size": 20, "axes.spines.top": True, "svg.hashsalt": None}):
        second = save_figure(_drawn(), tmp_path / "two")
        assert mpl.rcParams["font.size"] == 20
    assert [path.suffix for path in first] == [".png", ".svg", ".pdf"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_column_of_a_paper_and_few_numbers() -> None:
    figure = _drawn()
    assert figure.get_size_inches()[0] == COLUMN_INCHES
    (axes,) = figure.axes
    assert len(axes.get_xticks()) <= 8  # six inside, at most one beyond each end
    assert len(axes.get_yticks()) <= 7


def test_error_bars_have_no_negative_length() -> None:
    bars = interval_bars([1.0, 2.0], [0.5, 2.0 + 1e-12], [3.0, 2.5])
    assert bars == pytest.approx(np.array([[0.5, 0.0], [2.0, 0.5]]))
    assert interval_bars(1.0, 0.0, 3.0).tolist() == [[1.0], [2.0]]


def test_a_label_has_two_lines_where_one_is_too_short() -> None:
    assert labelled("harmless", "mean score") == "harmless (mean score)"
    assert labelled("x" * 39, "mean score") == f"{'x' * 39}\n(mean score)"


def test_an_axis_of_powers_has_plain_numbers() -> None:
    with paper_style():
        figure = new_figure(height_inches=2.0)
        axes = figure.subplots()
        axes.plot([0.0, 1.0], [0.03, 0.7])
        log_ticks(axes)
        figure.draw_without_rendering()
    low, high = axes.get_ylim()
    labels = [one.get_text() for one in axes.get_yticklabels() if low <= one.get_position()[1] <= high]
    assert labels == ["0.05", "0.1", "0.2", "0.5"]


def test_a_name_that_the_font_cannot_write_is_marked() -> None:
    assert printable("harmless λ é") == "harmless λ é"
    assert printable("a\N{CJK UNIFIED IDEOGRAPH-4E2D}b") == "a\N{REPLACEMENT CHARACTER}b"
