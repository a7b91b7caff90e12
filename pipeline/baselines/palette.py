"""Colours of series that a figure of the experiments tells apart: Okabe and Ito's, beside those of the report."""

from __future__ import annotations

from pipeline.report.style import BLUE, INK, VERMILLION

GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"

SERIES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"), (INK, "X"))
"""Colour and marker of each series of a figure, in order."""
