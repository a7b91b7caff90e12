"""One look for all figures: single-column width, colours that colour-blind readers tell apart, nothing decorative."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

COLUMN_INCHES = 3.4
"""Width of one column of a two-column paper."""

# Okabe and Ito's colour-blind-safe palette (Color Universal Design, 2008).
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREY = "#6B6B6B"
INK = "#1A1A1A"
FORBIDDEN = "#ECECEC"
"""Shade of the side of a threshold that a constraint rules out."""

_LABEL_LENGTH = 40
_LINE_LENGTH = 46
_FONT = "DejaVu Sans"  # ships with matplotlib: the same figure on every machine
_RC: Any = {
    # Text stays text in SVG: a reader without the font sees its like.
    "font.family": "sans-serif",
    "font.sans-serif": [_FONT, "Verdana", "Arial"],
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a dollar sign in a user's name is a dollar sign
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "svg.hashsalt": "dualign",  # element ids, and so the files, repeat
}

# Nothing of the day or the machine: the same figure is the same file.
_METADATA: Mapping[str, Mapping[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw in the common look, whatever the user's own matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


class PaperFigure(Figure):
    """A figure that no window system knows about, and that a notebook shows all the same."""

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        with paper_style():
            self.savefig(sink, format="png", metadata={"Software": None})
        return sink.getvalue()


def new_figure(*, height_inches: float) -> Figure:
    """An empty figure of column width."""
    figure = PaperFigure(figsize=(COLUMN_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def interval_bars(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Lengths of error bars below and above, shape (2, n).

    A percentile interval may lie beside the mean it belongs to by a rounding; an error bar has no negative length.
    """
    value, low, high = (np.atleast_1d(np.asarray(numbers, dtype=np.float64)) for numbers in (value, low, high))
    return np.maximum([value - low, high - value], 0.0)


def few_ticks(*panels: Axes) -> None:
    """Six numbers at most on each horizontal axis, five on each vertical one."""
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def log_ticks(axes: Axes) -> None:
    """A vertical axis of powers, with plain numbers at 1, 2 and 5 of each."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend_above(figure: Figure, axes: Axes, *, columns: int) -> None:
    """A legend outside the axes: never over data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` (300 dpi), ``stem.svg`` and ``stem.pdf``.

    Returns:
        The paths, PNG first, SVG second.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    with paper_style():
        for kind, metadata in _METADATA.items():
            paths.append(stem.with_name(f"{stem.name}.{kind}"))
            figure.savefig(paths[-1], metadata=metadata)
    return paths


def labelled(name: str, quantity: str) -> str:
    """A label of a horizontal axis: a user's name and what is measured of it, on two lines where one is too short."""
    name = printable(name)
    return f"{name}{' ' if len(name) + len(quantity) < _LINE_LENGTH else chr(10)}({quantity})"


def printable(text: str, *, most: int = _LABEL_LENGTH) -> str:
    """A user's name as a label: of at most so many letters, with a mark for what is invisible or not in the font."""
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[1 - most // 2 :]}"
    known = FT2Font(findfont(FontProperties(family=_FONT))).get_charmap()
    return "".join(one if ord(one) in known and one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
