from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import save_tiny_classifier, save_tiny_policy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.protocol import ScoreRow
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer

WORDS = ("take", "a", "small", "step", "call", "your", "friend", "and", "rest", "what", "could", "I", "do", "alone")


def make_rows(n: int, *, seed: int = 0) -> list[ScoreRow]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    return [ScoreRow(f"p{k}", 0, [{"role": "user", "content": text(8)}], text(14)) for k in range(n)]


def values(scorer: SequenceClassificationScorer, rows: list[ScoreRow]) -> list[float]:
    return [score.value for score in scorer.score(rows)]


def alone(folder: Path, text: str, head: int) -> float:
    """One text, unpadded, through the model as anybody would load it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return float(model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, head])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("pad_is_eos", "pad_in_config"), [(False, True), (True, True), (True, False)])
def test_a_score_depends_on_its_own_text_alone(
    tmp_path: Path, pad_is_eos: bool, pad_in_config: bool, padding_side: str
) -> None:
    folder = save_tiny_classifier(tmp_path, labels=2, pad_is_eos=pad_is_eos, pad_in_config=pad_in_config)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": padding_side}))
    rows = make_rows(40)
    expected = [alone(folder, f"<user>{r.messages[0]['content']}<assistant>{r.completion}<eos>", 1) for r in rows[:8]]
    scorer = SequenceClassificationScorer(str(folder), head=1)
    together = values(scorer, rows)
    assert together[:8] == pytest.approx(expected, abs=1e-5)
    assert [values(scorer, [row])[0] for row in rows] == pytest.approx(together, abs=1e-5)
    assert values(scorer, rows[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    small = SequenceClassificationScorer(str(folder), head=1, token_budget=100)
    assert values(small, rows) == pytest.approx(together, abs=1e-5)
    assert len(set(together)) == len(rows)  # and it does depend on its text


def test_equal_texts_get_equal_scores_in_their_places(tmp_path: Path) -> None:
    scorer = SequenceClassificationScorer(str(save_tiny_classifier(tmp_path)))
    rows = make_rows(10)
    scores = scorer.score([*rows, *rows[::-1]])
    assert scores[:10] == scores[:9:-1]


def test_the_hash_is_of_the_rendered_text(tmp_path: Path) -> None:
    scorer = SequenceClassificationScorer(str(save_tiny_classifier(tmp_path)), template="Q {prompt} A {completion}")
    (row,) = make_rows(1)
    text = f"Q {row.messages[0]['content']} A {row.completion}"
    assert scorer.score([row])[0].scored_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_no_rows_no_scores(tmp_path: Path) -> None:
    assert SequenceClassificationScorer(str(save_tiny_classifier(tmp_path))).score([]) == []


def test_a_long_text_is_scored_from_its_end_and_flagged(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long = ScoreRow("a", 0, [{"role": "user", "content": "rest " * 40}], "call your friend")
    short = ScoreRow("b", 0, [{"role": "user", "content": "why?"}], "rest")
    scorer = SequenceClassificationScorer(str(folder), max_length=60)
    scores = scorer.score([long, short])
    assert [score.truncated for score in scores] == [True, False]
    ids = tokenizer("<user>" + "rest " * 40 + "<assistant>call your friend<eos>")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        end = float(model(torch.tensor([[ids[0], *ids[-59:]]])).logits[0, 0])
    assert scores[0].value == pytest.approx(end, abs=1e-5)


def test_a_text_as_long_as_allowed_is_whole(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    (row,) = make_rows(1)
    text = f"<user>{row.messages[0]['content']}<assistant>{row.completion}<eos>"
    n_tokens = len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    for max_length, truncated in ((n_tokens, False), (n_tokens - 1, True)):
        scorer = SequenceClassificationScorer(str(folder), max_length=max_length)
        assert scorer.score([row])[0].truncated is truncated


@pytest.mark.parametrize("max_length", [0, 1, 129])
def test_a_length_the_model_cannot_read_is_refused(tmp_path: Path, max_length: int) -> None:
    folder = save_tiny_classifier(tmp_path)
    with pytest.raises(InputError, match=rf"`max_length` is {max_length}.*2 to 128 tokens"):
        SequenceClassificationScorer(str(folder), max_length=max_length)


def test_the_logit_is_raw_and_of_the_wanted_head(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path, labels=3)
    (row,) = make_rows(1)
    text = f"<user>{row.messages[0]['content']}<assistant>{row.completion}<eos>"
    found = [values(SequenceClassificationScorer(str(folder), head=head), [row])[0] for head in range(3)]
    assert found == pytest.approx([alone(folder, text, head) for head in range(3)], abs=1e-5)
    assert min(found) < 0  # neither a softmax nor a sigmoid


def test_the_head_is_float32_whatever_the_body_is(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    rows = make_rows(60)
    low = values(SequenceClassificationScorer(str(folder), dtype="bfloat16"), rows)
    full = values(SequenceClassificationScorer(str(folder)), rows)
    assert low == pytest.approx(full, abs=0.3)  # bfloat16 keeps 8 bits through two layers
    assert any(torch.tensor(value).bfloat16().double() != value for value in low)


def rename_head(weights: dict[str, torch.Tensor]) -> None:
    weights["value_head.weight"] = weights.pop("score.weight")


def drop_layer(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def add_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["normalizer.mean"] = torch.zeros(1)


def widen_head(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"] = torch.zeros(4, weights["score.weight"].shape[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_head, r"1 missing weights \(score.weight\)"),
        (drop_layer, r"missing weights \(model.layers.1.mlp.up_proj.weight\)"),
        (add_weight, r"1 unexpected weights \(normalizer.mean\)"),
        (widen_head, r"1 mismatched weights \(score.weight\)"),
    ],
)
def test_weights_that_do_not_fit_are_fatal(tmp_path: Path, damage: object, message: str) -> None:
    assert callable(damage)
    folder = save_tiny_classifier(tmp_path)
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        SequenceClassificationScorer(str(folder))


def test_a_policy_is_not_a_scorer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a sequence classifier"):
        SequenceClassificationScorer(str(save_tiny_policy(tmp_path)))


def test_the_resolved_settings_are_reported(tmp_path: Path) -> None:
    scorer = SequenceClassificationScorer(str(save_tiny_classifier(tmp_path, labels=2)), head=1)
    description = dict(scorer.describe())
    json.dumps(description)
    assert {"head": 1, "num_labels": 2, "dtype": "float32", "max_length": 128}.items() <= description.items()
