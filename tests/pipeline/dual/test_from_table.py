"""`dualign solve --table` and `frontier --table` through the command line, on Parquet from anywhere."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.dual.from_table
import pipeline.dual.table_reader
import stage1_dual.dual.on_disk
from pipeline.cli import main
from stage1_dual.dual import DualProblem, group_on_disk, solve_dual

pytestmark = pytest.mark.slow

N_PROMPTS, N_RESPONSES = 90, 24
ASKED = ["--reward", "helpful", "--constraint", "harmless >= ref + 0.4", "--constraint", "toxicity <= 0.1"]


def draw(seed=0):
    rng = np.random.default_rng(seed)
    harmless = rng.normal(size=(N_PROMPTS, N_RESPONSES))
    helpful = -0.5 * harmless + rng.normal(size=harmless.shape)
    return helpful, harmless, -0.3 * harmless + rng.normal(size=harmless.shape)


def columns(*, ids=None, order=None):
    helpful, harmless, toxicity = draw()
    table = {
        "prompt_id": np.repeat([f"p{i:03d}" for i in range(N_PROMPTS)] if ids is None else ids, N_RESPONSES),
        "helpful": helpful.reshape(-1),
        "harmless": harmless.reshape(-1),
        "toxicity": toxicity.reshape(-1),
    }
    return {name: values if order is None else values[order] for name, values in table.items()}


def solve(table: Path, output: Path, *more: str, expect: int = 0) -> dict:
    code = main(
        ["solve", "--table", str(table), *ASKED, "--beta", "1.0", "--output", str(output), "--no-progress", *more]
    )
    assert code == expect
    if code:
        return {}
    return json.loads((output / "dual.json").read_text())


def expected():
    helpful, harmless, toxicity = draw()
    g_pkm = np.stack([harmless, -toxicity], axis=2)
    problem = DualProblem.from_arrays(helpful, g_pkm, thresholds=[harmless.mean() + 0.4, -0.1], beta=1.0)
    return problem, solve_dual(problem)


def write(path: Path, table: dict) -> Path:
    pq.write_table(pa.table(table), path)
    return path


def test_rows_in_any_order_give_everything_that_is_promised(tmp_path, capsys):
    order = np.random.default_rng(1).permutation(N_PROMPTS * N_RESPONSES)
    table = columns(order=order)
    output = tmp_path / "out"
    dual = solve(write(tmp_path / "t.parquet", table), output)
    problem, solution = expected()
    assert [entry["multiplier"] for entry in dual["constraints"]] == pytest.approx(solution.multipliers, abs=1e-10)
    assert dual["status"] == "certified"
    assert "helpful" in capsys.readouterr().out
    weights = pq.read_table(output / "weights.parquet")
    assert weights.column_names == ["prompt_id", "sample_index", "weight"]
    assert weights["prompt_id"].to_pylist() == list(table["prompt_id"])
    assert weights["sample_index"].to_pylist() == list(range(len(order)))
    w_n = problem.tilted_weights(solution.multipliers).reshape(-1)[order]
    np.testing.assert_allclose(weights["weight"].to_numpy(), w_n, rtol=1e-9)
    figures = {path.stem for path in (output / "figures").glob("*.png")}
    assert figures == {
        "dual_harmless",
        "dual_toxicity",
        "frontier_harmless",
        "frontier_toxicity",
        "effective_sample_size",
        "ladder_harmless",  # toxicity does not bind
    }
    files = {"dual.json", "report.html", "frontier.parquet", "weights.parquet"}
    assert {path.name for path in output.iterdir()} == files | {"figures"}


def test_one_row_a_prompt_with_lists(tmp_path):
    helpful, harmless, toxicity = draw()
    lists = {"helpful": helpful.tolist(), "harmless": harmless.tolist(), "toxicity": toxicity.tolist()}
    path = write(tmp_path / "t.parquet", {"prompt_id": np.arange(N_PROMPTS), **lists})
    dual = solve(path, tmp_path / "out")
    problem, solution = expected()
    assert [entry["multiplier"] for entry in dual["constraints"]] == pytest.approx(solution.multipliers, abs=1e-10)
    weights = pq.read_table(tmp_path / "out" / "weights.parquet").to_pandas()
    assert (weights["sample_index"].to_numpy().reshape(N_PROMPTS, -1) == np.arange(N_RESPONSES)).all()
    np.testing.assert_allclose(weights["weight"], problem.tilted_weights(solution.multipliers).reshape(-1), rtol=1e-9)


def test_a_folder_of_files_on_disk_gives_the_same(tmp_path, monkeypatch):
    """With the limits lowered, scores go through the disk; ids are integers, and the files are not aligned to them."""
    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", 0)
    monkeypatch.setattr(stage1_dual.dual.on_disk, "_FILE_ROWS", 300)
    table = columns(ids=np.arange(N_PROMPTS) * 7 - 3)
    folder = tmp_path / "tables" / "data"
    folder.mkdir(parents=True)
    for place, rows in enumerate(np.array_split(np.arange(N_PROMPTS * N_RESPONSES), 5)):
        write(folder / f"train-{place:05d}.parquet", {name: values[rows] for name, values in table.items()})
    dual = solve(tmp_path / "tables", tmp_path / "out")
    problem, solution = expected()
    assert [entry["multiplier"] for entry in dual["constraints"]] == pytest.approx(solution.multipliers, abs=1e-10)
    weights = pq.read_table(tmp_path / "out" / "weights.parquet")
    np.testing.assert_allclose(
        weights["weight"].to_numpy(), problem.tilted_weights(solution.multipliers).reshape(-1), rtol=1e-9
    )
    assert weights.schema.field("prompt_id").type == pa.int64()
    assert not list((tmp_path / "out").glob(".scores-*"))


def test_a_terminated_run_leaves_no_scores_behind(tmp_path, monkeypatch):
    """The signal arrives while the scores are on disk: what is written there is a table's size."""
    on_disk = []

    def group_then_terminate(*arguments, **options):
        grouped = group_on_disk(*arguments, **options)
        on_disk.extend(path for path in (tmp_path / "out").glob(".scores-*/train/*") if path.stat().st_size)
        os.kill(os.getpid(), signal.SIGTERM)
        return grouped

    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", 0)
    monkeypatch.setattr(pipeline.dual.from_table, "group_on_disk", group_then_terminate)
    table = write(tmp_path / "t.parquet", columns())
    before = signal.getsignal(signal.SIGTERM)
    solve(table, tmp_path / "out", expect=143)
    assert signal.getsignal(signal.SIGTERM) == before
    assert on_disk
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("limit", [2**30, 0])
def test_splits_apart(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", limit)
    table = columns()
    split = np.repeat(["train", "test", "train"] * (N_PROMPTS // 3), N_RESPONSES)
    index = np.tile(np.arange(N_RESPONSES), N_PROMPTS) + 100
    dual = solve(write(tmp_path / "t.parquet", {**table, "split": split, "sample_index": index}), tmp_path / "out")
    assert (dual["n_prompts"], dual["diagnostics"]["heldout_prompts"]) == (60, 30)
    assert dual["constraints"][0]["heldout_reference"] == pytest.approx(table["harmless"][split == "test"].mean())
    weights = pq.read_table(tmp_path / "out" / "weights.parquet").to_pandas()
    assert weights["sample_index"].tolist() == index.tolist()
    assert weights["split"].tolist() == split.tolist()
    assert weights.groupby("prompt_id")["weight"].sum().to_numpy() == pytest.approx(1.0)


def test_safeguards(tmp_path):
    path = write(tmp_path / "t.parquet", columns())
    plain = solve(path, tmp_path / "plain")
    options = ["--reserve", "harmless=0.1", "--assurance", "harmless=0.9", "--score-error", "toxicity=0.02"]
    dual = solve(path, tmp_path / "out", *options, "--evaluation-prompts", "200", "--evaluation-responses", "64")
    harmless, toxicity = dual["constraints"]
    assert harmless["demanded"] == {
        "threshold": plain["constraints"][0]["threshold"],
        "margin": 0.4,
        "tolerance": None,
    }
    added = harmless["safeguard"]["reserve"] + harmless["safeguard"]["assurance"]
    assert harmless["safeguard"]["assurance"] > 0
    assert harmless["threshold"] - harmless["demanded"]["threshold"] == pytest.approx(added)
    assert toxicity["demanded"]["threshold"] == pytest.approx(0.1)
    assert toxicity["demanded"]["threshold"] - toxicity["threshold"] == pytest.approx(
        toxicity["safeguard"]["score_error"]
    )
    assert dual["reward"]["price_of_safeguards"] == pytest.approx(
        plain["reward"]["predicted"] - dual["reward"]["predicted"]
    )


def test_corrected_for_finitely_many_responses(tmp_path):
    path = write(tmp_path / "scores.parquet", columns())
    plain = solve(path, tmp_path / "plain")
    found = solve(path, tmp_path / "out", "--correct-response-bias")
    for before, after in zip(plain["constraints"], found["constraints"], strict=True):
        assert after["multiplier"] == pytest.approx(before["multiplier_corrected"], abs=1e-9)
        assert after["demanded"] == before["demanded"]
    problem, _ = expected()
    weights = pq.read_table(tmp_path / "out" / "weights.parquet")["weight"].to_numpy()
    lam = [bound["multiplier"] for bound in found["constraints"]]
    np.testing.assert_allclose(weights, problem.tilted_weights(lam).reshape(-1), rtol=1e-9)


def test_a_frontier_of_two_ranges_is_their_grid(tmp_path, capsys):
    path = write(tmp_path / "t.parquet", columns())
    asked = ["--reward", "helpful", "--constraint", "harmless >= ref + 0:0.4:0.2", "--constraint", "toxicity <= 0:9:3"]
    code = main(["frontier", "--table", str(path), *asked, "--beta", "1", "--output", str(tmp_path), "--no-progress"])
    assert code == 0
    assert "12 thresholds, 12 of them feasible" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "frontier.parquet").to_pandas()
    assert sorted(zip(rows["margin_harmless"].round(9), rows["threshold_toxicity"].round(9), strict=True)) == [
        (margin, threshold) for margin in (0.0, 0.2, 0.4) for threshold in (0.0, 3.0, 6.0, 9.0)
    ]
    loose = rows[rows["threshold_toxicity"] == 9.0]
    assert (loose["multiplier_toxicity"] == 0).all()
    assert loose.sort_values("margin")["multiplier_harmless"].is_monotonic_increasing
    assert {"ess_median", "kl", "reward", "kkt_residual"} <= set(rows.columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"harmless": [1.0, 2.0, float("nan"), 3.0]}, "1 values that are not finite (row 2: nan"),
        ({"helpful": None}, "no column 'helpful'; did you mean"),
        ({"prompt_id": None}, "no column 'prompt_id'"),
        ({"harmless": ["x"] * 4}, "column 'harmless' is of type string; a score must be a number"),
        ({"harmless": [1.0, None, 2.0, 3.0]}, "column 'harmless' has 1 empty values (first rows: [1])"),
        (
            {"harmless": [1.0, 2.0, float("nan"), 3.0]},
            "column 'harmless' has 1 values that are not finite (row 2: nan",
        ),
        ({"prompt_id": ["a", None, "b", "b"]}, "column 'prompt_id' has 1 empty values (first rows: [1])"),
        ({"harmless": [[1.0], [2.0], [3.0], [4.0]]}, "column 'harmless' holds lists and 'helpfull' numbers"),
        ({"split": ["a", "b", "b", "test"]}, "no row of the split 'train'"),
        ({"split": ["train", "train", "test", "test"]}, "has 1 prompt to solve on"),
        (
            {"prompt_id": [1.0, 1.0, 2.0, 2.0]},
            "column 'prompt_id' is of type double; an id must be text or an integer",
        ),
        ({"sample_index": ["a", "b", "a", "b"]}, "column 'sample_index' is of type string; it must be an integer"),
        ({"sample_index": [0, None, 0, 1]}, "column 'sample_index' has 1 empty values (first rows: [1])"),
    ],
)
def test_bad_tables_are_named(tmp_path, capsys, change, message):
    reward = "helpfull" if "helpful" not in change else "helpful"
    table = {
        "prompt_id": ["a", "a", "b", "b"],
        "helpfull": [1.0, 2.0, 3.0, 4.0],
        "harmless": [1.0, 2.0, 0.0, 1.0],
        **change,
    }
    path = write(tmp_path / "t.parquet", {name: values for name, values in table.items() if values is not None})
    asked = ["--reward", reward, "--constraint", "harmless >= 0.1", "--beta", "1", "--output", str(tmp_path / "out")]
    assert main(["solve", "--table", str(path), *asked, "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "out" / "dual.json").exists()


def test_rows_are_counted_through_files_batches_and_lists(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline.dual.table_reader, "_CHUNK_ROWS", 4)
    folder = tmp_path / "lists"
    folder.mkdir()
    for place in range(3):
        scores = [[1.0, 2.0], [0.5, None if place == 2 else 1.5], [0.1, 0.2]]
        table = {"prompt_id": [f"{place}{row}" for row in range(3)], "r": [[1.0, 0.0]] * 3, "g": scores}
        write(folder / f"{place}.parquet", table)
    asked = ["--reward", "r", "--constraint", "g >= 0", "--beta", "1", "--output", str(tmp_path / "out")]
    assert main(["solve", "--table", str(folder), *asked, "--no-progress"]) == 2
    assert "column 'g' has 1 empty values (first rows: [7])" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"split": ["train"] * 4}, "b.parquet has a column 'split' and"),
        ({"sample_index": [0, 1, 0, 1]}, "b.parquet has a column 'sample_index' and"),
        ({"harmless": None}, "b.parquet has no column 'harmless'"),
        ({"harmless": ["x"] * 4}, "b.parquet: column 'harmless' is of type string, in"),
        ({"prompt_id": [1, 1, 2, 2]}, "b.parquet: column 'prompt_id' is of type int64, in"),
        ({"harmless": [[1.0]] * 4}, "b.parquet: column 'harmless' is of type list"),
    ],
)
def test_files_of_one_table_that_do_not_agree_are_named(tmp_path, capsys, second, message):
    """Without a look at each file the rows of some would be in no split, or a prompt be two."""
    table = {"prompt_id": ["a", "a", "b", "b"], "helpful": [1.0, 2.0, 3.0, 4.0], "harmless": [1.0, 2.0, 0.0, 1.0]}
    (tmp_path / "t").mkdir()
    write(tmp_path / "t" / "a.parquet", table)
    changed = {name: values for name, values in {**table, **second}.items() if values is not None}
    write(tmp_path / "t" / "b.parquet", changed)
    asked = ["--reward", "helpful", "--constraint", "harmless >= 0.1", "--beta", "1", "--output", str(tmp_path / "o")]
    assert main(["solve", "--table", str(tmp_path / "t"), *asked, "--no-progress"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_results_inside_the_table_are_refused(tmp_path, capsys):
    write(tmp_path / "t.parquet", columns())
    asked = [*ASKED, "--beta", "1", "--output", str(tmp_path / "out")]
    assert main(["solve", "--table", str(tmp_path), *asked, "--no-progress"]) == 2
    assert "lies inside the table" in capsys.readouterr().err


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([f"p{row}" for row in range(N_PROMPTS)]).dictionary_encode(),
        pa.array([f"p{row}" for row in range(N_PROMPTS)], pa.large_string()),
        pa.array([2**64 - 1 - row for row in range(N_PROMPTS)], pa.uint64()),
        pa.array([-row for row in range(N_PROMPTS)], pa.int32()),
    ],
    ids=["dictionary", "large text", "unsigned", "negative"],
)
def test_ids_of_every_kind_and_names_with_dots(tmp_path, ids):
    table = columns()
    rows = pa.array(np.repeat(np.arange(N_PROMPTS), N_RESPONSES))
    named = {"prompt_id": ids.take(rows), "a.help": table["helpful"], "harmless": table["harmless"]}
    path = write(tmp_path / "t.parquet", named)
    asked = [
        "--reward",
        "a.help",
        "--constraint",
        "harmless >=ref+0.4",
        "--beta",
        "1",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["solve", "--table", str(path), *asked, "--no-progress"]) == 0
    weights = pq.read_table(tmp_path / "o" / "weights.parquet")
    assert weights["prompt_id"].combine_chunks().cast(pa.string()).to_pylist() == [
        str(one) for one in named["prompt_id"].to_pylist()
    ]
    assert weights["weight"].to_numpy().reshape(N_PROMPTS, -1).sum(axis=1) == pytest.approx(1.0)


