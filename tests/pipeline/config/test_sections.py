"""The rules between settings of one section; loading them is test_loading.py's."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.sections import (
    ConstraintSettings,
    ExecutionSettings,
    MultishotSettings,
    PairSettings,
    PromptSettings,
    PublishedSettings,
    SamplingSettings,
    SolveSettings,
    TrainingSettings,
)
from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.section import Section
from pipeline.contracts.statistics import Statistic
from stage1_dual.sampling.protocol import THE_POLICY

SHARE = {"statistic": "share", "at_least": 0.0, "direction": ">="}
PAIRS = {"source": "pairs.jsonl", "response_columns": ["first", "second"]}


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (SamplingSettings, {"temperature": 0.7}, "temperature 0.7, top_p 1, top_k 0 and min_p 0 do not draw from"),
        (SamplingSettings, {"top_k": 50}, "samples_are_not_of_the_reference"),
        (SamplingSettings, {"samples_per_prompt": 0}, "greater than or equal to 1"),
        (ExecutionSettings, {"min_actors": 3, "max_actors": 2}, "max_actors is 2, fewer than min_actors, 3"),
        (ConstraintSettings, {"direction": ">="}, "neither of `threshold` and `margin`"),
        (ConstraintSettings, {"direction": "<=", "threshold": 1.0, "margin": 1.0}, "both of `threshold` and `margin`"),
        (ConstraintSettings, {"direction": ">", "margin": 1.0}, "Input should be '>=', '<=' or '='"),
        (ConstraintSettings, {"direction": ">=", "margin": 1.0, "assurance": 1.0}, "less than 1"),
        (ConstraintSettings, {"direction": ">=", "margin": 1.0, "score_error": -0.1}, "greater than or equal to 0"),
        (ConstraintSettings, {"threshold": 1.0}, "gives no `direction`"),
        (ConstraintSettings, {"between": [120, 80]}, r"`between` is \[120, 80\]; its lower end comes first"),
        (ConstraintSettings, {"between": [1, 2], "margin": 0.5}, "both of `between` and `margin`"),
        (ConstraintSettings, {"between": [1, 2], "equals": 1}, "both of `between` and `equals`"),
        (ConstraintSettings, {"equals": 1, "direction": ">="}, "both of `equals` and `direction`"),
        (ConstraintSettings, {"equals": 1, "reserve": 0.1}, "an equality takes no `reserve`"),
        (ConstraintSettings, {**SHARE, "threshold": 1.5}, "`threshold` is 1.5; a share lies between 0 and 1"),
        (ConstraintSettings, {**SHARE, "threshold": 0.5, "level": 0.1}, "takes `at_least` or `at_most`, and `level`"),
        (
            ConstraintSettings,
            {**SHARE, "threshold": 0.5, "score_error": 0.1},
            "`score_error` is of the mean",
        ),
        (ConstraintSettings, {"statistic": "median", "equals": 1}, "'mean', 'share', 'shortfall' or 'cvar'"),
        (SolveSettings, {"bootstrap_replicates": 99}, "greater than or equal to 100"),
        (PromptSettings, {"test_fraction": 1.0}, "less than 1"),
        (PairSettings, {**PAIRS, "response_columns": ["first", "first"]}, "names 'first' twice"),
        (TrainingSettings, {"objective": "tilted_nll", "pairs": PAIRS}, "tilted_nll"),
        (MultishotSettings, {"rule": "gradient"}, "`gradient` needs one"),
        (MultishotSettings, {"step_size": 1.0}, "`secant` has none"),
        (MultishotSettings, {"iterations": 1}, "greater than or equal to 2"),
        (
            PublishedSettings,
            {
                "paper": "2405.19544",
                "sources": ["Table 99"],
                "reward": "helpful_gain",
                "constraints": {"safe": "safety_gain"},
            },
            "Table 99",
        ),
    ],
)
def test_a_broken_rule_is_said(section: type[Section], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**settings)


def test_the_default_draws_are_those_of_the_reference() -> None:
    assert SamplingSettings().distribution == THE_POLICY
    changed = SamplingSettings(temperature=0.7, samples_are_not_of_the_reference=True)
    assert not changed.distribution.is_the_policy


def test_a_constraint_is_what_its_settings_say() -> None:
    tail = ConstraintSettings(score="toxic", statistic="cvar", level=0.1, direction="<=", threshold=3.0)
    assert tail.constraints("worst") == (
        Constraint("worst", "<=", threshold=3.0, statistic=Statistic("toxic", "cvar", level=0.1, tail="upper")),
    )
    words = ConstraintSettings(between=(80, 120), where={"category": ["a", "b"]}, reserve=1.0)
    statistic = Statistic("words", where=(("category", ("a", "b")),))
    assert words.constraints("words") == (
        Constraint("words.at_least", ">=", threshold=80.0, statistic=statistic),
        Constraint("words.at_most", "<=", threshold=120.0, statistic=statistic),
    )
    assert words.safeguard == Safeguard(reserve=1.0)
    parity = ConstraintSettings(equals=0.5, tolerance=0.02, each="category")
    assert parity.constraints("she") == (Constraint("she", "=", 0.5, each="category", tolerance=0.02),)


def test_a_reserve_may_be_negative_and_pairs_go_with_what_compares() -> None:
    assert ConstraintSettings(direction=">=", margin=0.0, reserve=-0.1).reserve == -0.1
    for objective in ("tilted_pairwise", "dpo"):
        assert TrainingSettings(objective=objective, pairs=PairSettings(**PAIRS)).pairs is not None
