from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from helpers.reward_models import save_published
from helpers.scorers import check_faults, scorer_config, scorer_groups, settings_faults, values_of

from pipeline.contracts.errors import MissingExtraError
from pipeline.run.run import Run
from pipeline.steps.preflight import check_packages


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
        ({"engine": "tgi"}, "`scorers.x.engine` is 'tgi'"),
        ({"engine": "vllm", "checked_share": 0}, "`scorers.x.checked_share` is 0"),
        ({"engine_limit": 0.01}, "engine_limit belong to `engine: vllm`, and the engine is transformers"),
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


def test_an_engine_that_does_not_read_a_checkpoint(score_models: dict[str, str], tmp_path: Path) -> None:
    assert check_faults(score_models, {"model": score_models["heads"], "engine": "vllm"}) == ()
    model = str(save_published(tmp_path, "armorm"))
    assert check_faults(score_models, {"model": model}) == ()
    (fault,) = check_faults(score_models, {"model": model, "engine": "vllm"})
    assert fault.startswith(f"`scorers.x`: `engine: vllm` does not read the scorer {model}: its architecture is Llama")


def test_scores_of_before_there_were_engines_are_known(score_models: dict[str, str], tmp_path: Path) -> None:
    plain = {"model": score_models["heads"], "head": 1}
    (group,) = scorer_groups(score_models, {"x": plain}, tmp_path)
    assert set(group.settings[0]) == {
        "sign", "offset", "kind", "dtype", "template", "max_length", "over_length", "head", "output",
    }  # fmt: skip
    fast = {**plain, "engine": "vllm"}
    scorers = {"x": plain, "y": fast, "z": {**fast, "head": 0, "checked_share": 0.5, "engine_limit": 1e-5}}
    plain_group, fast_group = scorer_groups(score_models, scorers, tmp_path)
    assert (plain_group.names, fast_group.names) == (("x",), ("y", "z"))
    assert fast_group.settings[0] == {**plain_group.settings[0], "engine": "vllm"}
    config = scorer_config(score_models, scorers)
    assert [config.scorers[name].copies for name in ("x", "y")] == [1, 2]  # what checks is held beside it
    # What is checked for two heads at once is checked as the stricter one asks.
    started = {name: fast_group.start.keywords[name] for name in ("engine", "checked_share", "engine_limit")}
    assert started == {"engine": "vllm", "checked_share": 0.5, "engine_limit": 1e-5}


def test_vllm_is_asked_for_before_a_step_begins(
    score_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scorer_config(score_models, {"x": {"model": score_models["heads"], "engine": "vllm"}})
    run = Run(config=config, name="r", data_dir=tmp_path)
    check_packages(run, ["score"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(MissingExtraError, match=r"^`scorers\.x` needs the package `vllm`"):
        check_packages(run, ["score"])
