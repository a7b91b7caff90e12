"""`dualign plan`: from a run, from a table, as JSON and for people, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

from pipeline.cli import main
from pipeline.contracts.errors import InputError
from pipeline.planning.sample_plan import PlanQuestion

KEYS = {
    "outcome",
    "prompts",
    "responses",
    "evaluation_prompts",
    "evaluation_responses",
    "within",
    "confidence",
    "trusted",
    "reasons",
    "costs",
    "warnings",
}
NUMBERS = ("prompts", "responses", "evaluation_prompts", "evaluation_responses", "miss_probability", "reward_cost")


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
    # Fewer responses give more of the reward away, and need more prompts; with too few nothing is said but why.
    given = [one for one in plan["alternatives"] if one["why_not"] is None]
    costs_of_few = [one["reward_cost"] for one in given]
    assert len(given) >= 2
    assert costs_of_few == sorted(costs_of_few, reverse=True)
    assert all(one["prompts"] is None and one["reward_cost"] is None for one in plan["alternatives"] if one["why_not"])


def test_a_demand_is_in_the_words_of_the_other_objects(table, capsys):
    each = ("--constraint", "share(harmless >= 0) >= 0.6", "--constraint", "cost <= ref - 0.2", "--json")
    ask(table, *each, "--within", "0.05")
    share, cost = json.loads(capsys.readouterr().out)["constraints"]
    assert (share["demand"], share["score"]) == ("share(harmless >= 0) >= 0.6", "harmless")
    assert (share["direction"], share["threshold"], share["margin"]) == (">=", 0.6, None)
    assert (cost["demand"], cost["statistic"]) == ("cost <= ref - 0.2", {"kind": "mean"})
    assert (cost["direction"], cost["margin"]) == ("<=", -0.2)
    reference = np.mean(pq.read_table(table)["cost"].to_numpy())
    assert cost["reference"] == pytest.approx(reference)
    assert cost["threshold"] == pytest.approx(reference - 0.2)
    assert "multiplier_standard_error" in cost


def test_a_person_reads_the_sizes_the_evaluation_and_the_demand(table, capsys):
    assert ask(table, "--constraint", "harmless >= ref + 0.4", "--within", "0.08") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Trust in the plan: OK" in text
    assert "train prompts with" in text
    assert "the evaluation of the tilted optimum says satisfied" in text
    assert ">= ref + 0.4" in text


def test_where_nothing_binds_it_says_what_is_true_and_no_size(table, capsys):
    demand = ("--constraint", "harmless >= ref - 2", "--within", "0.08")
    assert ask(table, *demand) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Nothing is to be planned: lambda* is 0, the policy of the reward alone already meets every demand" in text
    assert "harmless by 1.8" in text
    assert "30 test prompts with 32 responses each would prove it" in text
    assert "train prompts" not in text
    assert ask(table, *demand, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["outcome"], plan["trusted"], plan["prompts"], plan["responses"]) == (
        "nothing binds",
        True,
        None,
        None,
    )
    assert plan["constraints"][0]["expected_slack"] == pytest.approx(1.8, abs=0.05)
    assert plan["costs"]["responses"] == 2 * 30 * 32


@pytest.fixture(scope="module")
def small_tables(table, tmp_path_factory):
    """Pilots that do not carry a plan, each for another reason."""
    folder, whole = tmp_path_factory.mktemp("small"), pq.read_table(table)
    prompt_n = whole["prompt_id"].to_numpy()
    place_n = np.arange(len(prompt_n)) % 32
    outlier = whole["harmless"].to_numpy().copy()
    outlier[prompt_n < 2] *= 40
    found = {
        "prompts": whole.filter(prompt_n < 12),
        "responses": whole.filter(place_n < 4),
        "outlier": whole.set_column(2, "harmless", pa.array(outlier)),
        "constant": whole.set_column(2, "harmless", pa.array(np.ones(len(prompt_n)))),
    }
    for name, rows in found.items():
        pq.write_table(rows, folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize(
    ("pilot", "demand", "beta", "reason"),
    [
        ("prompts", "harmless >= ref + 0.4", "2", "12 prompts of the pilot"),
        ("responses", "harmless >= ref + 0.2", "2", "has 4 responses"),
        ("outlier", "harmless >= ref + 0.4", "2", "a few prompts of the pilot carry how prompts differ"),
        ("constant", "harmless >= 0.5", "2", "no prompt of the pilot has responses that differ"),
        ("", "harmless >= ref + 0.4", "0.02", "lean on fewer than 2 responses"),
        ("", 0.5, "2", "it may be 0"),
        ("", -1.5, "2", "it may bind"),
    ],
)
def test_what_is_not_trusted_prints_no_number_that_could_be_copied(
    table, small_tables, tmp_path, capsys, pilot, demand, beta, reason
):
    """Whatever the reason: no size, no cost, no figure, not even that of an earlier plan; and a script sees a 7."""
    if isinstance(demand, float):  # so many standard errors from what the reward alone meets
        ask(table, "--constraint", "harmless >= ref - 2", "--within", "0.08", "--json")
        (met,) = json.loads(capsys.readouterr().out)["constraints"]
        demand = f"harmless >= ref - {2 - met['expected_slack'] - demand * met['standard_error']}"
    path = small_tables / f"{pilot}.parquet" if pilot else table
    (tmp_path / "sample_sizes.png").touch()
    asked = ["plan", "--table", str(path), "--reward", "helpful", "--beta", beta, "--no-progress"]
    asked += ["--constraint", demand, "--within", "0.08", "--output", str(tmp_path)]
    assert main(asked) == 7
    printed = capsys.readouterr()
    text = " ".join(printed.out.split())
    assert "Trust in the plan: NONE" in text
    assert reason in text
    assert "no numbers are given" in printed.err
    for word in ("train prompts", "test prompts", "responses in all", "disk", "reward"):
        assert word not in text.partition("Advice")[2]
    assert main([*asked, "--json"]) == 7
    plan = json.loads(capsys.readouterr().out)
    assert (plan["outcome"], plan["trusted"]) == ("not trusted", False)
    assert any(reason in one for one in plan["reasons"])
    assert [plan[name] for name in (*NUMBERS, "costs", "instead")] == [None] * (len(NUMBERS) + 2)
    assert plan["alternatives"] == []
    assert [(one["expected_slack"], one["standard_error"]) for one in plan["constraints"]] == [(None, None)]
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("demand", "limits", "reason"),
    [
        ("harmless >= ref + 0.4", ("--responses", "2"), "2 responses a prompt are too few: a plan has at least 8"),
        ("harmless >= ref + 0.4", ("--responses", "16"), "16 responses a prompt leave the policy"),
        ("harmless >= ref + 0.4", ("--most-responses", "4"), "4 responses a prompt are too few"),
        ("harmless >= 0.4", ("--most-prompts", "40"), "with 40 prompts of"),
        ("harmless >= 0.4", ("--prompts", "40"), "with 40 prompts of"),
    ],
)
def test_limits_within_which_nothing_will_do_give_what_would_without_them(table, capsys, demand, limits, reason):
    asked = ("--constraint", demand, "--within", "0.08", *limits)
    assert ask(table, *asked) == 3
    printed = capsys.readouterr()
    text = " ".join(printed.out.split())
    assert reason in text
    assert "Without them" in text
    assert "no numbers of prompts and responses will do within these limits" in printed.err
    assert ask(table, *asked, "--json") == 3
    plan = json.loads(capsys.readouterr().out)
    assert (plan["outcome"], plan["trusted"]) == ("out of reach", True)
    assert [plan[name] for name in (*NUMBERS, "costs")] == [None] * (len(NUMBERS) + 1)
    assert f"{plan['instead']['prompts']:,} train prompts with {plan['instead']['responses']:,} responses" in text


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
        (("--within", "0.1", "--prompts", "40", "--most-prompts", "50"), "give one of them"),
        (("--within", "0.1", "--most-prompts", "20"), "`--most-prompts` is 20; it must be at least 30, the fewest"),
        (("--within", "0.1", "--prompts", "2"), "`--prompts` is 2; it must be at least 30, the fewest"),
        (("--within", "0.1", "--responses", "1"), "`--responses` is 1; it must be at least 2"),
    ],
)
def test_bad_numbers_are_named(table, capsys, arguments, message):
    assert ask(table, "--constraint", "harmless >= ref + 0.4", *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_readme_tells_what_the_plan_of_its_example_says(capsys):
    root = Path(__file__).parents[3]
    text = " ".join((root / "README.md").read_text().split())
    command = text.partition("`dualign plan --table ")[2].partition("`")[0]
    arguments = shlex.split(f"plan --table {command} --no-progress --json")
    arguments[2] = str(root / arguments[2])
    assert main(arguments) == 3
    plan = json.loads(capsys.readouterr().out)
    prompts, responses = plan["instead"]["prompts"], plan["instead"]["responses"]
    assert f"{prompts} prompts of {responses} responses, {prompts * responses:,} in all, will do" in text
    assert "32 responses a prompt leave the policy +0.0388 off" in plan["reasons"][0]
    assert "32 responses each leave the policy 0.039 beyond" in text


def test_a_constant_reward_is_said(table, tmp_path, capsys):
    whole = pq.read_table(table)
    path = tmp_path / "constant.parquet"
    pq.write_table(whole.set_column(1, "helpful", pa.array(np.full(whole.num_rows, 0.1))), path)
    assert ask(path, "--constraint", "harmless >= ref + 0.4", "--within", "0.08", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["reward_cost"] == 0
    assert "there is nothing to maximise" in plan["warnings"][0]


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
    assert "No numbers of prompts and responses will do" in capsys.readouterr().out
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
    assert dualign("plan", recipe, "--within", "0.05", "--json") == 7
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) >= KEYS
    assert plan["trusted"] is False  # a pilot of some twenty prompts x 6 responses
    assert plan["pilot"]["tokens_per_second"] > 0
    assert 0 < plan["pilot"]["tokens_per_response"] <= 12
    assert (run_folder(recipe) / "plan" / "plan.json").is_file()
    # A plan is no step: the run goes on as if there were none.
    assert dualign("stage1", recipe) == 0
