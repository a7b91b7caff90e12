"""What the two papers report, as data: reference points beside what a recipe gives.

``numbers.csv`` beside this file; its README says where each comes from and what to be careful of.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.contracts.errors import CorruptArtifactError

ONE_SHOT = "2405.19544"
"""arXiv number of the paper on one-shot alignment."""

ITERATIVE = "2505.19387"
"""arXiv number of the paper on the iterative method."""

COLUMNS = ("paper", "source", "method", "setting", "metric", "value", "low", "high", "read_off_plot", "note")


@dataclass(frozen=True)
class PublishedNumber:
    """One number of a paper.

    Attributes:
        paper: arXiv number.
        source: table or figure, or the notebook of the reference code.
        method: whose number it is.
        setting: such as ``lambda=0.35`` or ``b=5.4; responses=64``; several constraints as ``b=0.1,0.45``.
        metric: what was measured, in the units of the README beside the table.
        value: the number; None where only an interval is given.
        low: lower end of the 95% interval; None where none is given.
        high: its upper end.
        read_off_plot: whether the value was read off a figure: ±0.05 for scores, ±0.005 for win rates.
        note: what to be careful of.
    """

    paper: str
    source: str
    method: str
    setting: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    read_off_plot: bool
    note: str

    @property
    def parameters(self) -> Mapping[str, tuple[float, ...]]:
        """The setting as numbers: name to one value, or one a constraint."""
        pairs = (part.partition("=") for part in self.setting.split("; ") if "=" in part)
        return {name: tuple(float(number) for number in numbers.split(",")) for name, _, numbers in pairs}


@cache
def read_numbers() -> tuple[PublishedNumber, ...]:
    """All numbers, in the order of the file.

    Raises:
        CorruptArtifactError: the file has other columns, or a row is not of their types.
    """
    path = Path(__file__).parent / "numbers.csv"
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise CorruptArtifactError(f"{path} has the columns {reader.fieldnames}; they must be {COLUMNS}")
        return tuple(_row(row, place=f"{path}, line {reader.line_num}") for row in reader)


def _row(row: Mapping[str, str], *, place: str) -> PublishedNumber:
    texts = {name: row[name] for name in ("paper", "source", "method", "setting", "metric", "note")}
    try:
        value, low, high = (float(row[name]) if row[name] else None for name in ("value", "low", "high"))
        flag = {"yes": True, "no": False}[row["read_off_plot"]]
    except (KeyError, ValueError) as error:
        raise CorruptArtifactError(f"{place}: {error} is not of its column's type") from error
    if not all(number is None or math.isfinite(number) for number in (value, low, high)):
        raise CorruptArtifactError(f"{place}: a number is not finite")
    return PublishedNumber(value=value, low=low, high=high, read_off_plot=flag, **texts)
