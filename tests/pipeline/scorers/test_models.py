"""Models by name: built here, in a folder, or on the Hub, of which a cache on disk stands in for the network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.gguf_files import tiny_network, write_gguf
from helpers.tiny_models import save_tiny_policy
from helpers.tiny_runs import dualign, rows_of, run_folder, write_recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.loading import build_config
from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import InputError
from pipeline.run.run import Run
from pipeline.scorers.models import ModelSettings, find_gguf, resolve_model
from pipeline.scoring.groups import group_scorers
from pipeline.steps.validate import validate_run

pytestmark = pytest.mark.slow

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_models_resolve_to_embedded_names_and_folders(tmp_path):
    embedded = {"helpful": tmp_path}
    assert resolve_model(ModelSettings(model="embedded:helpful"), embedded, setting="s") == str(tmp_path)
    assert resolve_model(ModelSettings(model=str(tmp_path)), {}, setting="s") == str(tmp_path)
    with pytest.raises(InputError, match="no such embedded model; did you mean `helpful`"):
        resolve_model(ModelSettings(model="embedded:helpfull"), embedded, setting="scorers.x")
    for missing in ("/not/there", "./not-there", "nowhere", "a/b/c"):
        with pytest.raises(InputError, match=r"`scorers\.x\.model` is .*no such folder"):
            resolve_model(ModelSettings(model=missing), {}, setting="scorers.x")
    with pytest.raises(InputError, match=r"no such folder, and as an id on the Hub it needs its `s\.revision` too"):
        resolve_model(ModelSettings(model="owner/name"), {}, setting="s")


def test_a_model_of_the_hub_is_sampled_from_its_cache_and_a_missing_one_is_named(tmp_path):
    recipe = write_recipe(tmp_path)
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "policy", snapshot)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline", "stage1", "--config", str(recipe), "--run", "tiny", "--no-progress"]
    command += ["--data-dir", str(tmp_path / "data"), "--reference.model", "somebody/tiny", "--reference.revision"]
    missing = subprocess.run([*command, "main"], env=environment, capture_output=True, text=True)
    assert missing.returncode == 2, missing.stderr
    assert (
        "`reference.model` is 'somebody/tiny' at revision 'main', which is neither on this machine" in missing.stderr
    )
    found = subprocess.run([*command, REVISION], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert dualign("stage1", recipe, run="local") == 0
    tokens = [
        [row["completion_token_ids"] for row in rows_of(run_folder(recipe, run) / "samples")]
        for run in ("tiny", "local")
    ]
    assert tokens[0] == tokens[1]


def test_an_adapter_of_the_reference_is_merged_once_and_sampled(tmp_path):
    """The same tokens as from a checkpoint into which somebody merged it by hand."""
    recipe = write_recipe(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert dualign("stage1", recipe, "--reference.adapter", str(tmp_path / "adapter"), run="adapted") == 0
    by_hand = save_tiny_policy(tmp_path / "by-hand", eos_logit=24.0)
    adapted.merge_and_unload().save_pretrained(by_hand)
    assert dualign("stage1", recipe, "--reference.model", str(by_hand), run="merged") == 0
    assert dualign("stage1", recipe, run="plain") == 0
    tokens = {
        run: [row["completion_token_ids"] for row in rows_of(run_folder(recipe, run) / "samples")]
        for run in ("adapted", "merged", "plain")
    }
    assert tokens["adapted"] == tokens["merged"] != tokens["plain"]
    details = read_manifest(run_folder(recipe, "adapted") / "samples").details
    assert details["sampler_logp_difference"]["largest"] < 1e-4
    assert validate_run(run_folder(recipe, "adapted")).faults == []


def test_a_folder_without_an_adapter_is_named(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert dualign("stage1", recipe, "--reference.adapter", str(tmp_path / "policy")) == 2
    assert "`reference.adapter` is " in capsys.readouterr().err


def test_an_adapter_that_is_not_the_merged_one_is_refused_and_redone(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    for seed in (3, 4):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / f"adapter-{seed}")
    first, second = (("--reference.adapter", str(tmp_path / f"adapter-{seed}")) for seed in (3, 4))
    assert dualign("prepare", recipe) == 0
    for arguments in (first, (*first, "--dry-run")):
        assert dualign("sample", recipe, *arguments) == 2
        assert "is not merged into the reference yet; `dualign prepare` merges it" in capsys.readouterr().err
    assert dualign("prepare", recipe, *first) == 0
    assert dualign("sample", recipe, *second) == 2
    assert "but another one is merged" in capsys.readouterr().err
    assert dualign("prepare", recipe, *second) == 2
    assert "`dualign prepare --redo` with the same --config" in capsys.readouterr().err
    assert dualign("prepare", recipe, *second, "--redo") == 0
    assert dualign("sample", recipe, *second, "--dry-run") == 0


def test_a_gguf_file_at_a_temperature_is_written_once_and_sampled(tmp_path, capsys):
    """The same tokens as from a checkpoint whose logits somebody divided by hand."""
    network = tiny_network()
    path = write_gguf(tmp_path / "tiny.gguf", network)
    recipe = write_recipe(tmp_path, reference={"model": str(path), "temperature": 0.5})
    assert dualign("stage1", recipe, "--dry-run") == 0
    assert "a GGUF file here" in capsys.readouterr().out
    assert dualign("stage1", recipe) == 0
    assert validate_run(run_folder(recipe)).faults == []
    by_hand = tmp_path / "by-hand"
    with torch.no_grad():
        network.model.norm.weight.mul_(2)
    network.save_pretrained(by_hand)
    AutoTokenizer.from_pretrained(run_folder(recipe) / "reference" / "checkpoint").save_pretrained(by_hand)
    plain = ("--reference.model", str(by_hand), "--reference.temperature", "null")
    assert dualign("stage1", recipe, *plain, run="by-hand") == 0
    tokens = [
        [row["completion_token_ids"] for row in rows_of(run_folder(recipe, run) / "samples")]
        for run in ("tiny", "by-hand")
    ]
    assert tokens[0] == tokens[1]
    assert dualign("sample", recipe, "--reference.temperature", "0.6") == 2
    assert "`reference.temperature` is 0.6, but" in capsys.readouterr().err
    write_gguf(path, network)
    assert dualign("sample", recipe) == 2
    assert "was made from another file" in capsys.readouterr().err


def test_a_gguf_file_is_found_in_an_installed_package_whose_code_is_not_run(tmp_path, monkeypatch):
    package = tmp_path / "tiny_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_gguf("package:tiny_weights/tiny.gguf") == package / "tiny.gguf"
    for name, message in {
        "package:no_such_weights/tiny.gguf": "no Python package 'no_such_weights' is installed",
        "package:tiny_weights/other.gguf": "there is no such GGUF file",
        "other.gguf": "there is no such GGUF file",
    }.items():
        with pytest.raises(InputError, match=message):
            find_gguf(name)
    with pytest.raises(InputError, match=r"`scorers\.x\.model` .* only the reference can be a GGUF file"):
        resolve_model(ModelSettings(model="other.gguf"), {}, setting="scorers.x")


def test_workers_get_whole_paths_of_what_the_recipe_names_by_relative_ones(tmp_path, monkeypatch):
    """An actor of a running cluster has the current folder of the cluster, not of the command."""
    recipe = write_recipe(tmp_path)
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
    monkeypatch.chdir(tmp_path)
    scorers = {"helpful": {"model": "helpful", "template": "template.jinja"}, "harmless": {"model": "harmless"}}
    tree = {**yaml.safe_load(recipe.read_text()), "reference": {"model": "policy"}, "scorers": scorers}
    run = Run(config=build_config(tree, source="a test"), name="tiny", data_dir=Path("data"))
    assert run.model(run.config.reference, "reference") == str(tmp_path / "policy")
    first, second = group_scorers(run, ["helpful", "harmless"])
    assert first.start.args == (str(tmp_path / "helpful"),)
    assert first.start.keywords["template"] == str(tmp_path / "template.jinja")
    assert second.start.keywords["template"] is None
