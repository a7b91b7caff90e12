"""The recipe changes of every method are settings of the shipped recipe, and ask for what their name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.baselines import policies
from pipeline.baselines.study import INACTIVE, Arm, Study, change_config
from pipeline.config.loading import load_config

MARGINS = (0.2, 0.4)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(
        config=load_config(Path("baselines")),
        data_dir=tmp_path_factory.mktemp("data"),
        name="written",
        seeds=(0,),
        margins=MARGINS,
        pairs=((0.2, 0.6),),
        dpo_epochs=3.0,
        sizes={},
        show_progress=False,
    )


def _arms(study: Study) -> list[Arm]:
    return [
        *(policies.one_shot(margin) for margin in MARGINS),
        *(policies.paper_dpo(study, margin) for margin in MARGINS),
        policies.two_constraints(0.2, 0.6),
        policies.two_constraints(0.6, 0.2),
        policies.reward_only(),
        policies.constraint_only(),
        *(policies.preference_tuned(study, side) for side in policies.IMPLICIT),
    ]


def test_every_arm_is_a_valid_recipe_in_a_folder_of_its_own(study):
    arms = _arms(study)
    configs = [change_config(study.config, arm.changes) for arm in arms]
    assert len({arm.name for arm in arms}) == len(arms)
    assert all(a != b for place, a in enumerate(configs) for b in configs[:place])


def test_an_arm_changes_demands_and_training_alone(study):
    """Otherwise arms could not share the samples and scores of their seed."""
    for arm in _arms(study):
        changed = change_config(study.config, arm.changes)
        for section in ("prompts", "reference", "sampling", "scorers", "evaluation", "seed", "beta"):
            assert getattr(changed, section) == getattr(study.config, section), (arm.name, section)


@pytest.mark.parametrize("margin", MARGINS)
def test_the_papers_way_to_train_has_the_dual_of_one_shot(study, margin):
    ours, theirs = (
        change_config(study.config, arm.changes)
        for arm in (policies.one_shot(margin), policies.paper_dpo(study, margin))
    )
    assert ours.constraints == theirs.constraints
    assert (ours.constraints["harmless"].margin, ours.reward, ours.solve) == (margin, theirs.reward, theirs.solve)
    assert (ours.training.objective, theirs.training.objective) == ("tilted_pairwise", "dpo")
    assert (theirs.training.responses_per_group, theirs.training.epochs) == (2, study.dpo_epochs)


def test_reference_points_are_bound_by_nothing(study):
    """No policy is a hundred score units below the reference, so that lambda is 0."""
    for arm, reward in ((policies.reward_only(), "helpful"), (policies.constraint_only(), "harmless")):
        config = change_config(study.config, arm.changes)
        assert config.reward == reward
        assert [one.margin for one in config.constraints.values()] == [INACTIVE] == [-100.0]
        assert reward not in config.constraints


def test_two_margins_are_demanded_of_the_scores_they_are_given_for(study):
    config = change_config(study.config, policies.two_constraints(0.2, 0.6).changes)
    assert {name: one.margin for name, one in config.constraints.items()} == {"harmless": 0.2, "humour": 0.6}
    assert {name: one.assurance for name, one in config.constraints.items()} == {"harmless": 0.2, "humour": None}
    assert config.training.match_prediction


@pytest.mark.parametrize("side", policies.IMPLICIT)
def test_policies_tuned_on_preferences_see_the_annotators_alone(study, side):
    config = change_config(study.config, policies.preference_tuned(study, side).changes)
    assert config.reward == f"gold_{side}"
    assert all(name.startswith("gold_") and one.margin == INACTIVE for name, one in config.constraints.items())
