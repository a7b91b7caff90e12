"""The whole path on real parts: the embedded world, real vLLM, real checkpoints, real processes killed for real.

The embedded default, shrunk in samples and epochs only. The world is built once and cached beside the other models of
the repository, where `make stage1` finds it too.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.contracts.artifacts import read_json, read_manifest
from stage1_dual.dual import DualProblem, solve_dual

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SHRUNK = {
    "sampling.samples_per_prompt": "8",
    "sampling.shard_rows": "1024",
    "constraints.harmless.margin": "0.3",
    "constraints.harmless.assurance": "null",
    "training.epochs": "2",
    "training.evaluations": "6",
    "evaluation.samples_per_prompt": "8",
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data folder of its own whose models are the repository's, so that the world is built at most once."""
    folder = tmp_path_factory.mktemp("data")
    (ROOT / "data" / "models").mkdir(exist_ok=True)
    (folder / "models").symlink_to(ROOT / "data" / "models")
    return folder


def arguments(command, data_dir, name, *more):
    options = ["--run", name, "--data-dir", str(data_dir), "--no-progress"]
    settings = {**SHRUNK, **dict(text.removeprefix("--").split("=") for text in more if "=" in text)}
    flags = [text for text in more if "=" not in text]
    program = str(Path(sys.executable).parent / "dualign")
    return [program, *command.split(), *options, *flags, *(f"--{key}={value}" for key, value in settings.items())]


