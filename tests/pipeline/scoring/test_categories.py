from __future__ import annotations

from dataclasses import replace

import numpy as np
from helpers.joined_scores import join

from pipeline.contracts.problem import Constraint
from pipeline.contracts.statistics import Statistic
from pipeline.scoring.categories import statistics_by_category

NAMES = {"reward": "helpful", "constraints": [Constraint("harmless", ">=", margin=0.5)]}
ROWS = join({"a": [(1.0, 0.0, False), (3.0, 2.0, False)], "b": [(5.0, -1.0, False)], "c": [(0.0, 4.0, False)]})


def test_prompts_count_equally_whatever_their_number_of_responses() -> None:
    found = statistics_by_category({"reference": (ROWS, None)}, {"a": "x", "b": "x", "c": "y"}, **NAMES)
    assert [(entry["category"], entry["n_prompts"]) for entry in found] == [("x", 2), ("y", 1)]
    assert found[0]["scores"] == [
        {"name": "helpful", "reference": (2.0 + 5.0) / 2},
        {"name": "harmless", "reference": (1.0 - 1.0) / 2},
    ]


def test_weights_are_within_a_prompt() -> None:
    weight_n = np.array([0.25, 0.75, 1.0, 1.0])
    found = statistics_by_category({"tilted": (ROWS, weight_n)}, {"a": "x", "b": "y", "c": "y"}, **NAMES)
    assert found[0]["scores"][0] == {"name": "helpful", "tilted": 0.25 * 1.0 + 0.75 * 3.0}


def test_a_policy_without_the_category_has_no_mean_and_an_empty_category_no_entry() -> None:
    policies = {"reference": (ROWS, None), "policy": (join({"a": [(7.0, 7.0, False)]}), None)}
    categories = {"a": "x", "b": "y", "c": "y", "of another split": "z"}
    found = {entry["category"]: entry["scores"][0] for entry in statistics_by_category(policies, categories, **NAMES)}
    assert found == {
        "x": {"name": "helpful", "reference": 2.0, "policy": 7.0},
        "y": {"name": "helpful", "reference": 2.5, "policy": None},
    }


def test_one_category_is_none() -> None:
    assert statistics_by_category({"reference": (ROWS, None)}, dict.fromkeys("abc", "all"), **NAMES) == []


def test_a_share_is_a_share_in_each_category_and_one_of_a_category_is_none_elsewhere() -> None:
    share = Statistic("harmless", "share", at_least=1.0)
    constraints = [
        Constraint("safe", ">=", threshold=0.5, statistic=share),
        Constraint("safe_y", ">=", threshold=0.5, statistic=share.within("category", "y")),
    ]
    rows = replace(ROWS, prompt_columns={"category": np.array(["x", "x", "y"])})
    found = statistics_by_category(
        {"reference": (rows, None)}, {"a": "x", "b": "x", "c": "y"}, reward="helpful", constraints=constraints
    )
    assert [[score["reference"] for score in entry["scores"][1:]] for entry in found] == [[0.25, None], [1.0, 1.0]]
