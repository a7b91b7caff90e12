"""What is recorded as done is done again when its recipe or inputs change, and only then."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.written_runs import written_run

from pipeline.baselines.policies import one_shot
from pipeline.baselines.study import Study, change_config, is_recorded, output_to, record_done
from pipeline.config.loading import load_config
from pipeline.contracts.errors import ConfigError


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        config=load_config(Path("baselines")),
        data_dir=tmp_path,
        name="written",
        seeds=(0, 1, 2),
        margins=(0.2, 0.4, 0.6, 0.8, 1.0, 1.2),
        pairs=(),
        dpo_epochs=1.0,
        sizes={},
        show_progress=False,
    )


def test_a_record_is_of_one_recipe_and_what_it_was_made_from(study):
    run = written_run(study.data_dir, study.config)
    other = replace(run, config=change_config(study.config, {"training.epochs": 2}))
    assert not is_recorded(run, "evaluation", {"samples": "a"})
    record_done(run, "evaluation", {"samples": "a"})
    assert is_recorded(run, "evaluation", {"samples": "a"})
    assert not is_recorded(run, "evaluation", {"samples": "b"})
    assert not is_recorded(run, "evaluation", {})
    assert not is_recorded(run, "multishot", {"samples": "a"})
    assert not is_recorded(other, "evaluation", {"samples": "a"})


def test_results_name_their_recipe_seeds_and_margins(study):
    changed = replace(study, config=change_config(study.config, {"training.epochs": 2}))
    assert study.origin.endswith("; seeds 0, 1, 2; margins 0.2, 0.4, 0.6, 0.8, 1, 1.2.")
    assert study.origin == replace(study).origin
    assert study.origin != changed.origin
    assert study.origin != replace(study, seeds=(0,)).origin


def test_what_is_dear_is_done_at_every_second_margin_the_middle_one_included(study):
    """The iterated preference-based method is tried where both are asked for."""
    assert study.some_margins == (0.4, 0.8, 1.2)
    assert study.middle_margin == 0.8
    assert study.middle_margin in study.some_margins
    assert replace(study, margins=(0.4, 0.8)).middle_margin in replace(study, margins=(0.4, 0.8)).some_margins


def test_pairs_are_iterated_at_the_middle_one(study):
    pairs = ((0.2, 0.2), (0.2, 0.6), (0.4, 0.4), (0.6, 0.2))
    assert replace(study, pairs=pairs).middle_pair == (0.4, 0.4)
    assert replace(study, pairs=pairs[:1]).middle_pair == pairs[0]


def test_more_prompts_are_a_run_of_their_own_with_the_recipes_other_settings(study):
    wider = replace(study, wider={"prompts.source": "embedded:wider", "sampling.samples_per_prompt": 24})
    assert wider.origin != study.origin
    runs = []
    for base in (replace(wider, wider={}), wider):
        config = change_config(study.config.model_copy(update={"seed": 1}), base.wider)
        run = replace(written_run(study.data_dir, config, name="written/wider/seed1"), data_dir=study.data_dir)
        record_done(run, "scores", {})
        runs.append(base.wider_base(1))
    few, many = runs
    assert few.name == many.name == "written/wider/seed1"
    assert (few.config.prompts.source, many.config.prompts.source) == ("embedded", "embedded:wider")
    assert few.config == study.config.model_copy(update={"seed": 1})
    assert many.config.sampling.samples_per_prompt == 24
    assert many.config.training == study.config.training


def test_an_arms_run_lies_below_that_of_its_seed(study):
    base = written_run(study.data_dir, study.config, name="written/seed1")
    run = study.arm_run(base, one_shot(0.4))
    assert run.folder == study.folder / "seed1" / "one-shot-0.4"
    assert run.config.constraints["harmless"].margin == 0.4
    assert base.config == study.config


def test_changes_reach_the_setting_they_name_and_leave_the_recipe_as_it_was(study):
    before = study.config.model_dump(mode="json")
    changed = change_config(study.config, {"solve.frontier_points": 5, "multishot.iterations": 2})
    assert (changed.solve.frontier_points, changed.multishot.iterations) == (5, 2)
    assert study.config.model_dump(mode="json") == before
    with pytest.raises(ConfigError, match="frontier_point"):
        change_config(study.config, {"solve.frontier_point": 5})


def test_output_of_several_calls_is_kept(tmp_path, capsys):
    path = tmp_path / "arm" / "output.txt"
    for line in ("first", "second"):
        with output_to(path):
            sys.stdout.write(f"{line}\n")
    assert path.read_text() == "first\nsecond\n"
    assert capsys.readouterr().out == ""
