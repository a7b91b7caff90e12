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
from pipeline.contracts.section import Section
from stage1_dual.sampling.protocol import THE_POLICY

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
        (ConstraintSettings, {"direction": ">", "margin": 1.0}, "Input should be '>=' or '<='"),
        (ConstraintSettings, {"direction": ">=", "margin": 1.0, "assurance": 1.0}, "less than 1"),
        (ConstraintSettings, {"direction": ">=", "margin": 1.0, "score_error": -0.1}, "greater than or equal to 0"),
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


def test_a_reserve_may_be_negative_and_pairs_go_with_what_compares() -> None:
    assert ConstraintSettings(direction=">=", margin=0.0, reserve=-0.1).reserve == -0.1
    for objective in ("tilted_pairwise", "dpo"):
        assert TrainingSettings(objective=objective, pairs=PairSettings(**PAIRS)).pairs is not None
