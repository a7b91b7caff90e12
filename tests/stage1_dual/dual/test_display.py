"""Objects that print as tables: what a person reads of them, and how much."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

from stage1_dual.dual import DualProblem, bootstrap_intervals, certify, solve_dual
from stage1_dual.dual.display import MOST_LINES, Display

NAMES = ["harmless", "<polite> & short", "two\nlines"]


def _problem(names: list[str], n_prompts: int = 50) -> DualProblem:
    r_pk, g_pkm = draw_scores(n_prompts=n_prompts, n_responses=24, n_constraints=len(names), seed=1)
    thresholds_m = g_pkm.mean(axis=(0, 1)) + np.where(np.arange(len(names)) == 0, 0.3, -1.0)
    return DualProblem.from_arrays(r_pk, g_pkm, thresholds=thresholds_m, beta=0.7, constraint_names=names)


def _certificate(problem: DualProblem) -> object:
    return certify(problem, solve_dual(problem).multipliers)


def _intervals(problem: DualProblem) -> object:
    return bootstrap_intervals(problem, solve_dual(problem), rng=np.random.default_rng(0), n_replicates=20)


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, _: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("build", [lambda problem: problem, solve_dual, _certificate, _intervals])
@pytest.mark.parametrize("n_constraints", [0, 1, 3, 25])
def test_at_most_25_lines_whatever_the_size(build: Callable[[DualProblem], object], n_constraints: int) -> None:
    names = [*NAMES, *(f"constraint {number}" for number in range(60))][:n_constraints]
    lines = repr(build(_problem(names, n_prompts=60))).split("\n")
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 140
    assert not any(line != line.rstrip() for line in lines)


def test_what_a_problem_shows() -> None:
    problem = _problem(NAMES)
    text = repr(problem)
    assert "1,200 responses to 50 prompts" in text
    assert re.search(r"beta +0\.7\n", text)
    for name, b, mean in zip(NAMES, problem.thresholds_m, problem.reference_means_m, strict=True):
        shown = re.escape(name.replace("\n", " "))
        assert re.search(rf"{shown} +{re.escape(f'{b:.6g}')} +{re.escape(f'{mean:.6g}')} ", text), text


def test_what_a_solution_shows() -> None:
    problem = _problem(NAMES)
    solution = solve_dual(problem)
    text = repr(solution)
    assert f"KKT residual {solution.kkt_residual:.1e}, at most 1e-08" in text
    assert f"predicted {solution.predicted_reward:.6g}" in text
    assert f"predicted {solution.predicted_kl:.6g} nats" in text
    numbers = (solution.thresholds, solution.multipliers, solution.predicted_constraints, solution.slack)
    for name, *values in zip(solution.constraint_names, *numbers, strict=True):
        row = " +".join([re.escape(name.replace("\n", " ")), *(re.escape(f"{value:.6g}") for value in values)])
        assert re.search(row, text), (row, text)
    assert solution.constraint_names == problem.constraint_names
    np.testing.assert_array_equal(solution.thresholds, problem.thresholds_m)
    assert solution.beta == problem.beta


def test_dependent_constraints_are_named() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=12, n_constraints=1, seed=0)
    twice = np.concatenate([g_pkm, 2 * g_pkm], axis=2)
    thresholds = twice.mean(axis=(0, 1)) + np.array([0.3, 0.6])
    problem = DualProblem.from_arrays(r_pk, twice, thresholds=thresholds, beta=1.0, constraint_names=["a", "b"])
    assert re.search(r"not unique among +a, b\n", repr(solve_dual(problem)))


def test_a_certificate_shows_its_verdict() -> None:
    problem = _problem(NAMES)
    best = solve_dual(problem).multipliers
    assert repr(certify(problem, best)).startswith("Certificate: valid\n")
    assert repr(certify(problem, best + 0.1)).startswith("Certificate: not valid\n")


def test_intervals_show_low_and_high() -> None:
    problem = _problem(NAMES)
    intervals = bootstrap_intervals(problem, solve_dual(problem), rng=np.random.default_rng(0), n_replicates=20)
    low, high = intervals.multipliers[0]
    assert re.search(rf"harmless +\[{low:.6g}, {high:.6g}\]", repr(intervals))


@pytest.mark.parametrize("build", [lambda problem: problem, solve_dual, _certificate, _intervals])
def test_html_holds_the_same_and_escapes_names(build: Callable[[DualProblem], object]) -> None:
    built = build(_problem(NAMES))
    page: str = built._repr_html_()  # type: ignore[attr-defined]
    cells = _Cells()
    cells.feed(page)
    assert cells.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    words = set(" ".join(cells.texts).split())
    assert words == set(repr(built).replace("\n", " ").split())


def test_the_middle_of_a_long_table_is_left_out() -> None:
    display = Display("title", [("fact", "1")], ("name", "value"), [(f"row {i}", str(i)) for i in range(100)])
    lines = display.text().split("\n")
    assert len(lines) == MOST_LINES
    assert lines[3].split() == ["row", "0", "0"]
    assert lines[-1].split() == ["row", "99", "99"]
    (gap,) = [line for line in lines if "..." in line]
    assert gap.split() == ["...", str(100 - (len(lines) - 4)), "more"]


def test_equalities_and_a_kl_budget_are_said() -> None:
    problem = _problem(["share", "other"]).with_equalities([True, False]).with_kl_budget(0.4)
    assert "equal to their threshold  share" in repr(problem)
    assert re.search(r"KL budget +0\.4 nats", repr(problem))
    solution = solve_dual(problem)
    assert re.search(r"beta +[\d.]+, found for a KL budget of 0\.4 nats", repr(solution))
    assert "equal to their threshold  share" in repr(solution)
    intervals = bootstrap_intervals(problem, solution, rng=np.random.default_rng(0), n_replicates=20)
    assert re.search(r"beta +\[[\d.]+, [\d.]+\]", repr(intervals))
    assert "equal to" not in repr(_problem(["share", "other"]))
