from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from pipeline.config.sections import TrainingSettings
from pipeline.contracts.errors import InputError
from stage2_policy.objectives import OBJECTIVES
from stage2_policy.settings import TRACKERS, TrainSettings, require_comparison, require_trackers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "dpoo"}, r"there is no such objective; did you mean `dpo`\?"),
        ({"objective": {"dpo": 0.5, "tilted_nll": 0.5}}, r"objective\n  Input should be a valid string"),
        ({"learning_rat": 1e-4}, r"learning_rat\n  Extra inputs are not permitted"),
        ({"learning_rate": 0.0}, r"learning_rate\n  Input should be greater than 0"),
        ({"epochs": float("nan")}, r"epochs\n  Input should be a finite number"),
        ({"tokens_per_step": 0}, r"tokens_per_step\n  Input should be greater than or equal to 1"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio\n  Input should be less than 1"),
        ({"weight_decay": -0.1}, r"weight_decay\n  Input should be greater than or equal to 0"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm\n  Input should be greater than or equal to 0"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction\n  Input should be less than 1"),
        ({"dtype": "float16"}, r"dtype\n  Input should be 'float32' or 'bfloat16'"),
        ({"adapter": "ia3"}, r"adapter\n  Input should be 'none', 'lora' or 'qlora'"),
        ({"lora_r": 0}, r"lora_r\n  Input should be greater than or equal to 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout\n  Input should be less than 1"),
        (
            {"optimizer": "natural_gradient"},
            r"adapter\n.*`natural_gradient` changes a low-rank adapter; it must be lora",
        ),
        ({"optimizer": "natural_gradient", "objective": "dpo", "adapter": "lora"}, "`tilted_pairwise`, not of `dpo`"),
        ({"negligible_mass": 1.0}, r"negligible_mass\n  Input should be less than 1"),
        ({"negligible_mass": 0.01}, "`tilted_pairwise` reads responses of little weight as much as others"),
        ({"responses_per_group": 1}, "`tilted_pairwise` compares responses of a prompt and needs at least 2"),
        ({"report_to": ["nope"]}, r"report_to.0\n.*there is no such tracker; known: azure_ml"),
        ({"report_to": ["wandbb"]}, r"report_to.0\n.*there is no such tracker; did you mean `wandb`\?"),
    ],
)
def test_bad_settings_are_refused_when_they_are_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSettings(**change)


def test_all_faults_are_named_at_once() -> None:
    bad = {"responses_per_group": 1, "negligible_mass": 0.1, "lora_r": 0, "report_to": ["nope"]}
    with pytest.raises(ValidationError) as caught:
        TrainSettings(**bad)
    assert {fault["loc"][0] for fault in caught.value.errors()} == bad.keys()


def test_rules_of_an_objective_are_its_own() -> None:
    settings = TrainSettings(objective="tilted_nll", negligible_mass=0.05, responses_per_group=1)
    assert settings.negligible_mass == 0.05


def test_a_recipe_has_the_settings_of_stage_2_and_two_more() -> None:
    assert TrainingSettings.model_fields.keys() - TrainSettings.model_fields.keys() == {"pairs", "initial"}
    assert TrainingSettings.model_fields.keys() > TrainSettings.model_fields.keys()


def test_only_objectives_that_compare_go_with_pairs_of_a_data_set() -> None:
    for name, objective in OBJECTIVES.items():
        if objective.any_source:
            require_comparison(name)
        else:
            with pytest.raises(InputError, match=f"the objective is `{name}`, .* pairs of a data set it must be one"):
                require_comparison(name)
    assert not OBJECTIVES["tilted_nll"].any_source


def test_trackers_are_those_of_transformers() -> None:
    # `flyte` is among its callbacks and not among those that it looks for.
    assert set(TRACKERS) == INTEGRATION_TO_CALLBACK.keys() - {"flyte"}


def test_a_tracker_that_is_not_installed_is_named_with_those_that_are() -> None:
    available = get_available_reporting_integrations()
    require_trackers(available)
    missing = next(name for name in TRACKERS if name not in available)
    with pytest.raises(InputError, match=f"`report_to` names `{missing}`, which is not installed here; there is"):
        require_trackers([missing])


@pytest.mark.parametrize("blocked", ["torch", "transformers", "datasets", "accelerate", "peft"])
def test_settings_are_read_where_a_package_of_training_is_not_installed(blocked: str) -> None:
    code = (
        f"import sys; sys.modules['{blocked}'] = None\n"
        "from stage2_policy.objectives import OBJECTIVES\n"
        "from stage2_policy.settings import TrainSettings\n"
        "assert OBJECTIVES[TrainSettings().objective].uses_groups\n"
        "try:\n    TrainSettings(objective='dpoo')\n"
        "except ValueError as error:\n    assert 'did you mean `dpo`' in str(error)\n"
        "else:\n    raise AssertionError\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'peft'}\n"
        "assert not {name for name in heavy if sys.modules.get(name)}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
