"""A judge's numbers are those of the model's whole forward pass, text by text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import build_tokenizer, save_tiny_policy
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from pipeline.contracts.errors import InputError
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.scoring.judge import JudgeReader, JudgeScorer
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.rubrics import AnswerScale, Question, Rubric

pytestmark = pytest.mark.slow

SCALE = AnswerScale((("1", 1.0), ("2", 2.0), ("I", 7.0)), min_mass=0.0)
RUBRIC = Rubric("Is it well said to {prompt} that {completion}?")
ROWS = [
    ScoreRequest(f"p{k % 3}", k, [{"role": "user", "content": f"I feel tired {k % 3}"}], "rest and walk " * (k % 5))
    for k in range(12)
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_policy(tmp_path_factory.mktemp("judge"), eos_logit=0.0))


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that does something to its logits after its head, and attends within a window."""
    folder, tokenizer = tmp_path_factory.mktemp("capped"), build_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=8, final_logit_softcapping=0.5,
        initializer_range=0.5, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _by_hand(checkpoint: str, texts: Sequence[str], *, adds_bos: bool) -> list[float]:
    tokenizer, model = load_tokenizer(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    values = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=adds_bos)["input_ids"]
        ids = ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]
        with torch.inference_mode():
            p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        mass = {
            value: float(p[tokenizer(answer, add_special_tokens=False)["input_ids"][0]])
            for answer, value in SCALE.answers
        }
        values.append(sum(value * p for value, p in mass.items()) / sum(mass.values()))
    return values


@pytest.mark.parametrize("which", ["judge", "capped"])
@pytest.mark.parametrize("as_message", [True, False])
def test_values_are_those_of_the_whole_forward_pass(
    which: str, as_message: bool, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(which)
    question = Question(RUBRIC, SCALE, as_message, prefix="so: " if as_message else "")
    scorer = JudgeScorer(checkpoint, question=question, token_budget=256, device="cpu")
    found = scorer.score(ROWS)
    texts = [f"<user>{RUBRIC.fill(row)}<assistant>so: " if as_message else RUBRIC.fill(row) for row in ROWS]
    expected = _by_hand(checkpoint, texts, adds_bos=not as_message)
    values = [score.values[0] for score in found if isinstance(score, Score)]
    assert values == pytest.approx(expected, abs=2e-5)  # float32 in other batches, on ratings of 1 to 7
    assert max(values) - min(values) > 0.01
    (alone,) = scorer.score(ROWS[3:4])
    assert isinstance(alone, Score)
    assert alone.values[0] == pytest.approx(values[3], abs=2e-5)
    scorer.close()


def test_vllm_gives_the_numbers_of_transformers(judge: str) -> None:
    """Two answers of which one is unlikely: log-odds show what a mean of probabilities would not."""
    scale = AnswerScale((("1", 1.0), ("I", 0.0)), "log_odds", 0.0)
    scorers = [
        JudgeScorer(judge, question=Question(RUBRIC, scale), engine=engine, checked_share=0.5, device="cpu")
        for engine in ("transformers", "vllm")
    ]
    long = ScoreRequest("p", 9, ROWS[0].messages, "rest " * 90)
    first, second = (scorer.score([*ROWS, long]) for scorer in scorers)
    for scorer in scorers:
        scorer.close()
    assert isinstance(first[-1], RowFailure)
    assert isinstance(second[-1], RowFailure)
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert isinstance(one, Score)
        assert isinstance(other, Score)
        assert other.values[0] == pytest.approx(one.values[0], abs=1e-4)
        assert other.scored_sha256 == one.scored_sha256


def test_log_odds_of_a_guard_that_reads_the_conversation(judge: str) -> None:
    scale = AnswerScale((("1", 1.0), ("2", 0.0)), "log_odds", 0.0)
    scorer = JudgeScorer(judge, question=Question(None, scale), affine=Affine(-1, 0.5), device="cpu")
    (score,) = scorer.score([ScoreRequest("p", 0, [{"role": "user", "content": "hello"}], "there")])
    tokenizer, model = load_tokenizer(judge), AutoModelForCausalLM.from_pretrained(judge).eval()
    ids = tokenizer("<bos><user>hello<assistant>there<eos><assistant>", add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0, -1]
    one, two = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in "12")
    assert isinstance(score, Score)
    assert score.values[0] == pytest.approx(0.5 - (logits[one] - logits[two]).item(), abs=1e-5)


def test_what_is_no_rating_or_too_long_fails_alone(judge: str) -> None:
    scale = AnswerScale(SCALE.answers, min_mass=0.9)
    scorer = JudgeScorer(judge, question=Question(RUBRIC, scale), max_length=60, device="cpu")
    found = scorer.score([ROWS[0], ScoreRequest("p", 0, ROWS[0].messages, "rest " * 60)])
    assert all(isinstance(score, RowFailure) for score in found)
    assert "less than `min_answer_mass`, 0.9" in found[0].reason  # type: ignore[union-attr]
    assert "tokens; it reads 60" in found[1].reason  # type: ignore[union-attr]


def test_answers_that_the_next_token_cannot_tell_apart(judge: str) -> None:
    tokenizer = load_tokenizer(judge)
    for answers, message in (
        ((("1z", 1.0), ("1", 2.0), ("3", 0.0)), "both begin with the token"),
        ((("rest", 1.0), ("walk", 2.0)), None),
    ):
        question = Question(RUBRIC, AnswerScale(answers))
        if message is None:
            assert len(JudgeReader(tokenizer, question).answer_tokens) == 2
        else:
            with pytest.raises(InputError, match=message):
                JudgeReader(tokenizer, question)
    # Behind a text that ends in a blank, " word1" is no token of its own.
    joined = Question(Rubric("{completion} wor"), AnswerScale((("d1", 1.0), ("I", 2.0))), as_message=False)
    with pytest.raises(InputError, match="joins with what stands before it"):
        JudgeReader(tokenizer, joined)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="`as_message: false`"):
        JudgeReader(tokenizer, Question(RUBRIC, SCALE))


def test_a_text_has_one_bos_and_its_whole_hash(tmp_path: Path) -> None:
    for bos in ("tokenizer", "template", "both", "neither"):
        tokenizer = load_tokenizer(str(save_tiny_policy(tmp_path / bos, bos=bos)))
        for as_message in (True, False):
            (text,) = JudgeReader(tokenizer, Question(RUBRIC, SCALE, as_message)).read(ROWS[:1], max_length=99)
            assert not isinstance(text, RowFailure)
            assert text.token_ids.count(tokenizer.bos_token_id) == 1, (bos, as_message)
            assert text.token_ids[0] == tokenizer.bos_token_id
