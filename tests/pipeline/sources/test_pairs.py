"""Training on the pairs of a data set, on whole tiny runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_models import build_tokenizer
from helpers.tiny_runs import dualign, replace_file, rows_of, run_folder, write_recipe
from helpers.training_responses import keys_of

from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import file_sha256, read_json, read_manifest
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import prompt_id
from pipeline.sources.pairs import read_pairs
from pipeline.sources.prompts import hash_split
from pipeline.steps.validate import validate_run
from stage2_policy.data import TrainingData, choose_held_out, read_training_data

pytestmark = pytest.mark.slow

N_PROMPTS = 24
"""Of the run; the pairs have as many again that the run does not sample."""

TRAINING = {
    "objective": "dpo",
    "epochs": 1,
    "tokens_per_step": 400,
    "tokens_per_microbatch": 400,
    "held_out_fraction": 0.2,
    "evaluations": 1,
    "learning_rate": 1e-3,
    "match_prediction": True,
}


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}]


def split(number: int) -> str:
    return hash_split(messages(number), 0.25)


def good_rows() -> list[dict[str, Any]]:
    """Two pairs of most prompts, one of the others."""
    return [
        {"text": f"question {number}", "one": f"rest {number} {turn}", "two": f"call a friend {number}{turn}"}
        for turn in range(2)
        for number in range(2 * N_PROMPTS)
        if turn == 0 or number % 3
    ]


def bad_rows() -> list[dict[str, Any]]:
    number = next(n for n in range(N_PROMPTS) if split(n) == "train")
    text = f"question {number}"
    return [
        {"text": text, "one": "", "two": "b"},
        {"text": None, "one": "a", "two": "b"},
        {"text": text, "one": "same", "two": "same"},
        {"text": text, "one": "long " * 40, "two": "b"},
        {"text": text, "one": "ended<eos> twice", "two": "b"},
        {"text": "question of " + "many words " * 40, "one": "a", "two": "b"},
    ]


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_with_pairs(folder: Path, rows: list[dict[str, Any]] | None = None, **training: Any) -> Path:
    pairs = write_pairs(folder / "pairs.jsonl", [*good_rows(), *bad_rows()] if rows is None else rows)
    settings = {"source": str(pairs), "prompt_column": "text", "response_columns": ["one", "two"]}
    return write_recipe(
        folder,
        sampling={"max_new_tokens": 24},
        training={**TRAINING, "pairs": settings, **training},
        evaluation={"samples_per_prompt": 2, "bootstrap_replicates": 100},
    )


def train_numbers(rows: list[dict[str, Any]]) -> list[int]:
    numbers = [int(row["text"].split()[1]) for row in rows]
    return [number for number in numbers if split(number) == "train"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: a second thread only waits
    yield
    torch.set_num_threads(threads)


def training_data(recipe: Path) -> TrainingData:
    """What stage 2 reads of a run with pairs."""
    run = run_folder(recipe)
    return read_training_data(
        reference=recipe.parent / "policy",
        samples=run / "samples",
        tilted=run / "tilted",
        dual=run / "dual",
        held_out_fraction=TRAINING["held_out_fraction"],
        pairs=run / "pairs",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_with_pairs(tmp_path_factory.mktemp("pairs"))
    assert dualign("run", recipe) == 6  # all done; so short a training pays nothing, and that is said
    return recipe


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run in a folder of its own; the recipe names the files of the first."""
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    shutil.copy(finished, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_what_is_trained_on_are_the_pairs_token_by_token(finished: Path) -> None:
    run = run_folder(finished)
    data = training_data(finished)
    tokenizer = build_tokenizer()

    def tokens(number: int, response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prompt = tokenizer.apply_chat_template(messages(number), add_generation_prompt=True, return_dict=True)
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        return (tokenizer.bos_token_id, *prompt["input_ids"]), (*ids, tokenizer.eos_token_id)

    held_out = set(data.held_out.prompt_ids)
    assert held_out
    expected = {
        tuple(tokens(number, row[name]) for name in ("one", "two"))
        for row in good_rows()
        if split(number := int(row["text"].split()[1])) == "train" and prompt_id(messages(number)) not in held_out
    }
    train = data.train
    found = [
        tuple((tuple(map(int, prompt)), tuple(map(int, done))) for prompt, done in train.sequences[row : row + 2])
        for row in range(0, len(train), 2)
    ]
    assert set(found) == expected
    assert len(found) == len(expected)
    # Every pair stands for itself, whatever prompt it is of.
    np.testing.assert_array_equal(train.prompt_p, np.repeat(np.arange(len(found)), 2))
    assert len(set(train.prompt_ids)) < len(train.prompt_ids)
    np.testing.assert_allclose(train.weight[::2] + train.weight[1::2], 1.0)
    manifest = read_manifest(run / "policy")
    assert manifest.details["stretch"] != 1.0
    assert manifest.counts["responses"] == len(train)
    assert manifest.details["n_held_out_pairs"] == data.n_held_out_pairs > 0


def test_no_test_prompt_is_in_the_pairs_and_what_chooses_the_checkpoint_was_sampled(finished: Path) -> None:
    run = run_folder(finished)
    splits = {row["prompt_id"]: row["split"] for row in pq.read_table(run / "prompts" / "data").to_pylist()}
    pairs = rows_of(run / "pairs" / "samples")
    assert {splits.get(row["prompt_id"], "not sampled") for row in pairs} == {"train", "not sampled"}
    tests = {prompt_id(messages(number)) for number in range(2 * N_PROMPTS) if split(number) == "test"}
    assert len(tests) > 4
    assert not tests & {row["prompt_id"] for row in pairs}
    scored = {(row["prompt_id"], row["sample_index"]) for row in rows_of(run / "pairs" / "scores" / "helpful")}
    assert scored == {(row["prompt_id"], row["sample_index"]) for row in pairs}
    sampled = sorted(name for name, its_split in splits.items() if its_split == "train")
    held_out = [sampled[place] for place in choose_held_out(sampled, fraction=TRAINING["held_out_fraction"])]
    (stored,) = (path.parent for path in (run / "reference_logp").glob("*/manifest.json"))  # a lock is beside it
    logp = {row["prompt_id"] for row in rows_of(stored)}
    assert set(held_out) <= logp
    assert not (set(sampled) - set(held_out) - {row["prompt_id"] for row in pairs}) & logp


def test_every_row_that_is_left_out_is_counted(finished: Path) -> None:
    counts = read_manifest(run_folder(finished) / "pairs" / "samples").counts
    n_train = len(train_numbers(good_rows()))
    assert counts == {
        "rows": 2 * n_train,
        "source_rows": len(good_rows()) + len(bad_rows()),
        "missing": 2,
        "test": len(good_rows()) - n_train,
        "equal": 1,
        "unusable_prompt": 1,
        "too_long": 1,
        "end_inside": 1,
        "pairs": n_train,
    }


def test_the_labels_follow_the_scores_at_the_duals_lambda(finished: Path) -> None:
    run = run_folder(finished)
    dual = read_json(run / "dual" / "dual.json")
    scores = {
        name: {
            (row["prompt_id"], row["sample_index"]): row["value"] for row in rows_of(run / "pairs" / "scores" / name)
        }
        for name in ("helpful", "harmless")
    }
    multiplier = dual["constraints"][0]["multiplier"]
    data = training_data(finished)
    value = np.array([scores["helpful"][key] + multiplier * scores["harmless"][key] for key in keys_of(data.train)])
    np.testing.assert_allclose(np.diff(data.train.tilt)[::2], np.diff(value)[::2], atol=1e-12)


def test_a_finished_run_has_no_faults_and_its_card_says_what_it_was_trained_on(finished: Path) -> None:
    run = run_folder(finished)
    found = validate_run(run)
    assert found.faults == []
    names = [link.name for link in found.chain]
    assert [name for name in names if name.startswith("pairs/")] == [
        "pairs/prompts",
        "pairs/samples",
        "pairs/scores/harmless",
        "pairs/scores/helpful",
        "pairs/tilted",
    ]
    card = (run / "policy" / "README.md").read_text()
    assert read_manifest(run / "pairs" / "tilted").identity in card
    assert "pairs of responses of a data set" in card


def test_a_second_call_keeps_everything(finished: Path) -> None:
    run = run_folder(finished)
    tables = [path for path in run.rglob("*") if path.suffix in {".parquet", ".safetensors"}]
    before = {path: (path.stat().st_mtime_ns, file_sha256(path)) for path in tables}
    assert dualign("run", finished) == 6
    assert {path: (path.stat().st_mtime_ns, file_sha256(path)) for path in tables} == before


def test_changed_pairs_are_refused_by_name(copied: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pairs(copied.parent / "other.jsonl", [*good_rows()[1:], *bad_rows()])
    assert dualign("run", copied, "--training.pairs.source", str(pairs)) == 2
    message = capsys.readouterr().err
    assert "inputs.training.pairs" in message
    assert "source: " in message
    assert str(run_folder(copied) / "pairs") in message
    # As it says: without the folder the pairs are made anew, and the policy is of others.
    shutil.rmtree(run_folder(copied) / "pairs")
    assert dualign("run", copied, "--training.pairs.source", str(pairs)) == 2
    message = capsys.readouterr().err
    assert "policy was made from something else" in message
    assert "inputs.pairs/samples" in message
    assert "inputs.samples" not in message


def test_a_killed_call_computes_what_is_missing_and_comes_to_the_same(copied: Path) -> None:
    pairs = run_folder(copied) / "pairs"
    tables = ("prompts", "samples", "scores/helpful", "scores/harmless", "tilted")
    before = [read_manifest(pairs / name).identity for name in tables]
    lost = min((pairs / "scores" / "helpful").glob("data/*.parquet"))
    n_lost = pq.read_metadata(lost).num_rows
    for name in tables:
        (pairs / name / "manifest.json").unlink()
    lost.unlink()
    min((pairs / "samples").glob("data/*.parquet")).unlink()
    assert dualign("stage1", copied) == 0
    assert [read_manifest(pairs / name).identity for name in tables] == before
    assert read_manifest(pairs / "scores" / "helpful").details["last_call"]["rows_scored"] == n_lost
    assert n_lost < read_manifest(pairs / "samples").counts["rows"]


def test_a_larger_limit_scores_only_what_is_new_and_a_smaller_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with_pairs(tmp_path)
    assert dualign("stage1", recipe, "--limit", "4") == 0
    pairs = run_folder(recipe) / "pairs"
    few = {(row["prompt_id"], row["sample_index"]) for row in rows_of(pairs / "samples")}
    assert len({name for name, _ in few}) == 4
    lowest = sorted({prompt_id(messages(number)) for number in train_numbers(good_rows())})[:4]
    assert {name for name, _ in few} == set(lowest)
    (pairs / "tilted" / "manifest.json").unlink()  # as if the call had been killed
    assert dualign("stage1", recipe, "--limit", "6") == 0
    more = {(row["prompt_id"], row["sample_index"]) for row in rows_of(pairs / "samples")}
    assert few < more
    last_call = read_manifest(pairs / "scores" / "helpful").details["last_call"]
    assert (last_call["rows_present"], last_call["rows_scored"]) == (len(few), len(more - few))
    assert validate_run(run_folder(recipe)).faults == []
    capsys.readouterr()
    assert dualign("stage1", recipe, "--prompts.limit", "6", "--training.pairs.limit", "5") == 2
    assert "`training.pairs.limit` is smaller than it was" in capsys.readouterr().err


def test_a_prompt_that_the_run_tests_on_is_not_trained_on_whatever_the_source_says(tmp_path: Path) -> None:
    recipe = recipe_with_pairs(tmp_path, [{**row, "fold": "train"} for row in good_rows()])
    config = load_config(recipe, {"training.pairs.split_column": "fold"})
    tests = {prompt_id(messages(3)), prompt_id(messages(4))}
    everything = read_pairs(config, test_prompts=set())
    without = read_pairs(config, test_prompts=tests)
    assert {pair.prompt_id for pair in everything.pairs} - {pair.prompt_id for pair in without.pairs} == tests
    assert without.counts["test"] == len(everything.pairs) - len(without.pairs) == 3


def test_a_prompt_that_is_tested_on_in_one_row_is_trained_on_in_none(tmp_path: Path) -> None:
    rows = [{**row, "fold": "test" if place == 1 else "train"} for place, row in enumerate(good_rows())]
    config = load_config(recipe_with_pairs(tmp_path, rows), {"training.pairs.split_column": "fold"})
    found = read_pairs(config, test_prompts=set())
    assert found.counts["test"] == 2
    assert prompt_id(messages(1)) not in {pair.prompt_id for pair in found.pairs}


def test_the_numbers_of_pairs_do_not_depend_on_which_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": "q", "one": one, "two": "b"} for one in ("a", "b", "c")]
    config = load_config(recipe_with_pairs(tmp_path, [{**row, "fold": "train"} for row in rows]))
    config = load_config(tmp_path / "recipe.yaml", {"training.pairs.split_column": "fold"})
    assert [pair.number for pair in read_pairs(config, test_prompts=set()).pairs] == [0, 2]


def test_the_system_message_is_that_of_the_prompts(tmp_path: Path) -> None:
    config = load_config(recipe_with_pairs(tmp_path), {"prompts.system": "be brief"})
    found = read_pairs(config, test_prompts=set()).pairs[0]
    assert found.messages[0] == {"role": "system", "content": "be brief"}
    assert found.prompt_id == prompt_id(found.messages)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "q", "one": 3, "two": 4}, {}, r"pairs\.jsonl, row 0: `one` is 3; it must be a text"),
        ({"text": 3, "one": "a", "two": "b"}, {}, r"row 0: the prompt is 3; it must be a non-empty text or a list"),
        (
            {"text": "q", "one": "a"},
            {},
            r"`training\.pairs\.response_columns` is 'two', but .* has the columns \['text', 'one'\]",
        ),
        ({"prompt": "q", "one": "a", "two": "b"}, {}, r"`training\.pairs\.prompt_column` is 'text'"),
        (
            {"text": "q", "one": "a", "two": "b", "fold": "valid"},
            {"training.pairs.split_column": "fold"},
            r"row 0: the prompt has the split 'valid'; it must be one of train, test",
        ),
        (
            {},
            {"training.pairs.source": "nowhere.jsonl"},
            r"`training\.pairs\.source` is 'nowhere\.jsonl'; there is no",
        ),
        ({}, {"training.pairs.source": "owner/name"}, r"on the Hub; give its `training\.pairs\.revision` too"),
    ],
)
def test_malformed_sources_are_named(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, str], message: str
) -> None:
    config = load_config(recipe_with_pairs(tmp_path, [row]), settings)
    with pytest.raises(InputError, match=message):
        read_pairs(config, test_prompts=set())


