"""A generative safety classifier in the layout of Llama Guard 3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.reward_models import GUARD, build_published_tokenizer, published_scores, save_published
from helpers.scorers import ROWS, check_faults, identity_of, scorer_groups, settings_faults, values_of

from stage1_dual.scoring.protocol import RowFailure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published(tmp_path_factory.mktemp("guard"), "llama_guard")


def settings(guard: Path, **more: Any) -> dict[str, Any]:
    # The weights are random, and so is what such a model says: nearly always something else.
    return {"kind": "judge", "preset": "llama_guard", "model": str(guard), "min_answer_mass": 0, **more}


def test_the_score_is_the_log_odds_of_safe(score_models: dict[str, str], tmp_path: Path, guard: Path) -> None:
    (group,) = scorer_groups(score_models, {"x": settings(guard)}, tmp_path)
    found = [value for (value,) in values_of(group.start(device="cpu"))]
    tokenizer = build_published_tokenizer(GUARD)
    expected = []
    for row in ROWS:
        conversation = [*map(dict, row.messages), {"role": "assistant", "content": row.completion}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>")
        assert "'Agent' messages" in text
        before = tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        safe, unsafe = (
            tokenizer(f"{text}\n\n{answer}", add_special_tokens=False)["input_ids"][len(before)]
            for answer in ("safe", "unsafe")
        )
        logits = published_scores(guard, "llama_guard", before)
        expected.append(logits[safe] - logits[unsafe])
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) == len(ROWS)


def test_its_settings_can_be_others(score_models: dict[str, str], tmp_path: Path, guard: Path) -> None:
    turned = settings(guard, answers={"safe": 0, "unsafe": 1})
    plain, other = (scorer_groups(score_models, {"x": one}, tmp_path)[0] for one in (settings(guard), turned))
    assert [-v for (v,) in values_of(other.start(device="cpu"))] == pytest.approx(
        [v for (v,) in values_of(plain.start(device="cpu"))]
    )
    assert identity_of(score_models, settings(guard), tmp_path) != identity_of(score_models, turned, tmp_path)


def test_a_row_that_is_no_conversation_or_no_answer_fails(
    score_models: dict[str, str], tmp_path: Path, guard: Path
) -> None:
    (group,) = scorer_groups(score_models, {"x": settings(guard, min_answer_mass=0.5)}, tmp_path)
    system = replace(ROWS[0], messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    refused, other = group.start(device="cpu").score([system, ROWS[1]])
    assert isinstance(refused, RowFailure)
    assert "Conversation roles must alternate" in refused.reason
    assert isinstance(other, RowFailure)
    assert "less than `min_answer_mass`, 0.5: it says something else" in other.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rubric": "{completion}?"}, "a judge has a `rubric` or a `preset`, one of the two"),
        ({"preset": None}, "a judge has a `rubric` or a `preset`, one of the two"),
        ({"preset": "lama_guard"}, "`scorers.x.preset` is 'lama_guard'"),
        ({"as_message": False}, "leave out `as_message: false`"),
        ({"endpoint": {"base_url": "http://h/v1"}}, "which no endpoint shows"),
    ],
)
def test_faults(score_models: dict[str, str], guard: Path, change: dict[str, Any], message: str) -> None:
    faults = settings_faults(score_models, settings(guard, **change))
    assert any(message in fault for fault in faults), faults
    assert check_faults(score_models, settings(guard)) == ()
