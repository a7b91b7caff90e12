"""What every kind of scorer has from its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.scorers import every_kind, identity_of, settings_faults

from pipeline.scorers.kinds import KINDS
from stage1_dual.scoring.outputs import Affine


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        ("classifier", {"batch_tokens": 7}, True),
        ("classifier", {"head": 2}, False),
        ("classifier", {"sign": -1}, False),
        ("classifier", {"offset": 0.5}, False),
        ("classifier", {"dtype": "bfloat16"}, False),
        ("classifier", {"max_length": 9}, False),
        ("classifier", {"output": "probability"}, False),
        ("beaver", {"batch_tokens": 7}, True),
        ("beaver", {"head": 1}, False),
        ("ratio", {"batch_tokens": 7}, True),
        ("ratio", {"scale": 0.2}, False),
        ("rule", {"settings": {"times": 3}}, False),
        ("mark", {"sign": -1}, False),
    ],
)
def test_settings_that_change_values_change_the_identity(
    score_models: dict[str, str], tmp_path: Path, name: str, change: dict[str, Any], same: bool
) -> None:
    settings = every_kind(score_models, tmp_path)[name]
    before = identity_of(score_models, settings, tmp_path)
    assert (before == identity_of(score_models, {**settings, **change}, tmp_path)) is same


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_no_part_of_the_identity_is_a_setting(kind: Any) -> None:
    """A name that is none would let a renamed setting slip into the manifests."""
    assert kind.not_identity <= kind.model_fields.keys()
    assert kind.folder_setting is None or kind.folder_setting in kind.model_fields


def test_sign_and_offset_are_read_of_every_scorer(score_models: dict[str, str]) -> None:
    settings = KINDS["column"].model_validate({"kind": "column", "column": "mark", "sign": -1, "offset": 2.0})
    assert settings.affine == Affine(sign=-1, offset=2.0)
    assert settings.affine.apply(3.0) == -1.0
    (fault,) = settings_faults(score_models, {"model": "m", "sign": 2})
    assert "`scorers.x.sign` is 2" in fault
