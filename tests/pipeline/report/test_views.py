from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.contracts.problem import Constraint, Direction
from pipeline.contracts.training_verdict import TrainingVerdict
from pipeline.report.views import (
    Badge,
    as_given,
    category_table,
    decimals,
    demand_in_words,
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
    [
        (0.4, 3, "0.400"),
        (-0.0001, 3, "0.000"),
        (-1.25, 2, "-1.25"),
        (12345.6, 0, "12,346"),
        (-3.74e98, 0, "-3.74e+98"),
        (float("inf"), 3, "inf"),
        (None, 3, "-"),
    ],
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
        "margin": None,
        "reference": 0.0,
        "predicted": 0.5,
        "realised": realised,
        "ci95": ci95,
    }


@pytest.mark.parametrize(
    ("status", "bounds", "sentence"),
    [
        (
            "satisfied",
            [_bound("a", "satisfied", ">=", 0.8, [0.6, 1.0])],
            "For the constraint the whole 95% interval is on the right side of what was demanded.",
        ),
        (
            "undecided",
            [_bound("a", "satisfied", ">=", 0.8, [0.6, 1.0]), _bound("b", "undecided", "<=", 0.5, [0.4, 0.6])],
            "b cannot be told from its demand: 0.500 lies inside [0.400, 0.600].",
        ),
        (
            "violated",
            [_bound("a", "violated", "<=", 0.8, [0.7, 0.9])],
            "a misses its demand of 0.500 by 0.300: all of [0.700, 0.900] is on the wrong side.",
        ),
    ],
)
def test_verdict_says_what_and_why(status: str, bounds: list[dict[str, Any]], sentence: str) -> None:
    assert verdict_sentence({"status": status, "constraints": bounds}) == sentence


def test_the_worst_constraint_comes_with_the_verdict() -> None:
    bounds = [_bound("a", "undecided", ">=", 0.5, [0.4, 0.6]), _bound("b", "violated", ">=", 0.2, [0.1, 0.3])]
    first, *rest = verdict_sentence({"status": "violated", "constraints": bounds}).splitlines()
    assert first.startswith("b misses")
    assert [line.split()[0] for line in rest] == ["a"]


def test_a_margin_is_judged_over_the_reference_on_the_same_prompts() -> None:
    bound = _bound("a", "violated", ">=", 0.9, [0.8, 1.0]) | {"margin": 0.8, "reference": 0.4, "threshold": 1.2}
    assert verdict_sentence({"status": "violated", "constraints": [bound]}) == (
        "a misses its demand of +0.800 by 0.300: all of [0.400, 0.600] is on the wrong side."
    )


@pytest.mark.parametrize(
    ("direction", "margin", "words"),
    [
        (">=", None, "at least 1.30"),
        ("<=", None, "at most 1.30"),
        (">=", 0.8, "at least 0.80 above the reference"),
        (">=", -0.1, "at most 0.10 below the reference"),
        ("<=", -0.3, "at least 0.30 below the reference"),
        ("<=", 0.1, "at most 0.10 above the reference"),
        (">=", 0.0, "not below the reference"),
        ("<=", 0.0, "not above the reference"),
    ],
)
def test_a_demand_in_words(direction: Direction, margin: float | None, words: str) -> None:
    assert demand_in_words(direction, 1.3, margin, 2) == words


def test_what_is_shown_of_a_margin_is_one_quantity_and_its_points_lie_in_their_intervals(one_bound: Any) -> None:
    bound = one_bound.dual["constraints"][0]
    corrected = bound["predicted_corrected"]
    assert corrected is not None
    # What was wrong: a corrected interval beside a point that is not.
    moved = abs(corrected - bound["predicted"])
    assert moved > 0.005
    for view, row in ((stage1_view(one_bound.dual), 4), (stage2_view(one_bound.evaluation, one_bound.dual), 5)):
        for cells in (row_.cells for row_ in view.rows):
            low, high = map(float, cells[row].detail.strip("[]").split(", "))
            assert low <= float(cells[row].value) <= high
    cell = stage1_view(one_bound.dual).rows[1].cells[4]
    assert float(cell.value) == pytest.approx(corrected - bound["reference"], abs=6e-4)
    assert cell.value.startswith("+")
    low, high = map(float, cell.detail.strip("[]").split(", "))
    assert [low, high] == pytest.approx([bound["margin"] + end for end in bound["slack_ci95"]], abs=6e-4)


def test_an_upper_margin_keeps_its_direction(build_run: Any) -> None:
    run = build_run([Constraint("toxicity", "<=", margin=-0.4)], n_prompts=30, n_samples=24)
    bound = run.dual["constraints"][0]
    cell = stage1_view(run.dual).rows[1].cells[4]
    low, high = map(float, cell.detail.strip("[]").split(", "))
    assert low < float(cell.value) < high < 0
    assert [low, high] == pytest.approx([bound["margin"] - end for end in bound["slack_ci95"][::-1]], abs=6e-4)
    assert "toxicity: at least 0.400 below the reference demanded; realised -0." in " ".join(
        stage2_view(run.evaluation, run.dual).answers
    )


def test_a_file_of_an_older_version_has_no_interval_beside_the_wrong_point(one_bound: Any) -> None:
    new = {"predicted_corrected", "slack_ci95"}
    bound, reward = (
        {key: value for key, value in part.items() if key not in new}
        for part in (one_bound.dual["constraints"][0], one_bound.dual["reward"])
    )
    view = stage1_view({**one_bound.dual, "constraints": [bound], "reward": reward})
    assert [row.cells[4].detail for row in view.rows] == ["", ""]
    assert "left out" in dict(view.facts)["corrected"]