def test_pairs_of_which_none_is_left_stop_the_run_before_it_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = next(n for n in range(N_PROMPTS) if split(n) == "train")
    recipe = recipe_with_pairs(tmp_path, [{"text": f"question {number}", "one": "same", "two": "same"}])
    assert dualign("stage1", recipe) == 2
    assert "no pair is left to train on (source_rows 1, equal 1" in capsys.readouterr().err
    assert not (run_folder(recipe) / "samples").exists()
    assert not (run_folder(recipe) / "pairs").exists()


def test_pairs_are_asked_for_of_a_run_that_was_done_without_them(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_folder(copied) / "pairs")
    assert dualign("train", copied) == 2
    message = capsys.readouterr().err
    assert "needs the step `sample`" in message
    assert "for `training.pairs` (no pairs/prompts)" in message


def test_a_redone_step_makes_the_pairs_of_it_anew(copied: Path) -> None:
    pairs = run_folder(copied) / "pairs"
    before = read_manifest(pairs / "samples").identity
    assert dualign("export", copied, "--redo") == 0
    assert (pairs / "scores" / "helpful" / "manifest.json").exists()
    assert (pairs / "tilted" / "manifest.json").exists()
    assert not (run_folder(copied) / "policy").exists()
    assert dualign("score", copied, "--redo") == 0
    assert not (pairs / "tilted").exists()
    assert (pairs / "scores" / "helpful" / "manifest.json").exists()
    assert read_manifest(pairs / "samples").identity == before


