from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.train_settings import changed

from pipeline.contracts.errors import InputError
from stage2_policy import settings
from stage2_policy.settings import TrainSettings
from stage2_policy.trainer import TrainResult, train_policy

pytestmark = pytest.mark.slow

SETTINGS = TrainSettings(
    optimizer="natural_gradient",
    adapter="lora",
    lora_r=4,
    lora_alpha=4,
    tokens_per_microbatch=400,
    held_out_fraction=0.25,
)


def train(stage_one: Any, output: Path, settings: TrainSettings = SETTINGS, **changes: Any) -> TrainResult:
    return train_policy(**vars(stage_one), output=output, settings=settings, seed=0, show_progress=False, **changes)


def test_one_step_closes_part_of_the_way(taught_stage_one: Any, tmp_path: Path) -> None:
    result = train(taught_stage_one, tmp_path)
    assert (result.steps, result.best_step) == (1, 1)
    assert result.verdict.verdict == "paid"
    curve = json.loads((tmp_path / "training_log.json").read_text())
    assert [entry["step"] for entry in curve] == [0, 1]
    assert curve[1]["eval_closed_fraction"] == pytest.approx(result.held_out.closed_fraction)
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "adapter").is_dir()
    assert not (tmp_path / "checkpoints").exists()


def test_every_score_has_a_factor_where_the_prediction_is_to_be_matched(taught_stage_one: Any, tmp_path: Path) -> None:
    result = train(taught_stage_one, tmp_path, changed(SETTINGS, match_prediction=True))
    assert set(result.factors) == {"helpful", "harm"}
    assert result.reached > 0


def test_too_many_responses_are_refused_before_the_pass(
    stage_one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "MOST_RESPONSES", 10)
    with pytest.raises(InputError, match=r"`optimizer` is natural_gradient, which solves .* at most 10;"):
        train(stage_one, tmp_path)


def test_a_single_prompt_to_train_on_leaves_none_to_choose_the_penalty_by(stage_one: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least 2 to train on; there are 1 beside those of `held_out_fraction`"):
        train(stage_one, tmp_path, changed(SETTINGS, held_out_fraction=0.99))


def test_it_starts_from_the_reference_alone(stage_one: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`initial` is .*; the optimizer natural_gradient takes one step from the"):
        train(stage_one, tmp_path, initial=stage_one.reference)
