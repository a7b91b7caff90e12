"""Several demands at once, as the recipe of the experiments understands them."""

from __future__ import annotations

from pathlib import Path

from pipeline.baselines.command import build_study
from pipeline.baselines.many_constraints import many_demands
from pipeline.baselines.study import change_config
from pipeline.run.run import Run


def test_three_and_five_demands_are_those_of_the_recipe(tmp_path: Path) -> None:
    study = build_study(data_dir=tmp_path, n_seeds=1, quick=False, show_progress=False)
    base = Run(config=study.config, name="base", data_dir=tmp_path)
    demands = many_demands(study, base)
    configs = {name: change_config(study.config, changes) for name, changes in demands.items()}
    assert {name: len(config.constraints) for name, config in configs.items()} == {"three": 3, "five": 5}
    for config in configs.values():
        assert config.training.epochs > study.config.training.epochs
        for name, one in config.constraints.items():
            assert (one.score or name) in config.scorers
            assert one.assurance
