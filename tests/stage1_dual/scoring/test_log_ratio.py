from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_models import save_tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.log_ratio import LogRatioScorer, read_pairs
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("policies")
    return str(save_tiny_policy(folder / "tuned", seed=1)), str(save_tiny_policy(folder / "reference", seed=2))


def make_rows(*, prompts: int, samples: int) -> list[ScoreRequest]:
    rng = random.Random(0)
    rows = []
    for p in range(prompts):
        prompt = [1, *rng.choices(range(5, 300), k=rng.randint(2, 40))]
        rows += [
            ScoreRequest(
                f"p{p}", k, [{"role": "user", "content": "x"}], "y", prompt, rng.choices(range(300), k=1 + 5 * k)
            )
            for k in range(samples)
        ]
    return rows


def logp(folder: str, row: ScoreRequest) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = [*row.prompt_token_ids, *row.completion_token_ids]
    with torch.inference_mode():
        steps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start = len(row.prompt_token_ids)
    return sum(float(steps[k - 1, ids[k]]) for k in range(start, len(ids)))


def test_the_log_ratio_of_the_tokens_that_were_drawn(policies: tuple[str, str]) -> None:
    tuned, reference = policies
    rows = make_rows(prompts=3, samples=5)
    expected = [0.5 - 0.1 * (logp(tuned, row) - logp(reference, row)) for row in rows]
    for token_budget in (60, 4096):
        scorer = LogRatioScorer(
            tuned, reference=reference, scale=0.1, affine=Affine(-1, 0.5), token_budget=token_budget
        )
        found = scorer.score([*rows, rows[3]])
        values = [score.values for score in found if isinstance(score, Score)]
        assert values == [pytest.approx((value,), abs=1e-4) for value in [*expected, expected[3]]]
        assert scorer.score(rows[::-1])[::-1] == [
            Score(pytest.approx(score.values, abs=1e-4), score.scored_sha256, truncated=False)
            for score in found[:-1]
            if isinstance(score, Score)
        ]
    assert len({score.scored_sha256 for score in found if isinstance(score, Score)}) == len(rows)


def test_a_policy_against_itself_scores_nothing(policies: tuple[str, str]) -> None:
    scorer = LogRatioScorer(policies[0], reference=policies[0], scale=3.0)
    assert [s.values for s in scorer.score(make_rows(prompts=2, samples=2)) if isinstance(s, Score)] == [(0.0,)] * 4


def test_rows_that_cannot_be_scored_fail_alone(policies: tuple[str, str]) -> None:
    good = make_rows(prompts=1, samples=1)[0]
    messages = [{"role": "user", "content": "x"}]
    scorer = LogRatioScorer(policies[0], reference=policies[1], max_length=60)
    found = scorer.score(
        [
            ScoreRequest("p", 0, messages, "y"),
            ScoreRequest("p", 1, messages, "y", [1] * 40, [7] * 21),
            ScoreRequest("p", 2, messages, "y", [1, 2], [3, 320]),
            good,
        ]
    )
    assert [result.reason for result in found if isinstance(result, RowFailure)] == [
        "the sample has no token ids; a log-ratio is computed on those that were drawn",
        "prompt and response have 61 tokens; the scorer reads 60",
        "a token id is not below the 320 entries of the models' vocabulary",
    ]
    assert isinstance(found[3], Score)


def test_tokenizers_must_be_the_same(policies: tuple[str, str], tmp_path: Path) -> None:
    other = save_tiny_policy(tmp_path, vocab_size=330)
    with pytest.raises(
        InputError, match=r"tokenizers of .* differ in \d+ tokens \(first: .*same token ids under both"
    ):
        LogRatioScorer(policies[0], reference=str(other))


def write_pairs(path: Path, pairs: list[tuple[str, str, str]]) -> str:
    columns = [list(column) for column in zip(*pairs, strict=True)]
    table = pa.table({"prompt": columns[0], "chosen": columns[1], "rejected": columns[2]})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_the_calibration_on_pairs_of_known_order(policies: tuple[str, str], tmp_path: Path, suffix: str) -> None:
    tuned, reference = policies
    tokenizer = AutoTokenizer.from_pretrained(reference)
    rng = random.Random(1)
    words = ("rest", "call", "walk", "friend", "week")
    texts = [
        (rng.choice(words), " ".join(rng.choices(words, k=3)), " ".join(rng.choices(words, k=4))) for _ in range(8)
    ]

    def ratio(prompt: str, response: str) -> float:
        ids = tokenizer(f"<user>{prompt}<assistant>")["input_ids"]
        row = ScoreRequest("p", 0, [], "", ids, [*tokenizer(response, add_special_tokens=False)["input_ids"], 2])
        return logp(tuned, row) - logp(reference, row)

    ordered = [(prompt, a, b) if ratio(prompt, a) > ratio(prompt, b) else (prompt, b, a) for prompt, a, b in texts]
    ordered[0] = (ordered[0][0], ordered[0][2], ordered[0][1])
    path = write_pairs(tmp_path / f"pairs.{suffix}", ordered)
    description = dict(LogRatioScorer(tuned, reference=reference, scale=0.1, calibration=path).describe())
    json.dumps(description)
    calibration = description["calibration"]
    assert isinstance(calibration, dict)
    assert calibration["accuracy"] == 7 / 8
    assert calibration["n_pairs"] == 8
    with pytest.raises(InputError, match=r"gets 0\.875 of the 8 pairs of .* right; `min_accuracy` is 0\.9"):
        LogRatioScorer(tuned, reference=reference, calibration=path, min_accuracy=0.9)


def test_pairs_of_messages_and_malformed_ones(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = tmp_path / "pairs.jsonl"
    answer = [{"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"prompt": prompt, "chosen": answer, "rejected": answer}))
    assert read_pairs(path) == [(prompt, "a", "a")]
    path.write_text(json.dumps({"prompt": "p", "chosen": answer * 2, "rejected": answer}))
    with pytest.raises(InputError, match="row 0, chosen: the response is"):
        read_pairs(path)
    path.write_text(json.dumps({"prompt": "p", "chosen": "a"}))
    with pytest.raises(InputError, match="has no column 'rejected'"):
        read_pairs(path)
