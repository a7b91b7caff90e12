"""Real engines, few of them: one for each way in which vLLM pools what is read here."""

from __future__ import annotations

import json
import os
import random
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers.reward_models import ATTRIBUTES, LLAMA_3, build_published_tokenizer, save_published
from helpers.tiny_models import save_tiny_classifier
from helpers.tiny_runs import dualign, rows_of, run_folder, write_recipe

from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import InputError, MissingExtraError
from stage1_dual.checkpoints import Heads
from stage1_dual.scoring.outputs import HeadOutput
from stage1_dual.scoring.protocol import Score, ScoreRequest
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer
from stage1_dual.scoring.vllm_pooling import POOLED, VllmPooling, require_pooled

pytestmark = pytest.mark.slow

WORDS = ("take", "a", "small", "step", "call", "your", "friend", "and", "rest", "what", "could", "I", "do", "alone")


def make_rows(prompts: int, responses: int) -> list[ScoreRequest]:
    rng = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    asked = [[{"role": "user", "content": text(30)}] for _ in range(prompts)]
    return [ScoreRequest(f"p{p}", k, asked[p], text(30)) for p in range(prompts) for k in range(responses)]


def settings_of_vllm() -> dict[str, str]:
    """What vLLM reads from the environment; packages that transformers imports leave settings of their own."""
    return {name: value for name, value in os.environ.items() if name.startswith(("VLLM", "HF_", "DO_NOT"))}


def scored(folder: Path, rows: list[ScoreRequest], **settings: object) -> tuple[torch.Tensor, dict[str, object]]:
    scorer = SequenceClassificationScorer(str(folder), **settings)  # type: ignore[arg-type]
    try:
        found = scorer.score(rows)
        assert all(isinstance(score, Score) for score in found)
        described = dict(scorer.describe())
    finally:
        scorer.close()
    return torch.tensor([score.values for score in found if isinstance(score, Score)]), described


@pytest.mark.parametrize("name", ["attributes", "qwen_reward"])
def test_the_numbers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    # Padded with the EOS, with which its texts end: the token before is the one that transformers reads.
    padded = {"pad_token_id": build_published_tokenizer(LLAMA_3).eos_token_id} if name == "attributes" else {}
    folder = save_published(tmp_path, name, **padded)
    heads = len(ATTRIBUTES) if name == "attributes" else 1
    outputs = [HeadOutput(head) for head in reversed(range(heads))]
    rows = make_rows(prompts=6, responses=8)
    of_vllm, random_state = settings_of_vllm(), torch.get_rng_state()
    # A budget that all texts are far above, and a length that cuts some of them.
    common = {"outputs": outputs, "max_length": 110, "token_budget": 256}
    found, described = scored(folder, rows, engine="vllm", checked_share=0.5, **common)
    assert settings_of_vllm() == of_vllm
    assert torch.equal(torch.get_rng_state(), random_state)
    expected, plain = scored(folder, rows, **common)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    assert found.shape == (48, heads)
    assert found.abs().max() > 1.5  # no sigmoid and no softmax
    assert (found < 0).any()
    check = described.pop("engine_check")
    assert isinstance(check, dict)
    assert 10 < check["texts"] <= 48
    assert 0 < check["largest_difference"] < 1e-5
    assert {**plain, "engine": "vllm"} == described
    json.dumps(check)


def test_a_run_ends_where_the_engines_differ_and_goes_on_where_they_do_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(save_published(tmp_path / "reward", "causal_config"))
    scorers = {"helpful": {"model": model, "template": "{prompt} {completion}", "engine": "vllm"}}
    recipe = write_recipe(tmp_path, scorers=scorers)
    for command in ("prepare", "sample"):
        assert dualign(command, recipe) == 0
    # What rounding leaves is above such a limit.
    assert dualign("score", recipe, "--scorers.helpful.engine_limit", "1e-12") == 2
    assert "vLLM gives other scores than transformers: " in capfd.readouterr().err
    scores = run_folder(recipe) / "scores" / "helpful"
    assert not list(scores.glob("**/*.parquet"))

    assert dualign("score", recipe) == 0
    samples = rows_of(run_folder(recipe) / "samples")
    found = rows_of(scores)
    tables = [pq.read_table(path) for path in (run_folder(recipe) / "prompts").glob("data/*.parquet")]
    asked = {row["prompt_id"]: row["prompt"] for table in tables for row in table.to_pylist()}
    expected, _ = scored(
        Path(model),
        [ScoreRequest(r["prompt_id"], r["sample_index"], asked[r["prompt_id"]], r["completion"]) for r in samples],
        template="{prompt} {completion}",
    )
    assert [row["value"] for row in found] == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    manifest = read_manifest(scores)
    check = manifest.details["last_call"]["scorer"]["engine_check"]
    assert check["limit"] == 1e-4
    assert 0 < check["largest_difference"] < 1e-5
    assert 8 <= check["texts"] < 144  # the longest of each of eight shards at least
    assert manifest.settings["engine"] == "vllm"
    assert not {"checked_share", "engine_limit"} & set(manifest.settings)
    # Another engine is another scorer.
    assert dualign("score", recipe, "--scorers.helpful.engine", "transformers") == 2


def test_an_architecture_that_is_not_pooled_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "armorm")
    for path in folder.glob("*.safetensors"):
        os.truncate(path, path.stat().st_size - 1000)  # nothing of it could be loaded
    with pytest.raises(InputError, match=r"its architecture is LlamaForRewardModelWithGating.*`engine: transformers`"):
        SequenceClassificationScorer(str(folder), engine="vllm")
    for name in POOLED:
        require_pooled(Heads([name], "linear", {0: "LABEL_0"}), checkpoint="c")


def test_a_missing_vllm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_classifier(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    environment = dict(os.environ)
    with pytest.raises(MissingExtraError, match=r"scoring with vLLM needs the package `vllm`.*dualign\[sample\]"):
        SequenceClassificationScorer(str(folder), engine="vllm")
    assert dict(os.environ) == environment


def test_what_the_engine_cannot_do_is_one_message(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "causal_config")
    heads = Heads(["LlamaForCausalLM"], "linear", {0: "LABEL_0"})
    start = partial(VllmPooling, str(folder), heads=heads, revision=None, dtype="float32", token_budget=256)
    of_vllm = settings_of_vllm()
    with pytest.raises(InputError, match="vLLM cannot load"):
        start(max_length=129)  # more than the model has positions for
    config = json.loads((folder / "config.json").read_text())
    # Heads of 16: vLLM has no kernel for them on a CPU.
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "num_key_value_heads": 2}))
    with pytest.raises(InputError, match=r"vLLM cannot compute .*head_dim=16"):
        start(max_length=128)
    assert settings_of_vllm() == of_vllm
