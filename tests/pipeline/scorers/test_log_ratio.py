from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.scorers import check_faults, scorer_config, scorer_groups, settings_faults, values_of
from helpers.tiny_models import save_tiny_policy

from pipeline.contracts.tables import TOKEN_IDS


def test_its_reference_is_the_runs_unless_it_names_one(score_models: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kind": "log_ratio", "model": score_models["tuned"]}
    own = {**settings, "reference": {"model": score_models["policy"]}}
    config = scorer_config(score_models, {"x": settings, "own": own})
    assert {inner: setting for inner, (setting, _) in config.models_of("x").items()} == {
        "": "scorers.x",
        "reference": "reference",
    }
    assert set(config.checkpoints()) == {
        "reference", "scorers.base", "scorers.x", "scorers.own", "scorers.own.reference"
    }  # fmt: skip
    first, second = scorer_groups(score_models, {"x": settings, "own": own}, tmp_path)
    assert (first.identity, first.reads, first.uses_device) == (second.identity, TOKEN_IDS, True)
    assert values_of(first.start(device="cpu")) == values_of(second.start(device="cpu"))
    (nothing,) = scorer_groups(score_models, {"x": {**settings, "model": score_models["policy"]}}, tmp_path)
    assert nothing.identity != first.identity
    assert values_of(nothing.start(device="cpu")) == [(0.0,)] * 3


def test_tokenizers_are_compared_before_the_work(score_models: dict[str, str], tmp_path: Path) -> None:
    tuned = str(save_tiny_policy(tmp_path, vocab_size=330))
    (fault,) = check_faults(score_models, {"kind": "log_ratio", "model": tuned})
    assert fault.startswith("`scorers.x`: the tokenizers of ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_accuracy": 0.6}, "gives `min_accuracy` without `calibration`"),
        ({"scale": 0.0}, "`scorers.x.scale` is 0.0"),
        ({"reference": {"modl": "m"}}, "unknown setting `scorers.x.reference.modl`; did you mean `model`?"),
    ],
)
def test_faults_of_its_settings(score_models: dict[str, str], change: dict[str, Any], message: str) -> None:
    faults = settings_faults(score_models, {"kind": "log_ratio", "model": "m", **change})
    assert any(message in fault for fault in faults), faults


def test_faults_of_its_files(score_models: dict[str, str], tmp_path: Path) -> None:
    settings = {"kind": "log_ratio", "model": score_models["tuned"]}
    (fault,) = check_faults(score_models, {**settings, "calibration": str(tmp_path / "pairs.jsonl")})
    assert "`calibration` is " in fault
    (fault,) = check_faults(score_models, {**settings, "template": "{completion} only"})
    assert "`template` is '{completion} only'" in fault
