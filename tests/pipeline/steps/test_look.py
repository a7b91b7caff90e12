"""Sampling until it is trusted, on real (tiny) checkpoints: what is drawn, what is recorded, and where it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_runs import N_PROMPTS, dualign, rows_of, run_folder, write_recipe

from pipeline.contracts.artifacts import read_json, read_manifest
from pipeline.steps.validate import validate_run

pytestmark = pytest.mark.slow

UNTIL = {"within": 0.02, "verdict": None, "at_most": 24}
TABLES = ("samples", "scores/helpful", "scores/harmless")


def until_recipe(folder: Path, **until) -> Path:
    sampling = {"samples_per_prompt": 4, "logp_rows": 0, "until": {**UNTIL, **until}}
    return write_recipe(folder, sampling=sampling)


def begin(recipe: Path) -> subprocess.Popen[bytes]:
    """Stage 1 in a process of its own: to the last bit alike are runs whose libraries have as many threads."""
    code = "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--config", str(recipe), "--run", "tiny", "--data-dir", str(recipe.parent / "data"), "--no-progress"]
    command = [sys.executable, "-c", code, "stage1", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    recipe = until_recipe(tmp_path_factory.mktemp("until"))
    assert begin(recipe).wait() == 0
    return recipe


def looks_of(recipe: Path) -> list[dict]:
    return read_json(run_folder(recipe) / "samples" / "looks.json")["looks"]


def test_it_tops_up_and_says_how_it_ended(whole):
    folder, looks = run_folder(whole), looks_of(whole)
    sizes = [one["drawn"]["responses"] for one in looks]
    assert sizes[0] == 4
    assert sizes == sorted(set(sizes))
    assert len(looks) >= 2
    assert [one["next"]["responses"] for one in looks[:-1]] == sizes[1:]
    last = looks[-1]
    assert last["outcome"] in ("holds", "limit")
    assert (last["outcome"] == "holds") == (last["reach"] <= 0.02)
    manifest = read_manifest(folder / "samples")
    assert manifest.settings["samples_per_prompt"] == sizes[-1]
    assert manifest.counts["rows"] == sizes[-1] * N_PROMPTS == len(rows_of(folder / "scores" / "harmless"))
    assert read_manifest(folder / "dual").inputs["samples"] == manifest.identity
    assert f"samples_per_prompt: {sizes[-1]}\n" in (folder / "config.yaml").read_text()
    assert validate_run(folder).faults == []


def test_the_same_command_finds_it_done(whole, capsys):
    before = looks_of(whole)
    assert dualign("stage1", whole) == 0
    err = capsys.readouterr().err
    assert "sample: samples drawn before, kept" in err
    assert "solve: done before, kept" in err
    assert looks_of(whole) == before


def test_killed_and_continued_it_ends_in_the_same_place(whole, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text())
    folder = run_folder(recipe)
    process = begin(recipe)
    # In the middle of what the first look asked for: shards of the second size are there, and no manifest.
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        looked = (folder / "samples" / "looks.json").is_file()
        if looked and not (folder / "samples" / "manifest.json").is_file() and list(folder.glob("samples/parts/*")):
            break
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "samples" / "manifest.json").is_file()
    n_before = len(rows_of(folder / "samples"))
    assert begin(recipe).wait() == 0
    assert len(rows_of(folder / "samples")) > n_before
    for name in TABLES:
        assert rows_of(folder / name) == rows_of(run_folder(whole) / name)
    comparable = [{key: one[key] for key in ("drawn", "next", "outcome", "reach")} for one in looks_of(recipe)]
    assert comparable == [{key: one[key] for key in ("drawn", "next", "outcome", "reach")} for one in looks_of(whole)]
    ours, theirs = (read_json(run_folder(one) / "dual" / "dual.json") for one in (recipe, whole))
    assert [one["multiplier"] for one in ours["constraints"]] == [one["multiplier"] for one in theirs["constraints"]]


def test_a_limit_that_is_reached_is_loud(whole, tmp_path, capsys):
    for name in ("policy", "helpful", "harmless"):
        (tmp_path / name).symlink_to(whole.parent / name)
    recipe = until_recipe(tmp_path, within=1e-4, at_most=6)
    assert dualign("stage1", recipe) == 0
    assert "the limits are reached, and `sampling.until` does not hold" in capsys.readouterr().err
    assert looks_of(recipe)[-1]["outcome"] == "limit"
    warnings = read_json(run_folder(recipe) / "dual" / "dual.json")["warnings"]
    assert any("`sampling.until` does not hold" in warning for warning in warnings)
    # A looser demand is met by what is there: nothing is drawn, and the look says so.
    assert dualign("stage1", recipe, "--sampling.until.within", "5", "--redo-from", "solve") == 0
    assert looks_of(recipe)[-1]["outcome"] == "holds"
    assert read_manifest(run_folder(recipe) / "samples").settings["samples_per_prompt"] == 6


def test_prompts_are_added_where_some_were_left_out(whole, tmp_path):
    for name in ("policy", "helpful", "harmless"):
        (tmp_path / name).symlink_to(whole.parent / name)
    recipe = until_recipe(tmp_path, within=1e-4, at_most=4, most_prompts=12)
    assert dualign("stage1", recipe, "--limit", "6") == 0
    limits = [one["drawn"]["limit"] for one in looks_of(recipe)]
    assert limits[0] == 6
    assert limits[-1] == 12
    assert read_manifest(run_folder(recipe) / "prompts").counts["train"] == 12
    assert dualign("stage1", recipe, "--limit", "6") == 0  # the same command again


@pytest.mark.parametrize(
    ("settings", "until", "reason"),
    [
        ({"prompts": 4}, {}, "nothing can be told of what is drawn: the pilot has 3 prompts"),
        ({"beta": {"kl": 0.6}}, {}, "nothing can be told of what is drawn: `kl` is 0.6 nats; 4 responses a prompt"),
        ({"beta": 0.001}, {"at_most": 4}, "cannot be told from 4 responses a prompt: the KL of"),
    ],
)
def test_what_says_nothing_yet_is_a_reason_for_more_and_no_number(whole, tmp_path, settings, until, reason):
    """Each ended the run, or printed a reach of some thousands, when the first look was taken."""
    for name in ("policy", "helpful", "harmless"):
        (tmp_path / name).symlink_to(whole.parent / name)
    settings = dict(settings)
    prompts = [{"prompt": f"question {i}", "topic": f"t{i % 3}"} for i in range(settings.pop("prompts", N_PROMPTS))]
    sampling = {"samples_per_prompt": 4, "logp_rows": 0, "until": {**UNTIL, "at_most": 8, **until}}
    recipe = write_recipe(tmp_path, prompts=prompts, sampling=sampling, **settings)
    dualign("stage1", recipe)
    looks = looks_of(recipe)
    first, last = looks[0], looks[-1]
    assert first["reach"] is None
    assert reason in first["reasons"][0]
    assert (last["outcome"], last["drawn"]["responses"]) == ("limit", until.get("at_most", 8))


def test_responses_are_not_drawn_for_want_of_prompts(whole, tmp_path):
    """Where the reward alone meets the demand nothing moves, and the verdict is weak for 19 prompts alone."""
    for name in ("policy", "helpful", "harmless"):
        (tmp_path / name).symlink_to(whole.parent / name)
    sampling = {"samples_per_prompt": 4, "logp_rows": 0, "until": {**UNTIL, "verdict": "ok"}}
    bound = {"harmless": {"direction": ">=", "margin": -3.0}}
    recipe = write_recipe(tmp_path, sampling=sampling, constraints=bound)
    assert dualign("stage1", recipe) == 0
    (look,) = looks_of(recipe)
    assert (look["outcome"], look["verdict"]) == ("limit", "weak")


def test_score_alone_tops_up_too_and_a_redo_begins_anew(whole, tmp_path):
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text())
    before = looks_of(recipe)
    assert dualign("sample", recipe, "--redo") == 0
    assert not (run_folder(recipe) / "samples" / "looks.json").exists()
    assert len(rows_of(run_folder(recipe) / "samples")) == 4 * N_PROMPTS
    assert dualign("score", recipe) == 0
    assert [one["drawn"] for one in looks_of(recipe)] == [one["drawn"] for one in before]


@pytest.mark.parametrize(
    ("until", "arguments", "message"),
    [
        ({"at_most": 2}, (), "`until.at_most` is 2, fewer than `samples_per_prompt`, 4"),
        ({"within": 0}, (), "`sampling.until.within` is 0"),
        ({"most_prompts": 10}, (), "all prompts take part from the start"),
        ({"most_prompts": 10}, ("--limit", "20"), "fewer than `prompts.limit`, 20"),
        ({"untill": 3}, (), "unknown setting `sampling.until.untill`"),
    ],
)
def test_what_contradicts_itself_is_refused(whole, tmp_path, capsys, until, arguments, message):
    for name in ("policy", "helpful", "harmless"):
        (tmp_path / name).symlink_to(whole.parent / name)
    recipe = until_recipe(tmp_path, **until)
    assert dualign("stage1", recipe, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_tail_is_refused_before_anything_is_drawn(whole, tmp_path, capsys):
    for name in ("policy", "helpful", "harmless"):
        (tmp_path / name).symlink_to(whole.parent / name)
    bound = {"statistic": "cvar", "level": 0.2, "direction": ">=", "margin": 0.05}
    sampling = {"samples_per_prompt": 4, "until": UNTIL}
    recipe = write_recipe(tmp_path, sampling=sampling, constraints={"harmless": bound})
    assert dualign("stage1", recipe) == 2
    assert "`constraints.harmless.statistic` is 'cvar'" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_looks_that_were_damaged_are_named(whole, tmp_path, capsys):
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(whole.read_text())
    path = run_folder(recipe) / "samples" / "looks.json"
    path.write_text(json.dumps({"looks": [{"next": "more"}]}))
    assert dualign("stage1", recipe) == 2
    assert "does not hold the looks" in capsys.readouterr().err
