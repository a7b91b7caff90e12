"""Stage 1 on real (tiny) checkpoints: nothing lost, nothing doubled, and every fault named."""

import json
import resource
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import N_PROMPTS, dualign, rows_of, run_folder, write_recipe

from pipeline.contracts.artifacts import read_json, read_manifest
from pipeline.steps.validate import validate_run

pytestmark = pytest.mark.slow

SCORERS = ("helpful", "harmless")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of stage 1, with its recipe."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"))
    assert dualign("stage1", recipe) == 0
    return recipe


@pytest.fixture
def recipe(whole, tmp_path):
    """A copy of the uninterrupted run."""
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    text = whole.read_text()
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def tables(recipe):
    folder = run_folder(recipe)
    return {name: rows_of(folder / name) for name in ("samples", *(f"scores/{scorer}" for scorer in SCORERS))}


def test_the_tables_hold_what_was_asked_for(whole):
    folder = run_folder(whole)
    prompts = pq.read_table(next((folder / "prompts").glob("data/train-*")))
    assert set(prompts["category"].to_pylist()) <= {"t0", "t1", "t2"}
    samples = rows_of(folder / "samples")
    assert len(samples) == 6 * N_PROMPTS
    for row in samples:
        assert row["prompt_token_ids"].count(1) == 1
        assert row["prompt_token_ids"][0] == 1
    manifest = read_manifest(folder / "samples")
    assert manifest.details["last_call"]["sampler"]["temperature"] == 1.0
    difference = manifest.details["sampler_logp_difference"]
    assert difference["rows"] > 0
    assert difference["mean"] <= difference["largest"] < 1e-4
    tilted = rows_of(folder / "tilted")
    assert {row["category"] for row in tilted} == {"t0", "t1", "t2"}
    by_category = read_json(folder / "dual" / "dual.json")["by_category"]
    assert [entry["category"] for entry in by_category] == ["t0", "t1", "t2"]
    assert sum(entry["n_prompts"] for entry in by_category) == read_manifest(folder / "dual").counts["prompts"]


@pytest.mark.parametrize("table", ["samples", "scores/harmless"])
def test_a_damaged_file_is_named_and_mended_by_deleting_it(recipe, whole, capsys, table):
    path = sorted((run_folder(recipe) / table).glob("data/train-*.parquet"))[1]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert dualign("stage1", recipe, "--redo-from", "solve") == 2
    err = capsys.readouterr().err
    assert f"{path} is not the file that" in err
    assert "delete it and run the step again: only its rows are computed anew" in err
    path.unlink()
    assert dualign("stage1", recipe) == 0
    assert tables(recipe) == tables(whole)
    log = capsys.readouterr().err
    assert log.count("20 samples") >= 1


@pytest.mark.parametrize("table", ["prompts", "tilted"])
def test_a_derived_table_that_lost_a_file_is_derived_again(recipe, whole, table):
    next((run_folder(recipe) / table).glob("data/test-*.parquet")).unlink()
    assert dualign("stage1", recipe) == 0
    assert len(rows_of(run_folder(recipe) / "tilted")) == 6 * N_PROMPTS
    assert tables(recipe) == tables(whole)


@pytest.mark.parametrize("change", ["content", "column"])
def test_other_categories_reach_every_table_and_cost_no_samples(recipe, whole, capsys, change):
    prompts = whole.parent / "prompts.jsonl"
    text = prompts.read_text()
    column = "topic" if change == "content" else "kind"
    rows = [{**json.loads(line), column: f"k{place % 2}"} for place, line in enumerate(text.splitlines())]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        assert dualign("stage1", recipe, "--prompts.category_column", column) == 0
    finally:
        prompts.write_text(text)  # the recipe of the other tests reads it too
    assert "samples drawn before, kept" in capsys.readouterr().err
    by_category = read_json(run_folder(recipe) / "dual" / "dual.json")["by_category"]
    assert [entry["category"] for entry in by_category] == ["k0", "k1"]
    assert {row["category"] for row in rows_of(run_folder(recipe) / "tilted")} == {"k0", "k1"}
    assert validate_run(run_folder(recipe)).faults == []


