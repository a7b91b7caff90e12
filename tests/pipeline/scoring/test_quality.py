from __future__ import annotations

from typing import Any

import pytest
from helpers.joined_scores import join

from pipeline.scoring.quality import describe_faults, describe_truncation

NAMES = ["helpful", "harmless"]
THE_POLICY = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def test_means_with_and_without_what_was_cut_off() -> None:
    rows = join({"a": [(0.0, 1.0, False), (4.0, 3.0, True)], "b": [(6.0, 5.0, False), (6.0, 5.0, False)]})
    assert describe_truncation(rows, "keep", names=NAMES) == {
        "rule": "keep",
        "share": 0.25,
        "means": [
            {"name": "helpful", "all": (2.0 + 6.0) / 2, "finished": (0.0 + 6.0) / 2},
            {"name": "harmless", "all": (2.0 + 5.0) / 2, "finished": (1.0 + 5.0) / 2},
        ],
    }


def test_nothing_finished_has_no_mean() -> None:
    described = describe_truncation(join({"a": [(1.0, 2.0, True)]}), "flag", names=NAMES)
    assert described["share"] == 1.0
    assert [mean["finished"] for mean in described["means"]] == [None, None]


def _faults(**changes: Any) -> list[str]:
    counts = dict.fromkeys(("n_unscored", "n_prompts_lost", "n_unsampled", "n_prompts_left_out"), 0)
    return describe_faults(
        **{"sampling": THE_POLICY, "truncation": {"rule": "keep", "share": 0.5}, **counts, **changes}
    )


def test_draws_of_the_reference_have_no_faults() -> None:
    assert _faults() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {**THE_POLICY, "temperature": 0.7, "top_k": 5}}, "(temperature 0.7, top_k 5)"),
        ({"truncation": {"rule": "drop", "share": 0.125}}, "12.5% of the responses were cut off"),
        ({"truncation": {"rule": "flag", "share": 0.125}}, "scored as if they were whole"),
        ({"n_unsampled": 3}, "3 responses could not be drawn"),
        ({"n_unscored": 2}, "2 samples could not be scored"),
        ({"n_prompts_lost": 1}, "1 prompts have no response left"),
        ({"n_prompts_left_out": 9}, "9 prompts of the source are beyond"),
    ],
)
def test_each_fault_is_a_sentence_of_its_own(changes: dict[str, Any], message: str) -> None:
    (fault,) = _faults(**changes)
    assert message in fault
