from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.dual_problems import draw_scores, problem_at_depth, two_responses
from helpers.figures import require_nothing_cut_off

from pipeline.baselines.geometry import (
    FRONTIER,
    POLICIES,
    SupportingLine,
    frontier_points,
    geometry_figure,
    multiplier_grid,
    supporting_line,
)
from pipeline.contracts.errors import InputError
from stage1_dual.dual import DualProblem, solve_dual

_BETA = 0.7


def _scores() -> tuple[np.ndarray, np.ndarray]:
    return draw_scores(n_prompts=30, n_responses=12, n_constraints=1, seed=0)


def _problem() -> DualProblem:
    return problem_at_depth(*_scores(), depth=0.4, beta=_BETA)


def _lam_star(problem: DualProblem) -> float:
    return float(solve_dual(problem).multipliers[0])


def _policies(*rows: tuple[str, float, float], interval: float | None = 0.05) -> pa.Table:
    def ends(name: str, value: float) -> dict[str, float | None]:
        low, high = (None, None) if interval is None else (value - interval, value + interval)
        return {name: value, f"{name}_ci95_low": low, f"{name}_ci95_high": high}

    return pa.Table.from_pylist(
        [{"method": method, **ends("slack", slack), **ends("value", value)} for method, slack, value in rows],
        schema=POLICIES,
    )


def test_the_frontier_lies_under_the_line_and_the_optimum_on_it() -> None:
    problem = _problem()
    lam_star = _lam_star(problem)
    line = supporting_line(problem, lam_star)
    frontier = frontier_points(problem, multiplier_grid(problem, lam_star))
    assert frontier.schema == FRONTIER
    slack, value = (frontier[name].to_numpy() for name in ("slack", "value"))
    assert np.all(value <= line.height(slack) + 1e-12)
    assert line.dual_value == pytest.approx(line.tangent_value + lam_star * line.tangent_slack, abs=1e-12)
    # The constraint binds: the line touches at slack 0, and its height there is the value of the problem.
    assert line.tangent_slack == pytest.approx(0.0, abs=1e-8)
    assert line.dual_value == pytest.approx(solve_dual(problem).primal_value, abs=1e-8)


def test_the_slope_of_the_edge_is_minus_the_multiplier() -> None:
    """A concave curve: between neighbours its slope lies between those of their supporting lines."""
    frontier = frontier_points(_problem(), np.linspace(-2.0, 4.0, 40))
    lam, slack, value = (frontier[name].to_numpy() for name in ("lam", "slack", "value"))
    slope = np.diff(value) / np.diff(slack)
    assert np.all(np.diff(slack) > 0)
    assert np.all((-lam[1:] <= slope) & (slope <= -lam[:-1]))


def test_two_responses_have_the_edge_of_the_binary_entropy() -> None:
    rho, a, beta = 1.0, 0.4, 0.5
    problem = two_responses(rho=rho, a=a, beta=beta)
    frontier = frontier_points(problem, [-3.0, 0.0, rho / (2 * a), 5.0])
    # Of scores a and -a, a slack of s is the probability (1 + s / a) / 2 of the first, whose reward is 0.
    first = 0.5 * (1.0 + frontier["slack"].to_numpy() / a)
    kl = first * np.log(2 * first) + (1 - first) * np.log(2 * (1 - first))
    assert frontier["kl"].to_numpy() == pytest.approx(kl, abs=1e-12)
    assert frontier["value"].to_numpy() == pytest.approx(rho * (1 - first) - beta * kl, abs=1e-12)
    # At lam* = rho / 2a both responses are as likely as under the reference.
    assert frontier["slack"].to_numpy()[2] == pytest.approx(0.0, abs=1e-12)


def test_a_policy_lies_below_the_line_by_beta_times_its_kl_to_the_optimum() -> None:
    r_pk, g_pkm = _scores()
    problem = _problem()
    lam_star = _lam_star(problem)
    line = supporting_line(problem, lam_star)
    n_responses = r_pk.shape[1]
    best_pk = np.exp((r_pk + lam_star * g_pkm[:, :, 0]) / _BETA)
    best_pk /= best_pk.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(1)
    for concentration in (0.3, 1.0, 10.0):
        policy_pk = np.maximum(rng.dirichlet(np.full(n_responses, concentration), size=len(r_pk)), 1e-300)
        kl = np.mean(np.sum(policy_pk * np.log(policy_pk * n_responses), axis=1))
        value = np.mean(np.sum(policy_pk * r_pk, axis=1)) - _BETA * kl
        slack = np.mean(np.sum(policy_pk * g_pkm[:, :, 0], axis=1)) - problem.thresholds_m[0]
        gap = float(line.height(np.array(slack)) - value)
        assert gap == pytest.approx(
            _BETA * np.mean(np.sum(policy_pk * np.log(policy_pk / best_pk), axis=1)), abs=1e-10
        )
        assert gap > 0


