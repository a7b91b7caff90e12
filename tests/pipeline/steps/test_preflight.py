"""What training needs is looked for before anything is sampled, and what is refused leaves nothing behind."""

import importlib.util

import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

from pipeline.contracts.artifacts import is_complete
from stage2_policy.settings import TRACKERS

pytestmark = pytest.mark.slow

LORA = {"adapter": "lora", "lora_target_modules": ["q_proj", "v_porj"]}
NATURAL = {"optimizer": "natural_gradient", "adapter": "lora"}


@pytest.fixture
def missing_tracker():
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    return next(name for name in TRACKERS if name not in available)


@pytest.mark.parametrize("command", ["stage1", "sample", "run", "stage2"])
@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"objective": "dpoo"}, "`training.objective` is 'dpoo': there is no such objective; did you mean `dpo`?"),
        ({"report_to": ["nope"]}, "`training.report_to.0` is 'nope': there is no such tracker"),
        ({"initial": "no-such-folder"}, "`training.initial` is 'no-such-folder'; it must be the folder of a"),
        (LORA, "`lora_target_modules` is ['q_proj', 'v_porj']: the model has no layer v_porj"),
        ({**LORA, "lora_target_modules": "q_porj"}, "`lora_target_modules` is 'q_porj'"),
        ({"optimizer": "natural_gradient"}, "the optimizer `natural_gradient` changes a low-rank adapter"),
        ({**NATURAL, "initial": "elsewhere"}, "natural_gradient takes one step from the reference"),
    ],
)
def test_a_fault_of_training_is_found_before_sampling(tmp_path, capsys, command, training, message):
    recipe = write_recipe(tmp_path, training=training)
    assert dualign(command, recipe) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_tracker_that_is_not_installed_is_found_before_sampling(tmp_path, capsys, missing_tracker):
    recipe = write_recipe(tmp_path, training={"report_to": [missing_tracker]})
    for command in (["stage1"], ["run", "--dry-run"]):
        assert dualign(command[0], recipe, *command[1:]) == 2
        assert f"`report_to` names `{missing_tracker}`, which is not installed here" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_layers_of_the_embedded_reference_are_known_before_it_is_built(tmp_path, capsys):
    recipe = write_recipe(tmp_path, training=LORA, reference={"model": "embedded:reference"})
    assert dualign("stage1", recipe) == 2
    assert "the model has no layer v_porj" in capsys.readouterr().err


def test_a_machine_that_cannot_train_samples_for_one_that_can(tmp_path, monkeypatch, missing_tracker):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    training = {"report_to": [missing_tracker], "initial": "on-another-machine"}
    recipe = write_recipe(tmp_path, training=training)
    assert dualign("prepare", recipe) == 0
    assert dualign("sample", recipe) == 0


def test_more_responses_than_the_natural_gradient_takes_are_refused_before_they_are_sampled(tmp_path, capsys):
    recipe = write_recipe(tmp_path, training=NATURAL, sampling={"samples_per_prompt": 5000})
    assert dualign("prepare", recipe) == 0
    assert dualign("sample", recipe) == 2
    assert "at most 16384; there are" in capsys.readouterr().err
    assert not (run_folder(recipe) / "samples").exists()


def test_what_is_refused_costs_nothing_that_was_done(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert dualign("prepare", recipe) == 0
    assert dualign("sample", recipe) == 0
    assert dualign("sample", recipe, "--redo", "--training.initial", "no-such-folder") == 2
    assert "`training.initial` is 'no-such-folder'" in capsys.readouterr().err
    assert is_complete(run_folder(recipe) / "samples")


def test_four_bits_need_their_package_before_anything_runs(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    recipe = write_recipe(tmp_path, training={"adapter": "qlora"})
    assert dualign("run", recipe) == 2
    assert "pip install 'dualign[qlora]'" in capsys.readouterr().err