def dualign(command, data_dir, name, *more, expect=0):
    done = subprocess.run(
        arguments(command, data_dir, name, *more), capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert done.returncode == expect, done.stderr[-4000:]
    return done


def kill_when(condition, command, data_dir, name):
    """Start a command, SIGKILL its whole process group as soon as the condition holds, and say that it was running."""
    process = subprocess.Popen(
        arguments(command, data_dir, name),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, f"`{command}` ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert process.returncode == -signal.SIGKILL


def table(folder, columns=None):
    frame = pd.read_parquet(folder / "data", columns=columns)
    return frame.sort_values(["prompt_id", "sample_index"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def whole(data_dir):
    """Stage 1 without interruption."""
    done = dualign("stage1", data_dir, "whole")
    assert "lambda*" in done.stdout
    return data_dir / "runs" / "whole"


@pytest.fixture(scope="module")
def killed(data_dir, whole):
    """The same run killed in the middle of sampling, of scoring and of training, and continued each time."""
    name, folder = "killed", data_dir / "runs" / "killed"
    dualign("prepare", data_dir, name)

    def shards(step):
        return list((folder / step / "parts").glob("*.parquet"))

    kill_when(lambda: len(shards("samples")) >= 2, "sample", data_dir, name)
    assert not (folder / "samples" / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in shards("samples")}
    dualign("sample", data_dir, name)
    names = {entry.name: entry.stat().st_mtime_ns for entry in (folder / "samples" / "data").iterdir()}
    assert set(kept.values()) <= set(names.values())  # finished shards were kept, not drawn again

    kill_when(lambda: len(shards("scores/helpful")) >= 1, "score", data_dir, name)
    dualign("score", data_dir, name)
    dualign("stage1", data_dir, name)

    checkpoints = folder / "policy" / "checkpoints"
    kill_when(lambda: list(checkpoints.glob("checkpoint-*/trainer_state.json")), "train", data_dir, name)
    assert not (folder / "policy" / "manifest.json").exists()
    dualign("stage2", data_dir, name)
    return folder


def test_a_killed_and_continued_run_has_the_same_samples_scores_and_multiplier(whole, killed):
    pd.testing.assert_frame_equal(table(whole / "samples"), table(killed / "samples"))
    for name in ("helpful", "harmless", "humour"):
        pd.testing.assert_frame_equal(table(whole / "scores" / name), table(killed / "scores" / name))
    first, second = (json.loads((run / "dual" / "dual.json").read_text()) for run in (whole, killed))
    assert first["constraints"] == second["constraints"]


def test_samples_are_draws_with_one_bos_and_their_own_seeds(whole):
    samples = table(whole / "samples")
    tokenizer = AutoTokenizer.from_pretrained(next((whole.parents[1] / "models").glob("microworld-*/reference")))
    assert (samples["prompt_token_ids"].map(lambda ids: (ids == tokenizer.bos_token_id).sum()) == 1).all()
    stopped = samples[samples["finish_reason"] == "stop"]
    assert len(stopped) > 0.95 * len(samples)
    assert (stopped["completion_token_ids"].map(lambda ids: ids[-1]) == tokenizer.eos_token_id).all()
    assert samples["seed"].is_unique
    assert not samples["completion"].str.contains(tokenizer.eos_token, regex=False).any()
    assert set(samples.groupby("prompt_id").size()) == {8}
    assert samples["sampler_logp"].lt(0).all()


def test_the_dual_is_certified_and_follows_from_the_tables(whole):
    dual = json.loads((whole / "dual" / "dual.json").read_text())
    assert dual["kkt_residual"] <= 1e-8
    train = sorted((whole / "samples" / "data").glob("train-*"))
    keys = pd.concat([pd.read_parquet(path, columns=["prompt_id", "sample_index"]) for path in train])
    scores = {
        name: table(whole / "scores" / name).merge(keys, on=["prompt_id", "sample_index"])["value"].to_numpy()
        for name in ("helpful", "harmless")
    }
    ids = table(whole / "scores" / "helpful").merge(keys, on=["prompt_id", "sample_index"])["prompt_id"]
    problem = DualProblem.from_rows(
        ids.to_numpy(),
        scores["helpful"],
        scores["harmless"],
        thresholds=[scores["harmless"].mean() + 0.3],
        beta=1.0,
    )
    solution = solve_dual(problem)
    assert dual["constraints"][0]["multiplier"] == pytest.approx(solution.multipliers[0], rel=1e-9)
    assert dual["reward"]["predicted"] == pytest.approx(solution.predicted_reward, rel=1e-9)


def test_the_tilted_table_is_readable_and_its_weights_are_the_gibbs_weights(whole, tmp_path):
    dual = json.loads((whole / "dual" / "dual.json").read_text())
    loaded = load_dataset(str(whole / "tilted"), cache_dir=str(tmp_path))
    assert set(loaded) == {"train", "test"}
    assert loaded["train"].column_names == [
        "prompt_id",
        "sample_index",
        "prompt",
        "completion",
        "reward",
        "constraint_harmless",
        "weight",
        "split",
        "category",
    ]
    frame = loaded["train"].to_pandas()
    logit = (frame["reward"] + dual["constraints"][0]["multiplier"] * frame["constraint_harmless"]) / dual["beta"]
    weight = np.exp(logit - logit.max())
    expected = weight / weight.groupby(frame["prompt_id"]).transform("sum")
    np.testing.assert_allclose(frame["weight"], expected, rtol=1e-9)
    card = (whole / "tilted" / "README.md").read_text()
    assert "path: data/train-*" in card


def test_the_evaluation_holds_together(killed):
    evaluation = json.loads((killed / "evaluation" / "evaluation.json").read_text())
    dual = json.loads((killed / "dual" / "dual.json").read_text())
    assert evaluation["status"] in {"satisfied", "undecided", "violated"}
    (bound,) = evaluation["constraints"]
    assert bound["threshold"] == pytest.approx(bound["reference"] + 0.3)
    assert bound["slack"] == pytest.approx(bound["realised"] - bound["threshold"])
    samples = table(killed / "evaluation" / "samples", ["prompt_id", "sample_index"])
    assert evaluation["n_samples"] == len(samples) == 8 * evaluation["n_prompts"]
    realised = table(killed / "evaluation" / "scores" / "harmless").groupby("prompt_id")["value"].mean().mean()
    assert bound["realised"] == pytest.approx(realised)
    assert evaluation["kl"]["realised"] > 0
    # Trained a little on few samples, the policy must have moved towards the optimum, and cannot be beyond it.
    assert 0.1 < evaluation["lagrangian"]["closed_fraction"] < 1.1
    assert evaluation["reward"]["realised"] > evaluation["reward"]["reference"]
    assert dual["constraints"][0]["multiplier"] >= 0


def test_the_policy_is_an_ordinary_checkpoint_and_the_chain_of_hashes_holds(killed):
    model = AutoModelForCausalLM.from_pretrained(killed / "policy")
    tokenizer = AutoTokenizer.from_pretrained(killed / "policy")
    assert tokenizer.chat_template
    assert model.generation_config.top_k == 0
    card = (killed / "policy" / "README.md").read_text()
    demanded, asked = (
        f"{bound[name] if name == 'threshold' else bound[name]['threshold']:.4g}"
        for bound in read_json(killed / "dual" / "dual.json")["constraints"]
        for name in ("demanded", "threshold")
    )
    lines = card.splitlines()
    # One line after the other, or it is no table to a Markdown reader.
    head = next(place for place, line in enumerate(lines) if line.endswith("| realised | verdict |"))
    assert set(lines[head + 1]) == {"|", "-"}
    assert lines[head + 2].startswith(f"| `harmless` >= | {demanded} | {asked} |")
    chain = {name: read_manifest(killed / name) for name in ("samples", "dual", "tilted", "policy", "evaluation")}
    assert chain["dual"].inputs["samples"] == chain["samples"].identity
    assert chain["tilted"].inputs["dual"] == chain["dual"].identity
    assert chain["policy"].inputs["dual"] == chain["dual"].identity
    assert chain["evaluation"].inputs["policy"] == chain["policy"].identity
    assert (killed / "report" / "report.html").stat().st_size > 50_000


def test_a_finished_run_costs_seconds_and_changes_nothing(data_dir, killed):
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("manifest.json")}
    done = dualign("run", data_dir, "killed")
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("manifest.json")} == before
    assert "kept" in done.stderr


def test_a_changed_setting_is_refused_by_name_and_nothing_is_lost(data_dir, killed):
    done = dualign("stage1", data_dir, "killed", "--constraints.harmless.margin=0.4", expect=2)
    assert "margin: 0.3 then, 0.4 now" in done.stderr
    assert "--redo" in done.stderr
    assert (killed / "policy" / "manifest.json").exists()
    done = dualign("stage1", data_dir, "killed", "--seed=9", expect=2)
    assert "seed: 0 then, 9 now" in done.stderr
    done = dualign("stage1", data_dir, "killed", "--sampling.samples_per_prompt=4", expect=2)
    assert "samples_per_prompt: 8 then, 4 now" in done.stderr


def test_a_tilted_table_of_another_dual_is_refused(data_dir, killed):
    """A second run's dual put in the place of the first's: the hashes must notice before training starts."""
    name = "mixed"
    folder = data_dir / "runs" / name
    shutil.copytree(killed, folder, ignore=shutil.ignore_patterns("policy", "evaluation", "report"))
    dualign("solve", data_dir, name, "--redo", "--constraints.harmless.margin=0.4")
    shutil.copytree(killed / "tilted", folder / "tilted", dirs_exist_ok=True)
    done = dualign("train", data_dir, name, "--constraints.harmless.margin=0.4", expect=2)
    assert "dual" in done.stderr
    assert not (folder / "policy" / "model.safetensors").exists()


def test_a_larger_margin_than_the_samples_allow_exits_with_3(data_dir, killed):
    folder = data_dir / "runs" / "infeasible"
    shutil.copytree(killed, folder, ignore=shutil.ignore_patterns("policy", "evaluation", "report", "tilted"))
    done = dualign("solve", data_dir, "infeasible", "--redo", "--constraints.harmless.margin=50", expect=3)
    assert "best attainable alone" in done.stderr
    assert not (folder / "dual" / "dual.json").exists()


def test_more_responses_compute_only_what_is_new_and_repeat_none(data_dir, whole):
    before = table(whole / "samples")
    more = "--sampling.samples_per_prompt=10"
    dualign("stage1", data_dir, "whole", more)
    after = table(whole / "samples")
    assert set(after.groupby("prompt_id").size()) == {10}
    kept = after[after["sample_index"] < 8].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
    assert after["seed"].is_unique
    assert len(table(whole / "scores" / "humour")) == len(after)
    rows = sum(pq.read_metadata(path).num_rows for path in (whole / "tilted" / "data").iterdir())
    assert rows == len(after)
