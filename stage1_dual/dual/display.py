"""What a person reads of an object: some facts, then a table, in at most 25 lines of text or as HTML.

Numbers are rounded to six digits; the objects themselves hold all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.segments import FloatArray

MOST_LINES = 25


@dataclass(frozen=True)
class Display:
    """A title, facts and a table.

    Attributes:
        title: what it is.
        facts: name and value of each.
        header: names of the columns; the first holds texts, the others numbers. Empty where there is no table.
        rows: one text a column; those in the middle are left out where they are too many for ``MOST_LINES``.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def text(self) -> str:
        """Plain text of at most ``MOST_LINES`` lines, none ending in spaces."""
        width = max((len(name) for name, _ in self.facts), default=0)
        lines = [self.title, *(f"  {name:<{width}}  {_on_one_line(value)}" for name, value in self.facts)]
        if self.header:
            table = [list(map(_on_one_line, row)) for row in (self.header, *self._shown_rows())]
            widths = [max(len(row[column]) for row in table) for column in range(len(self.header))]
            lines += [
                "  " + "  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in table
            ]
        return "\n".join(line.rstrip() for line in lines)

    def html(self) -> str:
        """The same as HTML tables; texts are escaped."""
        facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self.facts)
        parts = [f"<p>{escape(self.title)}</p>", f"<table>{facts}</table>"]
        if self.header:
            head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._shown_rows()
            )
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        return "".join(parts)

    def _shown_rows(self) -> list[Sequence[str]]:
        room = MOST_LINES - 2 - len(self.facts)
        if len(self.rows) <= room:
            return list(self.rows)
        first, last = room // 2, (room - 1) // 2
        gap = [f"... {len(self.rows) - first - last} more", *[""] * (len(self.header) - 1)]
        return [*self.rows[:first], gap, *self.rows[len(self.rows) - last :]]


def number(value: float) -> str:
    """A number with six significant digits at most."""
    return f"{value:.6g}"


def some(texts: Sequence[str]) -> str:
    """The first eight texts with commas between them, and how many more there are."""
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return ", ".join(texts[:8]) + more


def describe_equalities(names: Sequence[str], is_equality_m: NDArray[np.bool_]) -> list[tuple[str, str]]:
    """The fact that names the constraints that are equalities, shape (m,); no fact where none is."""
    equal = [name for name, is_equality in zip(names, is_equality_m, strict=True) if is_equality]
    return [("equal to their threshold", some(equal))] if equal else []


def interval(bounds: FloatArray) -> str:
    """Two numbers, low and high, shape (2,)."""
    low, high = map(float, bounds)
    return f"[{number(low)}, {number(high)}]"


def _on_one_line(text: str) -> str:
    """Names are the user's, and may hold line breaks."""
    return " ".join(text.split())