def test_more_samples_and_another_scorer_compute_only_what_is_new(recipe, whole, tmp_path, capsys):
    before = tables(recipe)
    tree = recipe.read_text().replace("samples_per_prompt: 6", "samples_per_prompt: 8")
    recipe.write_text(tree.replace("scorers:\n", f"scorers:\n  third:\n    model: {whole.parent / 'harmless'}\n"))
    assert dualign("stage1", recipe) == 0
    err = capsys.readouterr().err
    assert f"sample: {2 * N_PROMPTS} samples" in err
    after = tables(recipe)
    for name, rows in before.items():
        key = {(row["prompt_id"], row["sample_index"]): row for row in after[name]}
        assert [key[row["prompt_id"], row["sample_index"]] for row in rows] == rows
        assert len(key) == len(after[name]) == 8 * N_PROMPTS
    third = rows_of(run_folder(recipe) / "scores" / "third")
    assert [row["value"] for row in third] == pytest.approx([row["value"] for row in after["scores/harmless"]])


def test_samples_that_are_not_asked_for_are_refused_in_a_killed_run_too(recipe, capsys):
    assert dualign("sample", recipe, "--sampling.samples_per_prompt", "8") == 0
    (run_folder(recipe) / "samples" / "manifest.json").unlink()
    assert dualign("sample", recipe) == 2
    assert "samples beyond the 6 a prompt that are asked for" in capsys.readouterr().err
    assert dualign("sample", recipe, "--sampling.samples_per_prompt", "8") == 0


@pytest.mark.parametrize("change", ["moved", "replaced"])
def test_a_prompt_that_left_its_split_is_refused_before_sampling(whole, tmp_path, capsys, change):
    rows = [{"prompt": f"question {i}", "topic": "t", "part": "test" if i > 15 else "train"} for i in range(N_PROMPTS)]
    for name in ("policy", *SCORERS):
        shutil.copytree(whole.parent / name, tmp_path / name)
    recipe = write_recipe(
        tmp_path, prompts=rows, sampling={"samples_per_prompt": 1, "logp_rows": 0, "max_new_tokens": 2}
    )
    arguments = ("--prompts.split_column", "part")
    assert dualign("prepare", recipe, *arguments) == 0
    assert dualign("sample", recipe, *arguments) == 0
    # The first of the train prompts: the order of all of them, by split, stays as it was.
    rows[0] |= {"part": "test"} if change == "moved" else {"prompt": "another question"}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert dualign("prepare", recipe, *arguments) == 0
    assert dualign("sample", recipe, *arguments) == 2
    assert "1 samples of prompts that are not (or no longer) in the train split" in capsys.readouterr().err


def test_a_copied_run_continues_and_another_runs_manifest_does_not(recipe, whole, capsys):
    shutil.copytree(run_folder(recipe), run_folder(recipe, "copy"))
    assert dualign("stage1", recipe, run="copy") == 0
    assert "sample: samples drawn before, kept" in capsys.readouterr().err
    assert dualign("stage1", recipe, "--seed", "1", run="other") == 0
    shutil.copy(run_folder(recipe, "other") / "samples" / "manifest.json", run_folder(recipe) / "samples")
    assert dualign("stage1", recipe) == 2
    assert "samples/manifest.json is of run `other` and does not describe" in capsys.readouterr().err


