from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.scorers import check_faults, scorer_groups, settings_faults, values_of


def test_a_head_by_index_or_label_in_its_units(score_models: dict[str, str], tmp_path: Path) -> None:
    scorers = {
        "index": {"model": score_models["heads"], "head": 1},
        "label": {"model": score_models["heads"], "head": "LABEL_1", "sign": -1, "offset": 1.0},
        "share": {"model": score_models["heads"], "head": 1, "output": "probability"},
    }
    (group,) = scorer_groups(score_models, scorers, tmp_path)
    assert (group.reads, group.uses_device) == ((), True)
    for index, label, share in values_of(group.start(device="cpu")):
        assert label == pytest.approx(1.0 - index)
        assert 0 < share < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hed": 1}, "unknown setting `scorers.x.hed`; did you mean `head`?"),
        ({"output": "softmax"}, "`scorers.x.output` is 'softmax'"),
    ],
)
def test_faults_of_its_settings(score_models: dict[str, str], change: dict[str, Any], message: str) -> None:
    faults = settings_faults(score_models, {"model": "m", **change})
    assert any(message in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [("heads", 3, "has no head 3"), ("heads", "calm", "no head with the label 'calm'"), ("policy", 0, "is not a seq")],
)
def test_faults_of_its_checkpoint(score_models: dict[str, str], model: str, head: int | str, message: str) -> None:
    (fault,) = check_faults(score_models, {"model": score_models[model], "head": head})
    assert fault.startswith("`scorers.x`: the scorer ")
    assert message in fault
