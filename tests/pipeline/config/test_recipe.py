from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.recipe import RunConfig
from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.scorers.sequence_classification import SequenceClassificationSettings


def _config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "beta": 1.0,
        "reference": {"model": "policy"},
        "scorers": {"harmless": {"model": "h"}, "unused": {"model": "u"}, "helpful": {"model": "p"}},
        "reward": "helpful",
        "constraints": {
            "harmless": {"direction": ">=", "margin": 0.5, "reserve": 0.1, "assurance": 0.9},
            "toxic": {"direction": "<=", "threshold": 0.2, "score_error": 0.3},
        },
    }
    return RunConfig.model_validate({**tree, **changes})


def test_what_is_demanded_is_apart_from_what_is_asked_on_top() -> None:
    config = _config()
    assert config.stated_constraints() == (
        (Constraint("harmless", ">=", margin=0.5), Safeguard(reserve=0.1, assurance=0.9)),
        (Constraint("toxic", "<=", threshold=0.2), Safeguard(score_error=0.3)),
    )


def test_noise_is_a_number_or_what_was_measured() -> None:
    bounds = {
        "harmless": {"direction": ">=", "margin": 0.5, "score_noise": "measured"},
        "toxic": {"direction": "<=", "threshold": 0.2, "score_noise": 0.4},
    }
    config = _config(constraints=bounds)
    asked = [safeguard for _, safeguard in config.stated_constraints()]
    assert asked == [Safeguard(measures_noise=True), Safeguard(score_noise=0.4)]
    # What nobody asked for is not recorded: a run that was begun before there was the setting is the same run.
    recorded = _config().constraints["harmless"].model_dump(mode="json")
    assert recorded.keys() == {"direction", "threshold", "margin", "reserve", "assurance", "score_error"}
    assert config.constraints["toxic"].model_dump(mode="json")["score_noise"] == 0.4
    rule = _config(scorers={"helpful": {"kind": "python", "function": "a:b"}}).scorers["helpful"]
    assert rule.identity_settings().keys() == {"sign", "offset", "kind", "function", "settings"}


def test_all_scorers_are_used_the_reward_first() -> None:
    assert list(_config().used_scorers()) == ["helpful", "harmless", "unused"]


def test_every_model_is_known_by_the_setting_that_names_it() -> None:
    ratio = {"kind": "log_ratio", "model": "tuned"}
    found = _config(scorers={"helpful": {"model": "p"}, "safe": ratio}).checkpoints()
    assert {setting: model.model for setting, model in found.items()} == {
        "reference": "policy",
        "scorers.helpful": "p",
        "scorers.safe": "tuned",
    }
    other = {**ratio, "reference": {"model": "before"}}
    assert _config(scorers={"safe": other}).checkpoints()["scorers.safe.reference"].model == "before"


def test_an_execution_may_be_its_kind_alone() -> None:
    assert _config(execution="ray").execution.kind == "ray"
    assert isinstance(_config().scorers["helpful"], SequenceClassificationSettings)


def test_a_saved_configuration_is_the_same_again(tmp_path: Path) -> None:
    config = _config()
    assert RunConfig.model_validate(config.model_dump(mode="json", exclude_unset=True)) == config
