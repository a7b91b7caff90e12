"""`dualign validate` says nothing of a good run, and names what is wrong with each kind of damaged one."""

import json
import re
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import dualign, replace_file, run_folder, write_recipe

from pipeline.cli import main
from pipeline.contracts.artifacts import read_manifest, write_manifest
from pipeline.contracts.errors import InputError
from pipeline.steps.validate import validate_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    recipe = write_recipe(tmp_path_factory.mktemp("good"))
    assert dualign("stage1", recipe) == 0
    return run_folder(recipe)


@pytest.fixture
def run(good, tmp_path):
    shutil.copytree(good, tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny"


def first(folder, split="train"):
    return min(folder.glob(f"data/{split}-*.parquet"))


def with_column(path, name, values):
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    replace_file(
        path, table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    )


def test_a_good_run_has_no_faults_and_its_chain_is_shown(good, capsys):
    assert main(["validate", str(good), "--no-progress"]) == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines()[:-1]]
    assert names == ["prompts", "samples", "scores/harmless", "scores/helpful", "dual", "tilted"]
    assert "no faults" in out
    assert validate_run(good).faults == []


def test_a_run_with_its_policy_has_no_faults_though_a_prompt_lost_its_responses(tmp_path, capsys):
    """Most responses are cut off and dropped, so that a test prompt has some of one policy and none of the other."""
    recipe = write_recipe(tmp_path, solve={"on_length": "drop"}, sampling={"samples_per_prompt": 24})
    settings = {"training.epochs": "0.2", "training.evaluations": "1", "evaluation.samples_per_prompt": "2"}
    settings["training.held_out_fraction"] = "0.3"
    assert (
        dualign("run", recipe, *(f"--{name}={value}" for name, value in settings.items())) == 6
    )  # one step of rate 0
    evaluation = json.loads((run_folder(recipe) / "evaluation" / "evaluation.json").read_text())
    assert evaluation["n_prompts"] > 0
    assert evaluation["prompts_left_out"] > 0
    assert "no response left of one of the policies" in capsys.readouterr().err
    assert validate_run(run_folder(recipe)).faults == []
    (run_folder(recipe) / "policy" / "config.json").write_text("{}")
    faults = validate_run(run_folder(recipe)).faults
    assert any("evaluation/samples: was drawn from another `policy`" in fault for fault in faults)


def test_a_template_may_begin_every_turn_with_a_bos(run):
    for path in (run / "samples").glob("data/*.parquet"):
        ids = pq.read_table(path)["prompt_token_ids"].to_pylist()
        with_column(path, "prompt_token_ids", [[*tokens, 1, 5] for tokens in ids])
    faults = validate_run(run).faults
    assert faults
    assert not any("BOS" in fault for fault in faults)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x08
    path.write_bytes(bytes(data))


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def repeat_samples(run):
    """Every prompt's samples are its first one, five times over: what equal seeds in a loop would give."""
    for path in sorted((run / "samples").glob("data/*.parquet")):
        table = pq.read_table(path)
        last = {prompt: row for row, prompt in enumerate(table["prompt_id"].to_pylist())}
        same = table.take([last[prompt] for prompt in table["prompt_id"].to_pylist()])
        for name in ("completion", "completion_token_ids", "sampler_logp"):
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), same[name])
        replace_file(path, table)


def double_bos(run):
    path = first(run / "samples")
    with_column(path, "prompt_token_ids", [[1, *ids] for ids in pq.read_table(path)["prompt_token_ids"].to_pylist()])


def turn_sign(run):
    path = first(run / "tilted")
    with_column(path, "constraint_harmless", pc.negate(pq.read_table(path)["constraint_harmless"]).to_pylist())


def other_weights(run):
    path = first(run / "tilted")
    with_column(path, "weight", [2 * weight for weight in pq.read_table(path)["weight"].to_pylist()])


def other_prompts(run):
    path = first(run / "prompts")
    table = pq.read_table(path)
    with_column(path, "prompt", [[{"role": "user", "content": "another"}], *table["prompt"].to_pylist()[1:]])


def lose_scores(run):
    path = first(run / "scores" / "harmless")
    replace_file(path, pq.read_table(path).slice(1))


def not_a_number(run):
    path = first(run / "scores" / "harmless")
    with_column(path, "value", [float("nan"), *pq.read_table(path)["value"].to_pylist()[1:]])


def strange_scores(run):
    path = first(run / "scores" / "harmless")
    with_column(path, "sample_index", [99, *pq.read_table(path)["sample_index"].to_pylist()[1:]])


def other_types(run):
    path = first(run / "samples")
    table = pq.read_table(path)
    replace_file(path, table.set_column(1, "sample_index", table["sample_index"].cast(pa.int64())))