def test_lists_of_unequal_length_are_named(tmp_path, capsys):
    path = write(
        tmp_path / "t.parquet",
        {"prompt_id": ["a", "b"], "helpful": [[1.0, 2.0], [1.0]], "harmless": [[1.0, 2.0], [1.0, 3.0]]},
    )
    asked = ["--reward", "helpful", "--constraint", "harmless >= 0", "--beta", "1", "--output", str(tmp_path / "out")]
    assert main(["solve", "--table", str(path), *asked, "--no-progress"]) == 2
    assert "row 1 has 2 scores in 'harmless' and 1 in 'helpful'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "nowhere"], "no such file"),
        (["--reserve", "harmful=0.1"], "a safeguard is asked for 'harmful'"),
        (["--reserve", "harmless"], "must be NAME=NUMBER"),
        (["--assurance", "harmless=0.9"], "size of the evaluation, --evaluation-prompts"),
        (["--assurance", "harmless=nan"], "--assurance 'harmless=nan': the number must be between 0 and 1"),
        (["--reserve", "harmless=inf"], "--reserve 'harmless=inf': the number must be finite"),
        (
            ["--score-error", "harmless=-1"],
            "--score-error 'harmless=-1': the number must be finite and not negative",
        ),
        (["--constraint", "harmless >= ref + 9"], "bound the same from the same side"),
        (["--constraint", "harmless => 3"], "harmless => 3"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, options, message):
    table = ["--table", str(write(tmp_path / "t.parquet", columns()))]
    asked = [*([] if "--table" in options else table), *ASKED, "--beta", "1", "--output", str(tmp_path / "out")]
    assert main(["solve", *asked, *options, "--no-progress"]) == 2
    assert message in capsys.readouterr().err


def test_an_infeasible_table_exits_with_3_and_proves_it(tmp_path, capsys):
    path = write(tmp_path / "t.parquet", columns())
    asked = ["--reward", "helpful", "--constraint", "harmless >= ref + 5", "--beta", "1", "--output", str(tmp_path)]
    assert main(["solve", "--table", str(path), *asked, "--no-progress"]) == 3
    error = capsys.readouterr().err
    assert "harmless >= " in error
    assert "margin 5" in error
    assert "proof: weigh the slacks" in error