def test_one_line_bridges_the_thresholds(one_bound: Any) -> None:
    dual = json.loads(json.dumps(one_bound.dual))
    bound, found = dual["constraints"][0], one_bound.evaluation["constraints"][0]
    bound["margin"] = 0.906
    bound["threshold"] = bound["reference"] + 0.906
    text = dict(stage2_view(one_bound.evaluation, dual).facts)["thresholds"]
    assert text == (
        f"harmless >= ref + 0.800: >= {bound['demanded']['threshold']:.3f} on the train prompts "
        f"(ref {bound['reference']:.3f}), >= {found['threshold']:.3f} on the test prompts "
        f"(ref {found['reference']:.3f})"
        f"; asked of the dual, with safeguards: >= ref + 0.906, >= {bound['threshold']:.3f} on the train prompts"
    )


def test_green_is_not_shown_beside_red(one_bound: Any) -> None:
    evaluation = {**one_bound.evaluation, "status": "satisfied"}
    evaluation["constraints"] = [{**evaluation["constraints"][0], "status": "satisfied"}]
    trust = {**one_bound.dual["trust"], "verdict": "ok", "reasons": [], "advice": []}
    good = stage2_view(evaluation, {**one_bound.dual, "trust": trust})
    assert [(badge.label, badge.verdict, badge.tone) for badge in good.badges] == [
        ("Evaluation", "satisfied", "good"),
        ("Trust in lambda*", "ok", "good"),
    ]
    assert good.rows[1].tone == "good"
    trust |= {"verdict": "unreliable", "reasons": ["a sign is bad"], "advice": ["or draw about 360 responses"]}
    bad = stage2_view(evaluation, {**one_bound.dual, "trust": trust})
    assert [badge.tone for badge in bad.badges] == ["neutral", "bad"]
    assert bad.rows[1].tone == "neutral"
    assert bad.badges[1].advice == "Draw about 360 responses."


def test_training_that_did_not_pay_is_a_badge_of_its_own(one_bound: Any) -> None:
    training = TrainingVerdict(
        verdict="did not pay",
        closed_fraction=-0.05,
        closed_fraction_ci95=None,
        n_checkpoints=4,
        n_prompts=40,
        reasons=("no checkpoint beat the reference", "Tried: this"),
        advice=("lower that", "or get more"),
    )
    for view in (stage1_view(one_bound.dual, training), stage2_view(one_bound.evaluation, one_bound.dual, training)):
        assert view.badges[-1] == Badge(
            "Training",
            "did not pay",
            "bad",
            ("No checkpoint beat the reference.", "Tried: this."),
            "Lower that, or get more.",
        )


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


def test_categories_say_what_was_gained_and_whether_the_demand_is_met_there(two_bounds: Any) -> None:
    table = category_table(two_bounds.evaluation, two_bounds.solved)
    assert table is not None
    assert table.is_judged
    assert [(head.value, head.detail) for head in table.heads] == [
        ("helpful", "realised gain"),
        ("harmless", "realised gain, >= ref + 0.800 demanded"),
        ("toxicity", "realised, <= -0.200 demanded"),
    ]
    assert [row.category for row in table.rows] == ["family", "work"]
    for row, entry in zip(table.rows, two_bounds.evaluation["by_category"], strict=True):
        for cell, tone, score in zip(row.cells, row.tones, entry["scores"], strict=True):
            if "status" not in score:
                assert tone == "neutral"
                continue
            low, high = score["improvement_ci95" if score["name"] == "harmless" else "ci95"]
            assert cell.detail == f"[{low:.3f}, {high:.3f}]\n{score['status']}"
            assert tone == {"satisfied": "good", "undecided": "doubtful", "violated": "bad"}[score["status"]]


def test_of_very_many_categories_those_with_the_most_prompts_are_shown(one_bound: Any) -> None:
    scores = [{"name": name, "reference": 0.0, "predicted": 0.5} for name in ("helpful", "harmless")]
    entries = [{"category": f"{place} " + "x" * 300, "n_prompts": place, "scores": scores} for place in range(2000)]
    table = category_table({"by_category": entries}, one_bound.solved)
    assert table is not None
    assert table.n_categories == 2000
    assert [row.n_prompts for row in table.rows] == list(range(500, 2000))
    assert all(row.category.endswith("more characters]") and len(row.category) < 240 for row in table.rows)


def test_before_an_evaluation_categories_are_judged_by_the_prediction(one_bound: Any) -> None:
    harmless = {"name": "harmless", "reference": 0.25, "predicted": 1.25}
    scores = [{"name": "helpful", "reference": 0.25, "predicted": 0.5}, harmless]
    few = {"category": "work", "n_prompts": 3, "scores": [scores[0], {**harmless, "predicted": 0.5}]}
    document = {"by_category": [{"category": "", "n_prompts": 3, "scores": scores}, few]}
    table = category_table(document, one_bound.solved)
    assert table is not None
    assert not table.is_judged
    assert [(row.category, *(cell.value for cell in row.cells)) for row in table.rows] == [
        ("(none)", "+0.250", "+1.000"),
        ("work", "+0.250", "+0.250"),
    ]
    assert [row.cells[1].detail for row in table.rows] == ["met", "not met"]
    assert category_table({"by_category": []}, one_bound.solved) is None
    assert category_table({}, one_bound.solved) is None