def wrong_split(run):
    path = first(run / "samples", "test")
    table = pq.read_table(path)
    other = pq.read_table(first(run / "samples", "train"))["prompt_id"][0].as_py()
    with_column(path, "prompt_id", [other, *table["prompt_id"].to_pylist()[1:]])


def equal_seeds(run):
    path = first(run / "samples")
    with_column(path, "seed", [7] * pq.read_table(path).num_rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: truncate(first(run / "samples")), r"samples/data/train-0.* is not the file that .*manifest"),
        (lambda run: truncate(first(run / "samples")), r"samples: .*train-0.* is damaged or not Parquet"),
        (lambda run: flip(first(run / "scores" / "helpful")), r"scores/helpful/data/train-0.*sha256 differs"),
        (
            lambda run: first(run / "samples").unlink(),
            r"samples/data/train-0.* cannot be read: No such file",
        ),
        (lambda run: shutil.copy(first(run / "samples"), run / "samples/data/more.parquet"), "not in the manifest"),
        (
            lambda run: edit_json(run / "samples" / "manifest.json", lambda value: value["counts"].update(rows=1)),
            r"samples: 144 rows, 1 in the manifest",
        ),
        (
            lambda run: edit_json(run / "samples" / "manifest.json", lambda value: value["settings"].update(seed=5)),
            r"samples/manifest.json was altered",
        ),
        (
            lambda run: shutil.copy(run / "scores/helpful/manifest.json", run / "scores/harmless/manifest.json"),
            r"scores/harmless/data/train-0.* is not the file that .*manifest\.json records",
        ),
        (repeat_samples, r"pairs of equal train responses to a prompt, \d+\.\d expected by chance"),
        (repeat_samples, r"scores/helpful: was made from another `samples`"),
        (double_bos, r"begins with 2 BOS tokens \(1\); it must begin with exactly one"),
        (double_bos, r"has other token ids than elsewhere in the table"),
        (turn_sign, r"the (reference|predicted) mean of harmless is .* the tilted table gives"),
        (turn_sign, r"tilted: \d+ train rows have another harmless than scores/harmless"),
        (other_weights, r"the weights of \d+ train prompts do not sum to 1"),
        (other_prompts, r"1 prompts are not what their prompt_id says"),
        (lose_scores, r"scores/harmless: 143 rows, 144 in the manifest"),
        (not_a_number, r"1 scores are not finite"),
        (strange_scores, r"1 scores of samples that are not in"),
        (other_types, r"expected \["),
        (wrong_split, r"1 rows are of prompts that are not in the test split"),
        (equal_seeds, r"\d+ samples share the seed of another"),
        (
            lambda run: edit_json(
                run / "dual" / "dual.json", lambda value: value["constraints"][0].update(multiplier=-0.1)
            ),
            r"dual\.json is damaged: `multiplier` of 'harmless' is -0\.1; it must not be negative, but for an",
        ),
        (
            lambda run: edit_json(run / "dual" / "dual.json", lambda value: value.clear()),
            r"dual\.json is damaged: `beta` is missing",
        ),
        (
            lambda run: edit_json(
                run / "dual" / "dual.json", lambda value: value["constraints"][0].update(predicted=-5.0)
            ),
            r"the slack of harmless is",
        ),
        (lambda run: (run / "dual" / "manifest.json").unlink(), r"tilted: was made from `dual`.* not finished"),
    ],
)
def test_each_kind_of_damage_is_named(run, damage, message, capsys):
    damage(run)
    assert main(["validate", str(run), "--no-progress"]) == 2
    out = capsys.readouterr().out
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    assert any(re.search(message, fault) for fault in faults), out


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        validate_run(tmp_path)


def test_hand_offs_within_a_run_are_checked_with_it(good):
    recipe, run = good.parents[2] / "recipe.yaml", good.parent / "exported"
    shutil.copytree(good, run)
    asked = ("--format", "openai-jsonl", "--format", "rl-reward", "--lines-per-prompt", "8")
    assert dualign("export", recipe, *asked, run="exported") == 0
    found = validate_run(run)
    assert found.faults == []
    assert [link.name for link in found.chain][-2:] == ["exports/openai-jsonl", "exports/rl-reward"]
    manifest = read_manifest(run / "exports" / "openai-jsonl")
    assert manifest.details["command"] == (
        f"dualign export --config {recipe} --run exported --format openai-jsonl --lines-per-prompt 8"
    )
    assert manifest.details["reference"] == read_manifest(run / "samples").inputs["reference"]

    write_manifest(run / "exports" / "openai-jsonl", replace(manifest, inputs={**manifest.inputs, "tilted": "0" * 64}))
    (run / "exports" / "rl-reward" / "reward.json").write_text("{}")
    faults = " ".join(validate_run(run).faults)
    assert "exports/openai-jsonl: was made from another `tilted` than the one in the run" in faults
    assert "reward.json is not the file that" in faults