def test_a_full_disk_is_named_and_nothing_finished_is_lost(whole, tmp_path, capsys):
    """A limit on the size of files stands in for the end of a disk: the write of a shard fails in the middle."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text().replace("shard_rows: 20", "shard_rows: 1000"))
    shutil.copytree(run_folder(whole) / "prompts", run_folder(recipe) / "prompts")
    code = "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--config", str(recipe), "--run", "tiny", "--data-dir", str(tmp_path / "data"), "--no-progress"]
    command = [sys.executable, "-c", code, "stage1", *options]
    limit = 4096
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.returncode == 2, full.stderr
    assert "cannot be written: File too large. What was finished is kept" in full.stderr
    assert not list(run_folder(recipe).glob("samples/parts/*.parquet"))
    assert dualign("stage1", recipe) == 0
    # Other shards are other batches, whose log-probabilities round otherwise.
    ours, theirs = ({**row, "sampler_logp": 0} for row in tables(recipe)["samples"]), tables(whole)["samples"]
    assert list(ours) == [{**row, "sampler_logp": 0} for row in theirs]


def test_a_file_in_the_place_of_the_run_is_named_before_any_work(whole, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text())
    (tmp_path / "data").write_text("not a folder")
    assert dualign("stage1", recipe) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_prompts_that_cannot_be_read_are_counted_listed_and_limited(whole, tmp_path, capsys):
    long = {"prompt": "why " * 200, "topic": "t0"}
    rows = [{"prompt": f"question {i}", "topic": f"t{i % 3}"} for i in range(N_PROMPTS)]
    for name in ("policy", *SCORERS):
        shutil.copytree(whole.parent / name, tmp_path / name)
    recipe = write_recipe(tmp_path, prompts=[*rows, long])
    assert dualign("stage1", recipe) == 2
    err = capsys.readouterr().err
    assert "1 of 25 prompts cannot be sampled from, a larger share than `max_failed_share`, 0.01" in err
    assert "leaves no room for a completion" in err
    recipe = write_recipe(tmp_path, prompts=[*rows, long], max_failed_share=0.1)
    assert dualign("stage1", recipe) == 0
    folder = run_folder(recipe)
    manifest = read_manifest(folder / "samples")
    assert (manifest.counts["failed"], manifest.counts["rows"]) == (6, 6 * N_PROMPTS)
    (failure,) = json.loads((folder / "samples" / "failures.json").read_text())
    assert "leaves no room" in failure["reason"]
    assert "6 responses could not be drawn" in " ".join(read_json(folder / "dual" / "dual.json")["warnings"])
    assert validate_run(folder).faults == []


def test_a_dry_run_shows_the_prompts_and_writes_nothing(whole, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text())
    assert dualign("sample", recipe, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "<user>question 0<assistant>" in out
    assert out.count("tokens: [1, ") == 2
    assert not (tmp_path / "data").exists()


def test_other_samples_than_the_references_must_be_acknowledged(whole, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text())
    assert dualign("stage1", recipe, "--sampling.top_p", "0.9") == 2
    err = capsys.readouterr().err
    assert "top_p 0.9" in err
    assert "samples_are_not_of_the_reference: true" in err
    arguments = ["--sampling.top_p", "0.9", "--sampling.temperature", "0.7"]
    assert dualign("stage1", recipe, *arguments, "--sampling.samples_are_not_of_the_reference", "true") == 0
    dual = read_json(run_folder(recipe) / "dual" / "dual.json")
    assert any("not draws of the reference (temperature 0.7, top_p 0.9)" in text for text in dual["warnings"])


@pytest.mark.parametrize("rule", ["keep", "drop", "flag"])
def test_responses_that_were_cut_off(recipe, rule):
    assert dualign("stage1", recipe, "--solve.on_length", rule, "--redo-from", "solve") == 0
    folder = run_folder(recipe)
    samples = rows_of(folder / "samples")
    cut_off = {(row["prompt_id"], row["sample_index"]) for row in samples if row["finish_reason"] == "length"}
    assert 0 < len(cut_off) < len(samples)
    dual = read_json(folder / "dual" / "dual.json")
    assert dual["truncation"]["rule"] == rule
    assert 0 < dual["truncation"]["share"] < 1
    harmless = dual["truncation"]["means"][1]
    assert harmless["all"] != harmless["finished"]
    used = {(row["prompt_id"], row["sample_index"]) for row in rows_of(folder / "tilted")}
    assert bool(used & cut_off) == (rule != "drop")
    assert len(used) == len(samples) - (len(cut_off) if rule == "drop" else 0)
    assert any("cut off" in text for text in dual["warnings"]) == (rule != "keep")
    expected = harmless["finished" if rule == "drop" else "all"]
    assert dual["constraints"][0]["reference"] == pytest.approx(expected)


def test_a_split_of_which_everything_was_cut_off_is_named(whole, tmp_path, capsys):
    for name in ("policy", *SCORERS):
        (tmp_path / name).symlink_to(whole.parent / name)
    sampling = {"max_new_tokens": 1, "samples_per_prompt": 1, "logp_rows": 0}
    recipe = write_recipe(tmp_path, sampling=sampling, solve={"on_length": "drop"})
    assert dualign("stage1", recipe) == 2
    assert "response takes part" in (err := capsys.readouterr().err)
    assert "`sampling.max_new_tokens`, 1, and `solve.on_length` is 'drop'" in err


def test_a_model_that_is_not_the_trained_one_fails_the_step(whole, tmp_path, capsys):
    """Batches of another shape round differently: enough for the limit that is asked for here."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text())
    assert dualign("stage1", recipe, "--sampling.logp_limit", "1e-12") == 2
    err = capsys.readouterr().err
    assert "the sampler's log-probabilities differ from the training stack's by" in err
    assert not (run_folder(recipe) / "samples" / "manifest.json").exists()
    assert list(run_folder(recipe).glob("samples/parts/*.parquet"))
    assert dualign("stage1", recipe) == 0


