"""Constraints by category of the prompts, and what is refused before anything is sampled."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Safeguard
from pipeline.contracts.tables import PROMPTS
from pipeline.scoring.demanded import demands_on


def config(**constraints: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "beta": 1.0,
            "reference": {"model": "policy"},
            "scorers": {name: {"model": name} for name in ("helpful", "harmless")},
            "reward": "helpful",
            "constraints": constraints,
        }
    )


def prompts(train: dict[str, int], test: dict[str, int]) -> pa.Table:
    rows = [
        {"prompt_id": f"{split}{category}{k}", "prompt": [], "split": split, "source": "s", "category": category}
        for split, counts in (("train", train), ("test", test))
        for category, count in counts.items()
        for k in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def test_each_category_has_the_safeguard_of_its_family() -> None:
    tone = {"score": "harmless", "direction": ">=", "margin": 0.5, "each": "category", "reserve": 0.1}
    found = demands_on(config(tone=tone), prompts({"a": 31, "b": 29}, {"a": 3, "b": 1}))

    assert [one.name for one in found.constraints] == ["tone[category=a]", "tone[category=b]"]
    assert found.safeguards == (Safeguard(reserve=0.1),) * 2
    (warning,) = found.warnings
    assert warning.startswith("constraint `tone[category=b]` is of 29 train prompts (category 'b')")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (
            {"where": {"category": ["c"]}},
            "no prompt has the category 'c'",
        ),
        ({"where": {"category": ["b"]}}, "cannot be judged: no test prompt has the category 'b'"),
        ({"each": "category"}, r"`x\[category=b\]` cannot be judged"),
    ],
)
def test_categories_that_are_not_there_are_named(settings: dict[str, Any], rule: str) -> None:
    bound = {"score": "harmless", "direction": ">=", "margin": 0.5, **settings}
    with pytest.raises(InputError, match=rule):
        demands_on(config(x=bound), prompts({"a": 40, "b": 40}, {"a": 3}))


def test_demands_on_all_prompts_need_no_prompts() -> None:
    assert demands_on(config(harmless={"direction": ">=", "margin": 0.5}), None).warnings == ()