def test_validate_names_what_is_wrong_with_pairs(copied: Path) -> None:
    run = run_folder(copied)
    path = min((run / "pairs" / "samples").glob("data/*.parquet"))
    table = pq.read_table(path)
    replace_file(path, table.slice(1))
    faults = " ".join(validate_run(run).faults)
    assert "1 responses have no partner" in faults
    assert "1 scores of samples that are not in" in faults
    test_prompt = next(
        row["prompt_id"] for row in pq.read_table(run / "prompts" / "data").to_pylist() if row["split"] == "test"
    )
    ids = table["prompt_id"].to_pylist()
    renamed = [test_prompt if name == ids[0] else name for name in ids]
    replace_file(path, table.set_column(0, table.schema.field(0), [renamed]))
    assert "rows are of test prompts of the run" in " ".join(validate_run(run).faults)


def test_the_iterative_method_trains_on_them_too(copied: Path) -> None:
    multishot = {"iterations": 2, "samples_per_prompt": 2, "epochs": 0.5}
    assert dualign("multishot", copied, *(f"--multishot.{name}={value}" for name, value in multishot.items())) == 0
    run = run_folder(copied)
    first, second = (read_manifest(folder / "policy").inputs for folder in (run, run / "multishot" / "1"))
    assert first["pairs/samples"] == second["pairs/samples"]
    assert first["pairs/tilted"] != second["pairs/tilted"]
    assert validate_run(run / "multishot" / "1").faults == []
