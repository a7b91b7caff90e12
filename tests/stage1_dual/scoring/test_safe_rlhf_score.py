from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.score_models import read_weights, save_tiny_score_model, score_from_tensors, write_weights
from helpers.tiny_models import save_tiny_classifier
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.contracts.errors import InputError
from stage1_dual.checkpoints import check_score_model_checkpoint
from stage1_dual.scoring.outputs import Affine, HeadOutput
from stage1_dual.scoring.protocol import Score, ScoreRequest
from stage1_dual.scoring.safe_rlhf_score import SafeRlhfScorer

pytestmark = pytest.mark.slow

WORDS = ("take", "a", "small", "step", "call", "your", "friend", "and", "rest", "what", "could", "I", "do", "alone")


def make_rows(*, prompts: int, samples: int) -> list[ScoreRequest]:
    rng = random.Random(0)
    rows = []
    for p in range(prompts):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        rows += [
            ScoreRequest(
                f"p{p}", k, [{"role": "user", "content": prompt}], " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
            )
            for k in range(samples)
        ]
    return rows


def values(scorer: SafeRlhfScorer, rows: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
    found = scorer.score(rows)
    assert all(isinstance(score, Score) for score in found)
    return [score.values for score in found if isinstance(score, Score)]


def expected(folder: Path, rows: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        f"BEGINNING OF CONVERSATION: USER: {row.messages[0]['content']} ASSISTANT:{row.completion}<eos>"
        for row in rows
    ]
    return [tuple(score_from_tensors(folder, tokenizer(text)["input_ids"])) for text in texts]


@pytest.mark.parametrize("score_type", ["reward", "cost", "critic"])
@pytest.mark.parametrize(
    ("do_normalize", "older", "bias", "shards"),
    [(True, False, True, 1), (False, True, False, 3), (True, False, False, 2)],
)
def test_scores_are_those_of_the_raw_tensors(
    tmp_path: Path, score_type: str, do_normalize: bool, older: bool, bias: bool, shards: int
) -> None:
    folder = save_tiny_score_model(
        tmp_path, score_type=score_type, do_normalize=do_normalize, older=older, bias=bias, shards=shards
    )
    rows = make_rows(prompts=4, samples=5)
    wanted = expected(folder, rows)
    for token_budget in (120, 4096):
        for share in (False, True):
            scorer = SafeRlhfScorer(str(folder), token_budget=token_budget, share_prefixes=share)
            assert values(scorer, rows) == [pytest.approx(value, abs=1e-5) for value in wanted]
    assert [values(scorer, [row])[0] for row in rows[:6]] == [pytest.approx(value, abs=1e-5) for value in wanted[:6]]
    assert values(scorer, rows[::-1])[::-1] == [pytest.approx(value, abs=1e-5) for value in wanted]
    assert len(set(wanted)) == len(rows)


@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_decides_nothing(tmp_path: Path, pad_is_eos: bool, padding_side: str) -> None:
    folder = save_tiny_score_model(tmp_path, pad_is_eos=pad_is_eos)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": padding_side}))
    rows = make_rows(prompts=3, samples=4)
    # The last attended token is the EOS, also where the tokenizer pads with it.
    assert values(SafeRlhfScorer(str(folder)), rows) == [pytest.approx(v, abs=1e-5) for v in expected(folder, rows)]


def test_several_scores_of_one_pass_each_in_its_units(tmp_path: Path) -> None:
    folder = save_tiny_score_model(tmp_path, score_type="cost", score_dim=3)
    rows = make_rows(prompts=2, samples=3)
    outputs = [HeadOutput(2), HeadOutput(0, affine=Affine(-1, 5.0)), HeadOutput(0)]
    found = values(SafeRlhfScorer(str(folder), outputs=outputs), rows)
    wanted = [(raw[2], 5.0 - raw[0], raw[0]) for raw in expected(folder, rows)]
    assert found == [pytest.approx(value, abs=1e-5) for value in wanted]


def test_head_and_normaliser_stay_in_float32(tmp_path: Path) -> None:
    folder = save_tiny_score_model(tmp_path)
    rows = make_rows(prompts=6, samples=6)
    low = [value for (value,) in values(SafeRlhfScorer(str(folder), dtype="bfloat16"), rows)]
    full = [value for (value,) in values(SafeRlhfScorer(str(folder)), rows)]
    assert low == pytest.approx(full, abs=0.3)
    assert any(torch.tensor(value).bfloat16().double() != value for value in low)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    return apply


def rename_head(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"] = weights.pop("score_head.weight")


def add_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["score_head.bias"] = torch.zeros(1)


def widen(weights: dict[str, torch.Tensor]) -> None:
    weights["normalizer.mean"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("score_head.weight"), r"1 missing weights \(score_head.weight\)"),
        (drop("normalizer.var"), r"1 missing weights \(normalizer.var\)"),
        (drop("model.layers.1.mlp.up_proj.weight"), "1 missing weights"),
        (rename_head, "missing weights"),
        (add_bias, r"1 unexpected weights \(score_head.bias\)"),
        (widen, r"1 mismatched weights \(normalizer.mean\)"),
    ],
)
def test_weights_that_do_not_fit_are_fatal(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    folder = save_tiny_score_model(tmp_path, bias=False)
    weights = read_weights(folder)
    damage(weights)
    write_weights(folder, weights)
    with pytest.raises(InputError, match=message):
        SafeRlhfScorer(str(folder))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("score_type", "toxicity", "`score_type` 'toxicity'; it must be one of reward, cost, critic"),
        ("architectures", ["LlamaForCausalLM"], "not a score model of safe-rlhf"),
        ("score_dim", 0, "no head 0"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(tmp_path: Path, setting: str, value: object, message: str) -> None:
    folder = save_tiny_score_model(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(InputError, match=message):
        SafeRlhfScorer(str(folder))


def test_a_classifier_is_not_a_score_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a score model of safe-rlhf.*LlamaForSequenceClassification"):
        check_score_model_checkpoint(str(save_tiny_classifier(tmp_path)), head=0, template=None)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save_tiny_score_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*.safetensors.*Convert pytorch_model.bin once: .*save_file"):
        check_score_model_checkpoint(str(folder), head=0, template=None)


def test_what_is_reported(tmp_path: Path) -> None:
    description = dict(SafeRlhfScorer(str(save_tiny_score_model(tmp_path, score_type="cost"))).describe())
    json.dumps(description)
    assert {"score_type": "cost", "do_normalize": True, "dtype": "float32"}.items() <= description.items()


@pytest.mark.parametrize("shards", [1, 3])
def test_the_documented_conversion_gives_the_same_scores(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_score_model(tmp_path, shards=shards)
    rows = make_rows(prompts=2, samples=2)
    before = values(SafeRlhfScorer(str(folder)), rows)
    for path in list(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if shards > 1:
        names = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(names)
        index.unlink()
    page = (Path(__file__).parents[3] / "docs" / "scorers.md").read_text()
    (script,) = re.findall(r"## Weights.*?```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(script, {})
    assert values(SafeRlhfScorer(str(folder)), rows) == before
