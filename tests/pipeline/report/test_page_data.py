from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pipeline.report.page_data as module
from pipeline.contracts.problem import Constraint
from pipeline.report.page_data import Command, cut_of, page_data
from pipeline.report.populations import read_populations
from pipeline.report.readers import build_problem, read_frontier, read_tilted_scores
from pipeline.report.solved import ReportedSolution

pytestmark = pytest.mark.slow


def _data(run: Any, solved: ReportedSolution | None = None, **changes: Any) -> dict[str, Any]:
    solved = solved or run.solved
    parts: dict[str, Any] = {
        "frontier": read_frontier(run.folder / "dual" / "frontier.parquet", solved.names),
        "populations": read_populations(run.folder, solved, drops_cut_off=False),
        **changes,
    }
    problem = build_problem(solved, read_tilted_scores(run.folder / "tilted", solved.names))
    return page_data(run.folder, solved, problem, parts["frontier"], parts["populations"], parts.get("commands", {}))


def test_the_problem_is_that_of_the_dual(two_bounds: Any) -> None:
    data = _data(two_bounds, commands={"toxicity": Command("dualign {}", "Does it.")})
    assert (data["live"], data["whyNotLive"], data["follows"], data["judged"]) == (True, "", True, "test")
    harmless, toxicity = data["constraints"]
    entry = two_bounds.dual["constraints"]
    assert (harmless["unit"], harmless["demanded"], harmless["added"], harmless["sign"]) == ("margin", 0.8, 0.0, 1)
    assert harmless["origin"] == entry[0]["reference"]
    assert (toxicity["unit"], toxicity["demanded"], toxicity["origin"], toxicity["sign"]) == (
        "threshold",
        -0.2,
        0.0,
        -1,
    )
    assert (harmless["command"], toxicity["command"]) == (None, "dualign {}")
    for one in data["constraints"]:
        frontier = one["frontier"]
        assert frontier["asked"] == sorted(frontier["asked"])
        own = int(np.argmin(np.abs(np.array(frontier["asked"]) - one["demanded"])))
        assert frontier["multipliers"][own] == pytest.approx([bound["multiplier"] for bound in entry])
        assert frontier["kl"][own] == pytest.approx(two_bounds.dual["kl"]["predicted"])
    assert data["own"]["multipliers"] == [bound["multiplier"] for bound in entry]
    assert [score["name"] for score in data["scores"]] == ["helpful", "harmless", "toxicity"]
    assert [score["side"] for score in data["scores"]] == [">=", ">=", "<="]


def test_what_a_safeguard_adds_is_kept_beside_the_demand(one_bound: Any) -> None:
    bound = one_bound.dual["constraints"][0]
    asked = {**bound, "demanded": {**bound["demanded"], "margin": 0.7}}
    solved = ReportedSolution.from_document({**one_bound.dual, "constraints": [asked]})
    (one,) = _data(one_bound, solved)["constraints"]
    assert one["demanded"] == 0.7
    assert one["added"] == pytest.approx(0.1)


def test_why_a_page_does_not_solve_is_said(two_bounds: Any, build_run: Any) -> None:
    budget = ReportedSolution.from_document({**two_bounds.dual, "kl_budget": 0.4})
    assert "β moves" in _data(two_bounds, budget)["whyNotLive"]
    bound = {**two_bounds.dual["constraints"][0], "column_ratio": 0.3}
    ratio = ReportedSolution.from_document(
        {**two_bounds.dual, "constraints": [bound, two_bounds.dual["constraints"][1]]}
    )
    assert "ratio" in _data(two_bounds, ratio)["whyNotLive"]
    populations = read_populations(two_bounds.folder, two_bounds.solved, drops_cut_off=False)
    populations["train"] = replace(populations["train"], n_prompts_in_all=100_000)
    data = _data(two_bounds, populations=populations)
    assert not data["live"]
    assert "27 of 100,000 prompts" in data["whyNotLive"]


def test_a_frontier_of_an_older_version_moves_nothing(one_bound: Any) -> None:
    frontier = read_frontier(one_bound.folder / "dual" / "frontier.parquet", ["harmless"])
    assert _data(one_bound, frontier=frontier.drop_columns(["beta"]))["constraints"][0]["frontier"]["beta"][0] == 1.0
    for name in ("margin", "kl", "ess_median"):
        assert _data(one_bound, frontier=frontier.drop_columns([name]))["constraints"][0]["frontier"] is None
    assert _data(one_bound, frontier=frontier.slice(0, 1))["constraints"][0]["frontier"] is None


def test_of_many_constraints_those_that_cost_most_can_be_moved(
    two_bounds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_SLIDERS", 1)
    movable = [one["frontier"] is not None for one in _data(two_bounds)["constraints"]]
    assert sum(movable) == 1


def test_a_cut_is_where_the_demand_is(two_bounds: Any, build_run: Any) -> None:
    solved = two_bounds.solved
    assert cut_of(solved, "toxicity") == -0.2
    assert cut_of(solved, "harmless") == two_bounds.dual["constraints"][0]["demanded"]["threshold"]
    assert cut_of(solved, "another") is None
    share = {**two_bounds.dual["constraints"][0], "statistic": {"kind": "share", "at_least": 0.25}}
    of_share = ReportedSolution.from_document({**two_bounds.dual, "constraints": [share]})
    assert cut_of(of_share, "harmless") == 0.25


def test_before_stage_2_there_is_no_policy(build_run: Any) -> None:
    run = build_run([Constraint("harmless", ">=", margin=0.3)], has_stage2=False, n_prompts=12, n_samples=8)
    data = _data(run)
    assert list(data["populations"]) == ["train", "test"]
    assert data["browser"]["note"] == "All 32 responses of the reference to 4 test prompts."