def test_the_reference_is_the_point_without_kl() -> None:
    r_pk, g_pkm = _scores()
    problem = _problem()
    line = supporting_line(problem, 0.5)
    assert line.reference_slack == pytest.approx(float(np.mean(g_pkm) - problem.thresholds_m[0]), abs=1e-12)
    assert line.reference_value == pytest.approx(float(np.mean(r_pk)), abs=1e-12)


def test_an_inactive_constraint_has_a_level_line() -> None:
    problem = problem_at_depth(*_scores(), depth=-0.9, beta=_BETA)
    lam_star = _lam_star(problem)
    line = supporting_line(problem, lam_star)
    assert lam_star == 0.0
    assert line.tangent_slack > 0
    assert line.dual_value == pytest.approx(line.tangent_value, abs=1e-12)
    grid = multiplier_grid(problem, lam_star)
    assert grid[0] < 0 < grid[-1]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda problem: frontier_points(problem, []), "`lam_grid` is"),
        (lambda problem: frontier_points(problem, [0.0, np.nan]), "`lam_grid` is"),
        (lambda problem: supporting_line(problem, -0.1), "`lam` is -0.1"),
        (lambda problem: supporting_line(problem, np.inf), "`lam` is inf"),
    ],
)
def test_bad_multipliers_are_named(ask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(_problem())


@pytest.mark.parametrize(
    "ask",
    [lambda problem: frontier_points(problem, [0.0]), lambda problem: supporting_line(problem, 0.0)],
)
def test_the_plane_is_that_of_one_constraint(ask: Any) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=3, n_responses=4, n_constraints=2, seed=0)
    with pytest.raises(InputError, match="has 2 constraints"):
        ask(DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.zeros(2), beta=1.0))


_ONE = _policies(("one-shot", 0.1, -0.9))
_SEVERAL = _policies(("one-shot", 0.1, -0.9), ("one-shot", -0.1, -0.8), ("multi-shot", 0.02, -0.7))


@pytest.mark.parametrize("policies", [_ONE, _SEVERAL, _policies(("a_b$c$", 0.0, -0.4), interval=None)])
def test_the_figure_stays_within_its_bounds(policies: pa.Table) -> None:
    figure = _draw(policies)
    require_nothing_cut_off(figure)
    (legend,) = figure.legends
    frame = legend.get_window_extent()
    assert not any(frame.overlaps(axes.get_window_extent()) for axes in figure.axes)
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[-len(set(policies["method"].to_pylist())) :] == list(dict.fromkeys(policies["method"].to_pylist()))


def test_every_policy_hangs_from_the_line_by_its_gap_and_is_seen_in_both_panels() -> None:
    figure = _draw(_SEVERAL)
    line = _line()
    for axes in figure.axes:
        drops = [
            segment
            for collection in axes.collections
            if collection.get_linestyle()[0][1] is not None  # dotted
            for segment in collection.get_segments()  # type: ignore[attr-defined]
        ]
        assert len(drops) == 3
        for (x, low), (_, high) in drops:
            assert high == pytest.approx(float(line.height(np.array(x))))
            assert low in (-0.9, -0.8, -0.7)
            assert axes.get_xlim()[0] < x < axes.get_xlim()[1]
            assert axes.get_ylim()[0] < low < high < axes.get_ylim()[1]
    top, bottom = figure.axes
    assert top.get_xlim()[0] < line.reference_slack < top.get_xlim()[1]
    assert np.ptp(bottom.get_xlim()) < np.ptp(top.get_xlim())


def _line() -> SupportingLine:
    problem = _problem()
    return supporting_line(problem, _lam_star(problem))


def _draw(policies: pa.Table) -> Any:
    problem = _problem()
    line = _line()
    frontier = frontier_points(problem, multiplier_grid(problem, line.lam))
    return geometry_figure(frontier, line, policies, looks={"one-shot": ("#0072B2", "o")})
