"""What every figure must be: whole, and with its legend beside the data."""

from __future__ import annotations

from matplotlib.figure import Figure

from pipeline.report.style import paper_style


def require_nothing_cut_off(figure: Figure) -> None:
    """Everything that is drawn lies within the figure."""
    with paper_style():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    # Two pixels of the screen: where the outermost glyph may touch the edge.
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02
