"""What an object shows of itself: never more than 25 lines, and always what was left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.joined_scores import join

from pipeline.contracts.problem import Constraint
from pipeline.dual.posing import pose
from pipeline.dual.sweep import solve_points
from pipeline.report.summary import MAX_LINES, frontier_view, html_summary, text_summary
from pipeline.report.views import Badge, Cell, Row, TableView


def view(n_constraints: int, *, name: str = "score", verdict: str = "", n_warnings: int = 0) -> TableView:
    rows = tuple(
        Row((Cell(f"{name}{place}", "binding"), Cell(">= 0.000", "ref + 0.1"), Cell("1.000", "[0.9, 1.1]")))
        for place in range(n_constraints)
    )
    return TableView(
        title="What it is about",
        header=(Cell("score", "verdict"), Cell("demanded", "as given"), Cell("lambda*", "95% interval")),
        rows=rows,
        badges=(Badge("Trust in lambda*", "weak", "doubtful", (verdict,)),) if verdict else (),
        facts=(("KL", "0.5 nats"), ("solution", "certified")),
        warnings=tuple(f"warning number {place}" for place in range(n_warnings)),
    )


def test_a_small_table_is_shown_whole() -> None:
    text = text_summary(view(3, verdict="Trust: ok.", n_warnings=1))
    assert text.splitlines()[0] == "What it is about"
    for part in ("score0", "score2", "[0.9, 1.1]", "Trust: ok.", "certified", "warning number 0"):
        assert part in text


@pytest.mark.parametrize(
    "long",
    [
        view(30),
        view(2, n_warnings=40),
        view(3, verdict="\n".join(["UNRELIABLE: " + "so many reasons " * 30] * 8)),
        view(20, name="a name without an end " * 30, verdict="WEAK: " + "x" * 900, n_warnings=30),
        replace(view(4), facts=(("ladder", "1.0 <- 1.1; " * 200),)),
    ],
)
def test_a_long_one_says_what_it_leaves_out(long: TableView) -> None:
    lines = text_summary(long).splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= 100
    assert any("more rows" in line or "more warnings" in line or line.rstrip().endswith("...") for line in lines)
    assert html_summary(long).count("<tr>") <= MAX_LINES


def test_rows_are_counted_that_are_left_out() -> None:
    lines = text_summary(view(30)).splitlines()
    shown = sum("score" in line and "verdict" not in line for line in lines) - 1  # the header
    assert any(f"and {30 - shown} more rows" in line for line in lines)


def test_html_escapes_the_users_names() -> None:
    html = html_summary(view(1, name="<script>&", verdict="a < b"))
    assert "&lt;script&gt;&amp;0" in html
    assert "a &lt; b" in html
    assert "<script>" not in html


def test_a_frontier_marks_what_is_infeasible() -> None:
    rng = np.random.default_rng(0)
    rows = join({f"p{p:02d}": [(*rng.normal(size=2), False) for _ in range(16)] for p in range(20)})
    points = [[Constraint("harmless", ">=", threshold=value)] for value in (0.0, 0.5, 99.0)]
    found = frontier_view(solve_points(pose(rows, constraints=points[0], beta=1.0), points, swept=[0]))
    assert found.title == "Frontier: 3 thresholds, 2 of them feasible"
    *feasible, last = found.rows
    assert [row.cells[-1].value for row in feasible] == ["", ""]
    assert last.cells[1].value == "99.00"
    assert last.cells[3].value == "-"
    assert last.cells[-1].value == "infeasible"
