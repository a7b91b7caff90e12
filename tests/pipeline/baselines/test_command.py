"""The study of the shipped recipe, whole and quick."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.baselines.command import build_study, run_experiments
from pipeline.baselines.experiments import EXPERIMENTS, PERFORMED_UNASKED
from pipeline.baselines.study import change_config
from pipeline.contracts.errors import InputError
from pipeline.microworld.size import WorldSize


def _weights(size: WorldSize) -> int:
    """Weights of the policy's layers, by hand: attention, feed-forward of three matrices."""
    width = size.policy_width
    return size.policy_layers * (4 * width**2 + 3 * width * size.policy_ffn_width)


@pytest.fixture(params=[False, True], ids=["whole", "quick"])
def study(request, tmp_path):
    return build_study(data_dir=tmp_path, n_seeds=3, quick=request.param, show_progress=False)


def test_a_study_is_one_recipe_with_seeds_and_ascending_margins(study):
    assert study.seeds == (0, 1, 2)
    assert list(study.margins) == sorted(set(study.margins))
    assert study.middle_margin in study.some_margins
    assert study.pairs
    assert not study.folder.exists()


def test_policies_of_other_sizes_can_be_told_apart_by_their_weights(study):
    assert set(study.sizes) == {"smaller"}
    assert _weights(study.sizes["smaller"]) * 2 < _weights(WorldSize())
    for size in study.sizes.values():
        assert size.policy_width % size.policy_heads == 0
        # Prompts and scorers are those of the default world.
        assert (size.n_train_prompts, size.n_test_prompts) == (WorldSize().n_train_prompts, WorldSize().n_test_prompts)


def test_quick_numbers_are_kept_apart_and_cost_less(tmp_path):
    whole, quick = (
        build_study(data_dir=tmp_path, n_seeds=1, quick=quick, show_progress=False) for quick in (False, True)
    )
    assert whole.folder != quick.folder
    assert whole.origin != quick.origin
    for section, name in (
        ("sampling", "samples_per_prompt"),
        ("training", "epochs"),
        ("evaluation", "samples_per_prompt"),
        ("multishot", "iterations"),
    ):
        assert getattr(getattr(quick.config, section), name) < getattr(getattr(whole.config, section), name)
    assert whole.config.scorers == quick.config.scorers


def test_more_prompts_have_fewer_responses(study):
    wider = change_config(study.config, study.wider)
    assert wider.prompts.source == "embedded:wider"
    assert wider.sampling.samples_per_prompt <= study.config.sampling.samples_per_prompt
    assert wider.training.epochs <= study.config.training.epochs
    for section in ("reference", "scorers", "solve", "constraints"):
        assert getattr(wider, section) == getattr(study.config, section)


def test_what_takes_hours_is_performed_by_name_alone(study, monkeypatch):
    performed = []

    def pretend(name):
        def perform(_):
            performed.append(name)
            raise InputError("enough")

        return perform

    for name in EXPERIMENTS:
        monkeypatch.setitem(EXPERIMENTS, name, replace(EXPERIMENTS[name], perform=pretend(name)))
    with pytest.raises(InputError, match="enough"):
        run_experiments(study, [], jobs=1)
    with pytest.raises(InputError, match="enough"):
        run_experiments(study, ["real_model"], jobs=1)
    assert performed == [PERFORMED_UNASKED[0], "real_model"]
    assert [name for name in EXPERIMENTS if name not in PERFORMED_UNASKED] == ["real_model"]


def test_an_unknown_experiment_is_refused_before_anything_is_written(tmp_path):
    study = build_study(data_dir=tmp_path / "data", n_seeds=1, quick=True, show_progress=False)
    with pytest.raises(InputError, match=r"--only frontier: there is no such experiment; there are .*geometry"):
        run_experiments(study, ["cost", "frontier"])
    assert not (tmp_path / "data").exists()
