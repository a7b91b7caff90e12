"""Reward models in the layouts in which they are published."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.reward_models import (
    ATTRIBUTES,
    CLASSIFIERS,
    LLAMA_3,
    OBJECTIVES,
    PUBLISHED,
    build_published_tokenizer,
    published_scores,
    save_published,
)
from helpers.score_models import read_weights, write_weights

from pipeline.contracts.errors import InputError
from stage1_dual.checkpoints import check_scorer_checkpoint, find_heads, weight_shapes
from stage1_dual.scoring.outputs import Affine, HeadOutput
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.reward_heads import RESPONSE_HEADER, find_last, read_header
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer

pytestmark = pytest.mark.slow

WORDS = ("take", "a", "small", "step", "call", "your", "friend", "and", "rest")


def make_rows(prompts: int = 3, responses: int = 4) -> list[ScoreRequest]:
    rng = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    asked = [[{"role": "user", "content": text(9)}] for _ in range(prompts)]
    return [ScoreRequest(f"p{p}", k, asked[p], text(9)) for p in range(prompts) for k in range(responses)]


def token_ids(name: str, row: ScoreRequest) -> list[int]:
    tokenizer = build_published_tokenizer(PUBLISHED[name].template)
    conversation = [*map(dict, row.messages), {"role": "assistant", "content": row.completion}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def scores_of(scorer: SequenceClassificationScorer, rows: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
    found = scorer.score(rows)
    assert all(isinstance(score, Score) for score in found), found
    return [score.values for score in found if isinstance(score, Score)]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_head_of_a_published_layout(tmp_path: Path, name: str) -> None:
    folder = save_published(tmp_path, name)
    heads = check_scorer_checkpoint(str(folder), head=0, template=None)
    assert heads is not None
    rows = make_rows()
    scorer = SequenceClassificationScorer(str(folder), outputs=[HeadOutput(head) for head in heads.labels])
    found = scores_of(scorer, rows)
    expected = [published_scores(folder, name, token_ids(name, row)) for row in rows]
    assert torch.tensor(found).numpy() == pytest.approx(torch.tensor(expected).numpy(), abs=1e-4)
    assert len({values[0] for values in found}) == len(rows)


@pytest.mark.parametrize(("name", "head"), [("qwen_reward", 0), ("armorm", "objective_2"), ("armorm", "score")])
def test_the_head_of_a_reward_model_stays_exact_in_bfloat16(tmp_path: Path, name: str, head: int | str) -> None:
    folder = save_published(tmp_path, name)
    scorer = SequenceClassificationScorer(
        str(folder), outputs=[HeadOutput(head)], dtype="bfloat16", share_prefixes=False
    )
    place = 1 + 2 if head == "objective_2" else 0
    for row in make_rows(3, 1):
        ((found,),) = scores_of(scorer, [row])
        expected = published_scores(folder, name, token_ids(name, row), dtype=torch.bfloat16)[place]
        # The decoder does the same to one text here and there, but for the gate's, which reads the prompt alone.
        assert found == pytest.approx(expected, abs=0.2 if head == "score" else 1e-4)


def test_heads_have_names(tmp_path: Path) -> None:
    attributes = save_published(tmp_path / "attributes", "attributes")
    armorm = save_published(tmp_path / "armorm", "armorm")
    (row,) = make_rows(1, 1)
    outputs = [HeadOutput("honesty"), HeadOutput("verbosity", affine=Affine(-1))]
    expected = published_scores(attributes, "attributes", token_ids("attributes", row))
    (found,) = scores_of(SequenceClassificationScorer(str(attributes), outputs=outputs), [row])
    assert found == pytest.approx((expected[ATTRIBUTES.index("honesty")], -expected[2]), abs=1e-4)
    expected = published_scores(armorm, "armorm", token_ids("armorm", row))
    outputs = [HeadOutput("objective_4"), HeadOutput("score")]
    (found,) = scores_of(SequenceClassificationScorer(str(armorm), outputs=outputs), [row])
    assert found == pytest.approx((expected[1 + 4], expected[0]), abs=1e-4)
    with pytest.raises(InputError, match=rf"no head {OBJECTIVES + 1}: num_labels is {OBJECTIVES + 1}"):
        check_scorer_checkpoint(str(armorm), head=OBJECTIVES + 1, template=None)
    with pytest.raises(InputError, match="is a regression: it has no probabilities"):
        SequenceClassificationScorer(str(armorm), outputs=[HeadOutput(1, "probability")])


def test_a_gate_reads_the_prompt_once(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "armorm")
    rows = make_rows(prompts=2, responses=20)
    shared, whole = (SequenceClassificationScorer(str(folder), share_prefixes=share) for share in (True, False))
    assert [v for (v,) in scores_of(shared, rows)] == pytest.approx([v for (v,) in scores_of(whole, rows)], abs=1e-4)
    # The texts themselves, and the beginnings of two prompts up to where the response is announced.
    header = read_header(build_published_tokenizer(LLAMA_3), checkpoint="c")
    texts = {row.prompt_id: token_ids("armorm", row) for row in rows}
    beginnings = sum((find_last(ids, header) or 0) + 1 for ids in texts.values())
    assert whole.padding.read == beginnings + sum(len(token_ids("armorm", row)) for row in rows)


def test_a_text_without_a_prompt_for_the_gate_fails_where_the_score_is_wanted(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "armorm")
    (row,) = make_rows(1, 1)
    plain = "{prompt} {completion}"
    (failure,) = SequenceClassificationScorer(str(folder), template=plain).score([row])
    assert isinstance(failure, RowFailure)
    assert failure.reason.startswith(f"what is read of the text of prompt p0 has no {RESPONSE_HEADER!r}")
    assert failure.reason.endswith("the template must write it")
    objective = SequenceClassificationScorer(str(folder), template=plain, outputs=[HeadOutput("objective_0")])
    assert isinstance(objective.score([row])[0], Score)
    long = ScoreRequest("q", 0, row.messages, "rest " * 60)
    (failure,) = SequenceClassificationScorer(str(folder), max_length=20).score([long])
    assert isinstance(failure, RowFailure)
    assert failure.reason.endswith("the response is too long")


def test_a_gate_without_its_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "armorm", vocab_size=len(build_published_tokenizer(LLAMA_3)))
    tokenizer = build_published_tokenizer("{{ messages }}")
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"has no token <\|eot_id\|>, <\|start_header_id\|>, <\|end_header_id\|>"):
        SequenceClassificationScorer(str(folder))


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("left_over_head", "score.weight", "has 1 missing weights (score.weight)"),
        ("qwen_reward", "score.2.bias", "has 1 missing weights (score.2.bias)"),
        ("armorm", "gating.layers.1.weight", "has 1 missing weights (gating.layers.1.weight)"),
    ],
)
def test_no_weight_of_a_head_is_drawn(tmp_path: Path, name: str, weight: str, message: str) -> None:
    folder = save_published(tmp_path, name)
    write_weights(folder, {key: tensor for key, tensor in read_weights(folder).items() if key != weight})
    with pytest.raises(InputError) as caught:
        SequenceClassificationScorer(str(folder))
    assert message in str(caught.value)


def test_what_is_left_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_published(tmp_path, "left_over_head")
    with caplog.at_level(logging.INFO, logger="dualign"):
        SequenceClassificationScorer(str(folder))
    assert caplog.messages == [f"the scorer {folder} holds lm_head.weight, which is no part of the model"]


def test_a_weight_that_is_not_of_the_layout_is_refused(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "armorm")
    write_weights(folder, {**read_weights(folder), "regression_layer.bias": torch.zeros(OBJECTIVES)})
    with pytest.raises(InputError, match="has 1 unexpected weights"):
        SequenceClassificationScorer(str(folder))
    # QRM: quantiles of each objective under the name of ArmoRM's class.
    write_weights(folder, {**read_weights(folder), "regression_layer.weight": torch.zeros(3 * OBJECTIVES, 64)})
    with pytest.raises(InputError, match=r"mismatched weights \(regression_layer\.weight\)|unexpected"):
        SequenceClassificationScorer(str(folder))


def test_a_process_reward_model_has_no_value_for_a_response(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "qwen_reward", architectures=["Qwen2ForProcessRewardModel"])
    with pytest.raises(InputError, match="a value for each step"):
        check_scorer_checkpoint(str(folder), head=0, template=None)


def test_labels_are_counted_where_the_configuration_has_none(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "causal_config")
    config = json.loads((folder / "config.json").read_text())
    assert dict(find_heads(config, weight_shapes(folder), checkpoint="c").labels) == {0: "LABEL_0"}
    config["architectures"] = ["LlamaForSequenceClassification"]
    assert len(find_heads(config, {}, checkpoint="c").labels) == 2  # the default of transformers
    assert len(find_heads({**config, "num_labels": 3}, {}, checkpoint="c").labels) == 3


def test_a_file_that_is_not_of_safetensors_is_named(tmp_path: Path) -> None:
    folder = save_published(tmp_path, "armorm")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors"):
        check_scorer_checkpoint(str(folder), head=0, template=None)
