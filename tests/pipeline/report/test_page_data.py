from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import pipeline.report.page as page
import pipeline.report.page_data as module
from pipeline.contracts.problem import Constraint
from pipeline.contracts.shards import write_table
from pipeline.contracts.tables import SAMPLES, tilted_schema
from pipeline.report.page_data import Command, cut_of, page_data, table_data
from pipeline.report.populations import MOST_TEXT_BYTES, Population, read_populations
from pipeline.report.readers import build_problem, read_frontier, read_tilted_scores
from pipeline.report.shell import packed
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


def test_what_depends_on_the_demand_and_is_kept_is_said(one_bound: Any) -> None:
    assert _data(one_bound)["kept"] == ""
    bound = one_bound.dual["constraints"][0]
    for safeguard, words in (
        ({"reserve": 0.1}, ""),
        ({"assurance": 0.1234, "response_bias": -0.02}, "harmless: assurance 0.123, response bias -0.02)"),
    ):
        entry = {**bound, "safeguard": {**bound["safeguard"], **safeguard}}
        solved = ReportedSolution.from_document({**one_bound.dual, "constraints": [entry]})
        said = _data(one_bound, solved)["kept"]
        assert words in said
        assert bool(said) is bool(words)


def test_the_page_of_a_table_has_the_same_demands(two_bounds: Any) -> None:
    solved = two_bounds.solved
    problem = build_problem(solved, read_tilted_scores(two_bounds.folder / "tilted", solved.names))
    frontier = read_frontier(two_bounds.folder / "dual" / "frontier.parquet", solved.names)
    of_a_run, of_a_table = _data(two_bounds), table_data(solved, problem, frontier)
    shared = {"constraints", "reward", "beta", "own", "live", "whyNotLive", "follows", "trust", "responses", "kept"}
    assert {name: of_a_run[name] for name in shared} == {name: of_a_table[name] for name in shared}
    assert of_a_run.keys() == of_a_table.keys()
    assert list(of_a_table["populations"]) == ["train"]


def _many_responses(rng: np.random.Generator, n_prompts: int, n_samples: int) -> Population:
    n = n_prompts * n_samples
    names = ("reward", "constraint_harmless", "weight")
    return Population(
        prompt_ids=tuple(f"p{place:05}" for place in range(n_prompts)),
        counts_p=np.full(n_prompts, n_samples),
        sample_index_n=np.tile(np.arange(n_samples), n_prompts),
        columns={name: rng.normal(size=n) for name in names},
        n_prompts_in_all=n_prompts,
    )


def _write_texts(folder: Path, rng: np.random.Generator, held: Population, schema: pa.Schema) -> None:
    """Responses of 300 letters that no compression makes small, one very long one among them."""
    n = len(held.sample_index_n)
    letters = rng.integers(33, 127, 200_000, dtype=np.uint8).tobytes().decode()
    texts = [letters[start : start + 300] for start in rng.integers(0, 199_000, n).tolist()]
    texts[0] = "long" * 1_000_000
    columns: dict[str, Any] = {
        "prompt_id": np.repeat(held.prompt_ids, held.counts_p).tolist(),
        "sample_index": held.sample_index_n,
        "completion": texts,
        "prompt": [[{"role": "user", "content": "What now?"}]] * n,
        "split": ["test"] * n,
        "category": [""] * n,
        "finish_reason": ["stop"] * n,
        "prompt_token_ids": [[1]] * n,
        "completion_token_ids": [[1]] * n,
        "seed": held.sample_index_n,
        **{name: np.zeros(n) for name in ("reward", "constraint_harmless", "weight", "sampler_logp")},
    }
    if "split" not in schema.names:
        schema = schema.append(pa.field("split", pa.string(), nullable=False))
    write_table(folder, pa.table({name: columns[name] for name in schema.names}, schema=schema), metadata={})


def test_a_run_that_is_too_large_for_a_page_is_held_in_part_and_fits(one_bound: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    test, policy = _many_responses(rng, 250, 120), _many_responses(rng, 250, 160)
    _write_texts(tmp_path / "tilted", rng, test, tilted_schema(["harmless"]))
    _write_texts(tmp_path / "evaluation" / "samples", rng, policy, SAMPLES)
    populations = {"train": _many_responses(rng, 2000, 100), "test": test, "policy": policy}
    solved = one_bound.solved
    problem = build_problem(solved, read_tilted_scores(one_bound.folder / "tilted", solved.names))
    frontier = read_frontier(one_bound.folder / "dual" / "frontier.parquet", solved.names)
    data = page_data(tmp_path, solved, problem, frontier, populations)

    most = module._MOST_SCORE_BYTES
    counts = {name: np.array(one["counts"]) for name, one in data["populations"].items()}
    sizes = {name: 4 * 2 * int(counts_p.sum()) for name, counts_p in counts.items()}
    assert 0.95 * most["train"] < sizes["train"] <= most["train"]
    assert 0.95 * most["policy"] < sizes["policy"] <= most["policy"]
    assert len(counts["train"]) == 1250
    assert "1,250 of 2,000 prompts, evenly taken" in data["whyNotLive"]
    # The same prompts of both policies, and as many of both.
    assert len(counts["test"]) == len(counts["policy"]) == 234
    prompts = data["browser"]["prompts"]
    assert all(one["place"] == one["policyPlace"] for one in prompts)
    assert {(len(one["texts"]), len(one["policyTexts"])) for one in prompts} == {(8, 8)}
    assert "234 of 250 prompts, evenly taken, and the first 8 responses to each" in data["browser"]["note"]
    assert max(len(text) for one in prompts for text in one["texts"]) < 10_100

    # What is compressed is scores, which hardly become smaller, and texts; a 32nd is for all else. Then base64.
    in_page = len(packed(data))
    assert 0.9 < in_page / (4 / 3 * (sum(sizes.values()) + MOST_TEXT_BYTES)) < 33 / 32
    bounded = page._MOST_FIGURE_BYTES + page._MOST_TABLE_BYTES + 2 * page._MOST_DOCUMENT_BYTES
    libraries = sum(path.stat().st_size for path in (Path(page.__file__).parent / "vendor").glob("*.js"))
    assert 4 / 3 * (33 / 32 * (sum(most.values()) + MOST_TEXT_BYTES) + bounded) + libraries < 7_000_000


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