def test_a_limited_run_says_so_and_a_larger_limit_computes_only_what_is_new(whole, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(whole.read_text())
    recipe = tmp_path / "recipe.yaml"
    assert dualign("stage1", recipe, "--limit", "3") == 0
    folder = run_folder(recipe)
    assert read_manifest(folder / "prompts").details["limit"] == 3
    counts = read_manifest(folder / "prompts").counts
    assert (counts["train"], counts["test"], counts["left_out"]) == (3, 3, N_PROMPTS - 6)
    assert f"{N_PROMPTS - 6} prompts of the source are beyond `prompts.limit`" in " ".join(
        read_json(folder / "dual" / "dual.json")["warnings"]
    )
    first = tables(recipe)
    assert len(first["samples"]) == 36
    assert dualign("stage1", recipe, "--prompts.limit", "4") == 0
    last_call = read_manifest(folder / "samples").details["last_call"]
    assert (last_call["rows_sampled"], last_call["rows_present"]) == (12, 36)
    for name, rows in tables(recipe).items():
        kept = {tuple(map(str, row.values())) for row in rows}
        assert {tuple(map(str, row.values())) for row in first[name]} <= kept
    capsys.readouterr()
    assert dualign("stage1", recipe, "--limit", "2") == 2
    assert "prompts: 8 then, 4 now" in capsys.readouterr().err
    assert dualign("stage1", recipe, "--limit", "0") == 2
    assert "`prompts.limit` is 0" in capsys.readouterr().err
    assert dualign("stage1", recipe, "--limit", "5", "--prompts.limit", "6") == 2
    assert "`--prompts.limit` is given twice" in capsys.readouterr().err
    assert dualign("stage1", recipe) == 0
    # In other shards log-probabilities and scores differ by rounding; what was drawn does not.
    drawn, expected = (
        [(row["prompt_id"], row["sample_index"], row["completion_token_ids"]) for row in tables(one)["samples"]]
        for one in (recipe, whole)
    )
    assert drawn == expected
    assert "limit" not in " ".join(read_json(folder / "dual" / "dual.json")["warnings"])
    assert not validate_run(folder).faults


def test_published_policies_join_a_report_that_was_there_before(recipe):
    folder = run_folder(recipe) / "report"
    assert dualign("report", recipe) == 0
    alone = (folder / "report.html").read_text()
    published = (
        "{paper: '2405.19544', sources: [Figure 3 left], reward: helpful_gain, constraints: {harmless: safety_gain}}"
    )
    assert dualign("report", recipe, "--published", published) == 0
    beside = (folder / "report.html").read_text()
    assert "arXiv 2405.19544 reports" in beside
    assert dualign("report", recipe) == 0
    assert (folder / "report.html").read_text() == alone
