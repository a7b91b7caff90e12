from __future__ import annotations

from typing import Any

import pytest

from pipeline.report.views import (
    as_given,
    category_table,
    decimals,
    interval,
    number,
    stage1_view,
    stage2_view,
    verdict_sentence,
)


@pytest.mark.parametrize(
    ("values", "digits"),
    [
        ((0.0, 1.0), 3),
        ((-0.4, 0.4, [0.35, 0.45]), 3),
        ((5.0, 5.0), 3),
        ((0.0, 42.0), 2),
        ((0.0, 12345.0), 0),
        ((0.0101, 0.0119), 5),
        ((0.5, None, None), 3),
        ((None,), 3),
    ],
)
def test_decimals_follow_the_spread(values: tuple[Any, ...], digits: int) -> None:
    assert decimals(*values) == digits


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.4, 3, "0.400"), (-0.0001, 3, "0.000"), (-1.25, 2, "-1.25"), (12345.6, 0, "12,346"), (None, 3, "-")],
)
def test_number(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_interval() -> None:
    assert interval([-0.12, 0.3], 2) == "[-0.12, 0.30]"
    assert interval(None, 2) == ""


@pytest.mark.parametrize(
    ("margin", "text"), [(0.8, "ref + 0.80"), (-0.1, "ref - 0.10"), (0.0, "ref + 0.00"), (None, "")]
)
def test_as_given(margin: float | None, text: str) -> None:
    assert as_given(margin, 2) == text


def _bound(name: str, status: str, direction: str, realised: float, ci95: list[float]) -> dict[str, Any]:
    return {
        "name": name,
        "status": status,
        "direction": direction,
        "threshold": 0.5,
        "reference": 0.0,
        "realised": realised,
        "ci95": ci95,
    }


@pytest.mark.parametrize(
    ("status", "bounds", "sentence"),
    [
        (
            "satisfied",
            [_bound("a", "satisfied", ">=", 0.8, [0.6, 1.0])],
            "SATISFIED: for the constraint the whole 95% interval is on the right side of the threshold.",
        ),
        (
            "undecided",
            [_bound("a", "satisfied", ">=", 0.8, [0.6, 1.0]), _bound("b", "undecided", "<=", 0.5, [0.4, 0.6])],
            "UNDECIDED: b cannot be told from its threshold: 0.500 lies inside [0.400, 0.600].",
        ),
        (
            "violated",
            [_bound("a", "violated", "<=", 0.8, [0.7, 0.9])],
            "VIOLATED: a misses its threshold 0.500 by 0.300: all of [0.700, 0.900] is on the wrong side.",
        ),
    ],
)
def test_verdict_says_what_and_why(status: str, bounds: list[dict[str, Any]], sentence: str) -> None:
    assert verdict_sentence({"status": status, "constraints": bounds}) == sentence


def test_the_worst_constraint_comes_with_the_verdict() -> None:
    bounds = [_bound("a", "undecided", ">=", 0.5, [0.4, 0.6]), _bound("b", "violated", ">=", 0.2, [0.1, 0.3])]
    first, *rest = verdict_sentence({"status": "violated", "constraints": bounds}).splitlines()
    assert first.startswith("VIOLATED: b misses")
    assert [line.split()[0] for line in rest] == ["a"]


def test_multiplier_zero_is_an_inactive_constraint(one_bound: Any) -> None:
    bound = {**one_bound.dual["constraints"][0], "multiplier": 0.0}
    view = stage1_view({**one_bound.dual, "constraints": [bound]})
    assert view.rows[1].cells[0].detail == "inactive"
    assert stage1_view(one_bound.dual).rows[1].cells[0].detail == "binding"


def test_held_out_values_may_be_absent(one_bound: Any) -> None:
    bound = {**one_bound.dual["constraints"][0], "heldout": None, "heldout_slack": None}
    reward = {**one_bound.dual["reward"], "heldout": None}
    view = stage1_view({**one_bound.dual, "constraints": [bound], "reward": reward})
    assert [row.cells[-1].value for row in view.rows] == ["-", "-"]
    assert "held-out" not in dict(view.facts)["reward"]


def test_an_undefined_closed_fraction_is_said(one_bound: Any) -> None:
    lagrangian = {**one_bound.evaluation["lagrangian"], "closed_fraction": None, "closed_fraction_ci95": None}
    view = stage2_view({**one_bound.evaluation, "lagrangian": lagrangian}, one_bound.dual)
    assert dict(view.facts)["closed fraction"].startswith("undefined")


def test_means_by_category_say_which_policy_and_none_are_shown_without_categories():
    entry = {"category": "", "n_prompts": 3, "scores": [{"name": "helpful", "reference": 0.25, "realised": 0.5}]}
    table = category_table({"by_category": [entry, {**entry, "category": "work"}]}, names=["helpful"])
    assert table.heads == ("helpful, reference -> realised",)
    assert [(row.category, row.n_prompts, row.cells) for row in table.rows] == [
        ("(none)", 3, ("0.250 -> 0.500",)),
        ("work", 3, ("0.250 -> 0.500",)),
    ]
    assert category_table({"by_category": []}, names=["helpful"]) is None
    assert category_table({}, names=["helpful"]) is None
