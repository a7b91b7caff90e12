"""Scores that are looked up belong to the responses they were given to, and to no other policy's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_runs import dualign, rows_of, run_folder, write_recipe

from pipeline.contracts.artifacts import is_complete, read_json, read_manifest
from pipeline.steps.validate import validate_run

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {
    "training": {"epochs": 1, "tokens_per_step": 1024, "evaluations": 1, "learning_rate": 1e-3},
    "evaluation": {"samples_per_prompt": 4, "bootstrap_replicates": 100},
    "multishot": {"iterations": 2, "samples_per_prompt": 4},
}
DONE = {0, 6}
"""Everything was done, whether training a random policy for two steps paid or not."""
NEEDED = "of which an evaluation needs those of reward and constraints"


def rating(text: str) -> float:
    """What people would say of a response."""
    return float(text.count("e") - 0.1 * len(text))


def write_ratings(path: Path, *folders: Path, keys: tuple[str, ...]) -> Path:
    """A table of ratings of the samples in some folders, one row a key."""
    rows = {
        tuple(row[key] for key in keys): rating(row["completion"]) for folder in folders for row in rows_of(folder)
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "rating"])
        writer.writerows([*key, value] for key, value in rows.items())
    return path


def with_ratings(recipe: Path, table: Path, **more: Any) -> Path:
    """The recipe, bounding the column of a table."""
    return write_recipe(
        recipe.parent,
        **QUICK,
        **more,
        scorers={
            "helpful": {"model": str(recipe.parent / "helpful")},
            "human": {"kind": "column", "table": str(table), "column": "rating"},
        },
        constraints={"human": {"direction": ">=", "margin": 0.02}},
    )


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    """A run that has its samples, which people can rate."""
    recipe = write_recipe(tmp_path, **QUICK)
    assert dualign("prepare", recipe) == dualign("sample", recipe) == 0
    return recipe


def make(recipe: Path, *commands: str) -> None:
    for command in commands:
        assert dualign(command, recipe) in DONE, command


def test_numbers_of_the_reference_are_not_given_to_the_policy(
    sampled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = run_folder(sampled) / "samples"
    table = write_ratings(sampled.parent / "ratings.csv", samples, keys=("prompt_id", "sample_index"))
    recipe = with_ratings(sampled, table)
    for command in (("run",), ("run", "--dry-run"), ("stage2",), ("multishot",)):
        assert dualign(command[0], recipe, *command[1:]) == 2
        message = capsys.readouterr().err
        assert f"fault in the scorers, {NEEDED}" in message
        assert f"`scorers.human`: {table} knows responses by `sample_index` alone" in message
    make(recipe, "score", "solve", "export", "train")  # what needs no scores of the policy is done
    assert dualign("evaluate", recipe) == 2
    assert "knows responses by `sample_index` alone" in capsys.readouterr().err
    assert not (run_folder(recipe) / "evaluation").exists()


def test_columns_of_the_samples_say_who_drew_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(
        tmp_path,
        scorers={"likely": {"kind": "column", "column": "sampler_logp"}},
        constraints={"likely": {"direction": ">=", "margin": 0.0}},
    )
    assert dualign("run", recipe) == 2
    assert "`scorers.likely`: the column 'sampler_logp' of the samples says who drew" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    assert dualign("stage1", recipe) in {0, 3}


@pytest.mark.parametrize("keys", [("prompt_id", "completion"), ("prompt_id", "sample_index", "completion")])
def test_a_table_of_texts_is_asked_for_those_of_the_policy(
    sampled: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, keys: tuple[str, ...]
) -> None:
    run = run_folder(sampled)
    table = write_ratings(sampled.parent / "ratings.csv", run / "samples", keys=keys)
    recipe = with_ratings(sampled, table)
    make(recipe, "score", "solve", "export", "train")
    assert dualign("evaluate", recipe) == 2
    message = capsys.readouterr().err
    assert f"{run / 'evaluation' / 'samples'} failed so far" in message
    assert f"{table} has no row of this {' and '.join(keys)}" in message

    drawn = rows_of(run / "evaluation" / "samples")
    write_ratings(table, run / "samples", run / "evaluation" / "samples", keys=keys)
    capsys.readouterr()
    assert dualign("evaluate", recipe) == 0
    assert "the table of scorer `human` is not the file that the reference's samples were scored by" in (
        capsys.readouterr().err
    )
    assert rows_of(run / "evaluation" / "samples") == drawn
    found = next(c for c in read_json(run / "evaluation" / "evaluation.json")["constraints"] if c["name"] == "human")
    by_prompt: dict[str, list[float]] = {}
    for row in drawn:
        by_prompt.setdefault(row["prompt_id"], []).append(rating(row["completion"]))
    assert found["realised"] == pytest.approx(np.mean([np.mean(values) for values in by_prompt.values()]))
    assert not validate_run(run).faults


def test_a_text_that_is_another_one_at_that_place_is_not_rated(
    sampled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("prompt_id", "sample_index", "completion")
    table = write_ratings(sampled.parent / "ratings.csv", run_folder(sampled) / "samples", keys=keys)
    content = table.read_bytes()
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "rating"])
        for row in rows_of(run_folder(sampled) / "samples"):
            writer.writerow([row["prompt_id"], row["sample_index"], f"{row['completion']} of another draw", 1.0])
    assert dualign("score", with_ratings(sampled, table)) == 2
    assert "has no row of this prompt_id and sample_index and completion" in capsys.readouterr().err
    table.write_bytes(content)  # mended: nothing is to be redone
    assert dualign("score", with_ratings(sampled, table)) == 0


def test_an_unused_column_keeps_nobody_from_evaluating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, **QUICK, scorers={"likely": {"kind": "column", "column": "sampler_logp"}})
    assert dualign("run", recipe) in DONE
    assert "evaluate: `likely` looks scores up and is not needed here" in capsys.readouterr().err
    run = run_folder(recipe)
    assert is_complete(run / "scores" / "likely")
    assert not (run / "evaluation" / "scores" / "likely").exists()
    assert not validate_run(run).faults


def test_a_policy_is_scored_by_the_scorers_of_its_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text("def short(rows): return [-len(row.completion) for row in rows]\n")
    recipe = write_recipe(
        tmp_path,
        **QUICK,
        scorers={"short": {"kind": "python", "function": "rules:short", "folder": str(tmp_path)}},
        constraints={"short": {"direction": ">=", "margin": 0.05}},
    )
    make(recipe, "stage1", "train")
    rules.write_text("def short(rows): return [5 - len(row.completion) for row in rows]\n")
    assert dualign("evaluate", recipe) == 2
    assert "scores/short was made from something else:\n  - inputs.scorer: " in capsys.readouterr().err
    assert dualign("evaluate", recipe, "--scorers.helpful.offset", "5") == 2
    assert "scores/helpful was made from something else:\n  - offset: 0.0 then, 5.0 now" in capsys.readouterr().err
    assert read_manifest(run_folder(recipe) / "policy").run == "tiny"
    rules.write_text("def short(rows): return [-len(row.completion) for row in rows]\n")
    assert dualign("evaluate", recipe) == 0
