from __future__ import annotations

import json
from pathlib import Path

from helpers.scorers import (
    RULES,
    check_faults,
    identity_of,
    scorer_groups,
    scorer_tree,
    settings_faults,
    values_of,
    write_rules,
)

from pipeline.config.loading import load_config
from pipeline.contracts.tables import TOKEN_IDS
from pipeline.run.run import Run
from pipeline.scoring.groups import check_scorers, group_scorers

WORDS = {"kind": "python", "function": f"{RULES}:words"}


def test_a_function_gets_its_settings_and_the_token_ids(score_models: dict[str, str], tmp_path: Path) -> None:
    folder = str(write_rules(tmp_path).parent)
    (group,) = scorer_groups(score_models, {"x": {**WORDS, "settings": {"times": 2}, "folder": folder}}, tmp_path)
    assert values_of(group.start()) == [(0.0,), (2.0,), (4.0,)]
    assert (group.reads, group.uses_device) == (TOKEN_IDS, False)


def test_a_recipes_functions_are_looked_for_beside_it(score_models: dict[str, str], tmp_path: Path) -> None:
    write_rules(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(scorer_tree(score_models, {"x": WORDS})))
    config = load_config(path)
    check_scorers(config, [])
    (group,) = group_scorers(Run(config=config, name="r", data_dir=tmp_path), ["x"])
    assert values_of(group.start()) == [(0.0,), (1.0,), (2.0,)]


def test_another_source_makes_other_scores(score_models: dict[str, str], tmp_path: Path) -> None:
    settings = {**WORDS, "folder": str(write_rules(tmp_path).parent)}
    before = identity_of(score_models, settings, tmp_path)
    assert before == identity_of(score_models, settings, tmp_path)
    write_rules(tmp_path, "def words(rows, times=1): return [0.0] * len(rows)")
    assert before != identity_of(score_models, settings, tmp_path)


def test_faults(score_models: dict[str, str]) -> None:
    missing, unknown = settings_faults(score_models, {"kind": "python", "functon": "a:b"})
    assert missing == "`scorers.x.function` is missing; it has no default"
    assert unknown == "unknown setting `scorers.x.functon`; did you mean `function`?"
    (fault,) = check_faults(score_models, {"kind": "python", "function": "rules_that_are_not:f"})
    assert fault.startswith("`scorers.x`: `function` is 'rules_that_are_not:f'; there is no module")
