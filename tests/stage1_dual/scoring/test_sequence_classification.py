from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import build_tokenizer, save_tiny_classifier, save_tiny_policy
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline.contracts.errors import InputError
from pipeline.contracts.section import Dtype
from stage1_dual.scoring.outputs import Affine, HeadOutput
from stage1_dual.scoring.protocol import RowFailure, Score, Scorer, ScoreRequest
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer

pytestmark = pytest.mark.slow

WORDS = ("take", "a", "small", "step", "call", "your", "friend", "and", "rest", "what", "could", "I", "do", "alone")


def make_rows(n: int, *, seed: int = 0) -> list[ScoreRequest]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    return [ScoreRequest(f"p{k}", 0, [{"role": "user", "content": text(8)}], text(14)) for k in range(n)]


def scores_of(scorer: Scorer, rows: Sequence[ScoreRequest]) -> list[Score]:
    found = scorer.score(rows)
    assert all(isinstance(score, Score) for score in found)
    return [score for score in found if isinstance(score, Score)]


def values(scorer: Scorer, rows: Sequence[ScoreRequest]) -> list[float]:
    """The first value of each row."""
    return [score.values[0] for score in scores_of(scorer, rows)]


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
    scorer = SequenceClassificationScorer(str(folder), outputs=[HeadOutput(1)])
    together = values(scorer, rows)
    assert together[:8] == pytest.approx(expected, abs=1e-5)
    assert [values(scorer, [row])[0] for row in rows] == pytest.approx(together, abs=1e-5)
    assert values(scorer, rows[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    small = SequenceClassificationScorer(str(folder), outputs=[HeadOutput(1)], token_budget=100)
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
    assert scores_of(scorer, [row])[0].scored_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_no_rows_no_scores(tmp_path: Path) -> None:
    assert SequenceClassificationScorer(str(save_tiny_classifier(tmp_path))).score([]) == []


def test_a_long_text_is_scored_from_its_end_and_flagged(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long = ScoreRequest("a", 0, [{"role": "user", "content": "rest " * 40}], "call your friend")
    short = ScoreRequest("b", 0, [{"role": "user", "content": "why?"}], "rest")
    scorer = SequenceClassificationScorer(str(folder), max_length=60)
    scores = scores_of(scorer, [long, short])
    assert [score.truncated for score in scores] == [True, False]
    ids = tokenizer("<user>" + "rest " * 40 + "<assistant>call your friend<eos>")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        end = float(model(torch.tensor([[ids[0], *ids[-59:]]])).logits[0, 0])
    assert scores[0].values[0] == pytest.approx(end, abs=1e-5)


def test_a_text_as_long_as_allowed_is_whole(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    (row,) = make_rows(1)
    text = f"<user>{row.messages[0]['content']}<assistant>{row.completion}<eos>"
    n_tokens = len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    for max_length, truncated in ((n_tokens, False), (n_tokens - 1, True)):
        scorer = SequenceClassificationScorer(str(folder), max_length=max_length)
        assert scores_of(scorer, [row])[0].truncated is truncated


@pytest.mark.parametrize("max_length", [0, 1, 129])
def test_a_length_the_model_cannot_read_is_refused(tmp_path: Path, max_length: int) -> None:
    folder = save_tiny_classifier(tmp_path)
    with pytest.raises(InputError, match=rf"`max_length` is {max_length}.*2 to 128 tokens"):
        SequenceClassificationScorer(str(folder), max_length=max_length)


def test_positions_behind_the_padding_id_are_no_length(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    pad = tokenizer.pad_token_id
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=60, pad_token_id=pad, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    row = ScoreRequest("a", 0, [{"role": "user", "content": "rest " * 80}], "call your friend")
    scorer = SequenceClassificationScorer(str(tmp_path))
    assert scores_of(scorer, [row])[0].truncated
    assert scorer.describe()["max_length"] == 60 - pad - 1
    with pytest.raises(InputError, match=rf"`max_length` is 60.*2 to {59 - pad} tokens"):
        SequenceClassificationScorer(str(tmp_path), max_length=60)


def test_the_logit_is_raw_and_of_the_wanted_head(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path, labels=3)
    (row,) = make_rows(1)
    text = f"<user>{row.messages[0]['content']}<assistant>{row.completion}<eos>"
    found = [
        values(SequenceClassificationScorer(str(folder), outputs=[HeadOutput(head)]), [row])[0] for head in range(3)
    ]
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
    scorer = SequenceClassificationScorer(str(save_tiny_classifier(tmp_path, labels=2)), outputs=[HeadOutput(1)])
    description = dict(scorer.describe())
    json.dumps(description)
    assert {"labels": ["LABEL_0", "LABEL_1"], "dtype": "float32", "max_length": 128}.items() <= description.items()
    assert description["outputs"] == [
        {"head": 1, "output": "logit", "affine": {"sign": 1, "offset": 0.0}, "head_index": 1}
    ]


LABELS = {0: "helpful", 1: "harmless", 2: "humour"}


def relabel(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_heads_of_one_pass_by_label_and_index_each_in_its_units(tmp_path: Path, problem_type: str | None) -> None:
    folder = save_tiny_classifier(tmp_path, labels=3)
    relabel(folder, id2label=LABELS, label2id={label: k for k, label in LABELS.items()}, problem_type=problem_type)
    rows = make_rows(6)
    raw = torch.tensor(
        [
            [alone(folder, f"<user>{r.messages[0]['content']}<assistant>{r.completion}<eos>", k) for k in LABELS]
            for r in rows
        ]
    )
    probability = raw.softmax(-1) if problem_type is None else raw.sigmoid()
    outputs = [
        HeadOutput("harmless"),
        HeadOutput(0),
        HeadOutput("humour", "probability"),
        HeadOutput("humour", affine=Affine(-1, 0.5)),
    ]
    found = [score.values for score in scores_of(SequenceClassificationScorer(str(folder), outputs=outputs), rows)]
    expected = torch.stack([raw[:, 1], raw[:, 0], probability[:, 2], 0.5 - raw[:, 2]], dim=1)
    assert torch.tensor(found).numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_probability_of_a_single_head_is_its_sigmoid(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    rows = make_rows(5)
    logits = values(SequenceClassificationScorer(str(folder)), rows)
    found = values(SequenceClassificationScorer(str(folder), outputs=[HeadOutput(0, "probability")]), rows)
    assert found == pytest.approx(torch.tensor(logits).sigmoid().tolist(), abs=1e-6)


def test_a_regression_has_no_probability(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    relabel(folder, problem_type="regression")
    with pytest.raises(InputError, match="is a regression: it has no probabilities"):
        SequenceClassificationScorer(str(folder), outputs=[HeadOutput(0, "probability")])


def test_an_unknown_label_names_those_there_are(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path, labels=3)
    relabel(folder, id2label=LABELS, label2id={label: k for k, label in LABELS.items()})
    with pytest.raises(
        InputError, match=r"no head with the label 'harmles'; its labels are helpful, harmless, humour"
    ):
        SequenceClassificationScorer(str(folder), outputs=[HeadOutput("harmles")])


def test_a_long_text_fails_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path)
    long = ScoreRequest("a", 0, [{"role": "user", "content": "rest " * 40}], "call your friend")
    short = ScoreRequest("b", 0, [{"role": "user", "content": "why?"}], "rest")
    failure, score = SequenceClassificationScorer(str(folder), max_length=60, over_length="fail").score([long, short])
    assert isinstance(failure, RowFailure)
    assert re.fullmatch(r"the text has \d+ tokens; the scorer reads 60", failure.reason)
    assert isinstance(score, Score)


def test_a_poisoned_row_fails_alone(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ messages[0]['content'] }} {{ messages[1]['content'] }}"
    )
    folder = save_tiny_classifier(tmp_path / "model")
    scorer = SequenceClassificationScorer(str(folder), template=str(template))
    good = make_rows(3)
    system = ScoreRequest("s", 0, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "z")
    broken = ScoreRequest("u", 0, [{"role": "user", "content": "half a pair \ud83d"}], "z")
    found = scorer.score([good[0], system, good[1], broken, good[2]])
    failures = [result.reason for result in found if isinstance(result, RowFailure)]
    assert failures == [
        "the scorer's chat template refuses prompt s: no system message",
        failures[1],
    ]
    assert "prompt u, sample 0 is not Unicode" in failures[1]
    assert [score for score in found if isinstance(score, Score)] == scorer.score(good)


def test_responses_to_a_prompt_share_it_and_score_the_same(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path, labels=2, pad_is_eos=True)
    prompts = [row.messages for row in make_rows(4, seed=3)]
    rows = [
        ScoreRequest(f"p{k % 4}", k, prompts[k % 4], row.completion) for k, row in enumerate(make_rows(40, seed=4))
    ]
    rows.append(ScoreRequest("p0", 40, prompts[0], ""))  # nothing but what all share, and the EOS that pads
    shared = SequenceClassificationScorer(str(folder))
    whole = SequenceClassificationScorer(str(folder), share_prefixes=False)
    assert values(shared, rows) == pytest.approx(values(whole, rows), abs=1e-5)
    assert shared.padding.needed < 0.9 * whole.padding.needed


def save_encoder(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, pad_token_id=0, num_labels=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_windowed(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=1, sliding_window=6, pad_token_id=0, num_labels=2, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("save", [save_encoder, save_gpt2, save_windowed])
def test_other_architectures(tmp_path: Path, save: Callable[[Path], Path], dtype: Dtype) -> None:
    folder = save(tmp_path)
    prompts = [row.messages for row in make_rows(3, seed=3)]
    rows = [
        ScoreRequest(f"p{k % 3}", k, prompts[k % 3], row.completion) for k, row in enumerate(make_rows(21, seed=4))
    ]
    found = values(SequenceClassificationScorer(str(folder), outputs=[HeadOutput(1)], dtype=dtype), rows)
    expected = [alone(folder, f"<user>{r.messages[0]['content']}<assistant>{r.completion}<eos>", 1) for r in rows]
    assert found == pytest.approx(expected, abs=1e-5 if dtype == "float32" else 0.1)
    assert len(set(expected)) > 15  # a window of six sees only the end of a text
