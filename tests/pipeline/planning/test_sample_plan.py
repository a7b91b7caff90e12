"""`dualign plan`: from a run, from a table, as JSON and for people, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

from pipeline.cli import main
from pipeline.contracts.errors import InputError
from pipeline.planning.sample_plan import PlanQuestion

KEYS = {
    "prompts",
    "responses",
    "evaluation_prompts",
    "evaluation_responses",
    "within",
    "confidence",
    "trusted",
    "reasons",
    "costs",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """64 prompts x 32 responses with a reward and two scores."""
    rng = np.random.default_rng(0)
    shape = (64, 32)
    reward = rng.normal(size=shape)
    columns = {
        "prompt_id": np.repeat(np.arange(64), 32),
        "helpful": reward.ravel(),
        "harmless": (-0.4 * reward + rng.normal(size=shape) + rng.normal(size=(64, 1)) / 2).ravel(),
        "cost": np.exp(0.4 * reward + 0.4 * rng.normal(size=shape)).ravel(),
    }
    path = tmp_path_factory.mktemp("pilot") / "pilot.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def ask(table, *arguments):
    return main(["plan", "--table", str(table), "--reward", "helpful", "--beta", "2", "--no-progress", *arguments])


def test_a_table_gives_one_json_object(table, tmp_path, capsys):
    arguments = ("--constraint", "harmless >= ref + 0.4", "--within", "0.08", "--json")
    costs = ("--tokens-per-response", "100", "--tokens-per-second", "1000")
    assert ask(table, *arguments, *costs, "--output", str(tmp_path / "out")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) >= KEYS
    assert plan["trusted"] is True
    assert plan["reasons"] == []
    assert plan["within"] == 0.08
    assert plan["miss_probability"] <= 0.05
    in_all = plan["prompts"] * plan["responses"]
    in_all += plan["evaluation_prompts"] * (plan["responses"] + plan["evaluation_responses"])
    assert plan["costs"]["responses"] == in_all
    assert plan["costs"]["tokens"] == 100 * in_all
    assert plan["costs"]["hours"] == pytest.approx(in_all / 10 / 3600)
    assert plan["costs"]["bytes"] == pytest.approx(in_all * table.stat().st_size / 2048, rel=1e-3)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"plan.json", *(f"sample_sizes.{kind}" for kind in ("png", "pdf", "svg"))}
    assert set(plan["files"]) == {str(tmp_path / "out" / name) for name in names}
    # Fewer responses give more of the reward away, and need more prompts.
    costs_of_few = [one["reward_cost"] for one in plan["alternatives"]]
    assert costs_of_few == sorted(costs_of_few, reverse=True)


def test_a_person_reads_the_sizes_the_evaluation_and_why_not(table, capsys):
    assert ask(table, "--constraint", "harmless >= ref + 0.4", "--within", "0.08") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Trust in the plan: OK" in text
    assert "train prompts with" in text
    assert "the evaluation of the tilted optimum says satisfied" in text
    assert ask(table, "--constraint", "harmless >= ref - 2", "--within", "0.08") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Trust in the plan: NONE" in text
    assert "lambda* is 0" in text


def test_each_constraint_may_have_its_own_number(table, capsys):
    both = ("--constraint", "harmless >= ref + 0.3", "--constraint", "cost <= ref - 0.2", "--json")
    assert ask(table, *both, "--within", "0.1", "--within", "cost=0.05") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["within"] == {"harmless": 0.1, "cost": 0.05}
    assert [one["within"] for one in plan["constraints"]] == [0.1, 0.05]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "`--within` is not given"),
        (("--within", "0"), "`--within` is 0; it must be a positive"),
        (("--within", "nan"), "`--within` is nan"),
        (("--within", "much"), "it must be NUMBER or NAME=NUMBER"),
        (("--within", "0.1", "--within", "0.2"), "given twice"),
        (("--within", "hramless=0.1"), "names 'hramless'; the constraints are harmless"),
        (("--within", "0.1", "--confidence", "0.4"), "`--confidence` is 0.4"),
        (("--within", "0.1", "--confidence", "0.99999999"), "`--confidence` is 0.99999999; it must be"),
        (("--within", "0.1", "--tokens-per-second", "0"), "`--tokens-per-second` is 0; it must be a positive"),
        (("--within", "0.1", "--tokens-per-response", "-5"), "`--tokens-per-response` is -5"),
        (("--within", "0.1", "--prompts", "10", "--most-prompts", "20"), "give one of them"),
        (("--within", "0.1", "--responses", "1"), "`--responses` is 1; it must be at least 2"),
    ],
)
def test_bad_numbers_are_named(table, capsys, arguments, message):
    assert ask(table, "--constraint", "harmless >= ref + 0.4", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(table, tmp_path, capsys):
    (tmp_path / "taken").touch()
    taken = ("--within", "0.08", "--output", str(tmp_path / "taken"))
    assert ask(table, "--constraint", "harmless >= ref + 0.4", *taken) == 2
    assert f"{tmp_path / 'taken'} cannot be written" in capsys.readouterr().err


def test_what_cannot_be_planned_is_said(table, capsys):
    assert ask(table, "--constraint", "cvar(harmless, 0.1) >= -4", "--within", "0.1") == 2
    assert "which no plan covers" in capsys.readouterr().err
    assert ask(table, "--constraint", "harmless >= ref + 9", "--within", "0.1") == 3
    assert ask(table, "--constraint", "harmless >= ref + 0.4", "--within", "1e-9") == 3
    assert "No number of prompts will do" in capsys.readouterr().out
    with pytest.raises(InputError, match="no number for 'b'"):
        PlanQuestion({"a": 0.1}).of(["a", "b"])


@pytest.mark.slow
def test_a_runs_own_scores_are_a_pilot(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert dualign("plan", recipe, "--within", "0.05") == 2
    assert "`dualign prepare` makes it" in capsys.readouterr().err
    for step in ("prepare", "sample", "score"):
        assert dualign(step, recipe) == 0
    capsys.readouterr()
    assert dualign("plan", recipe, "--within", "0.05", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) >= KEYS
    assert plan["trusted"] is False  # a pilot of some twenty prompts x 6 responses
    assert plan["evaluation_responses"] == 64
    assert plan["pilot"]["tokens_per_second"] > 0
    assert 0 < plan["pilot"]["tokens_per_response"] <= 12
    assert plan["costs"]["device_hours"] > 0
    assert (run_folder(recipe) / "plan" / "plan.json").is_file()
    # A plan is no step: the run goes on as if there were none.
    assert dualign("stage1", recipe) == 0
