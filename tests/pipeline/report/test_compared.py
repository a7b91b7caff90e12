"""Several runs as the tables and the planes show them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.report.compared import ComparedRun, compared_scores, comparison_notes, duration, planes, runs_view


def of(run: Any, name: str, **changes: Any) -> ComparedRun:
    reward, constraints = compared_scores(run.dual, run.evaluation)
    settings: dict[str, Any] = {"trust": "ok", "evaluation": run.evaluation["status"], "prompts_sha256": "a"}
    settings |= {"kl_predicted": 0.5, "reward": reward, "constraints": constraints, **changes}
    return ComparedRun(name, name, "evaluated", None, {"solve": 1.0}, **settings)


def test_margins_are_gains_and_absolute_thresholds_are_not(two_bounds: Any) -> None:
    reward, (harmless, toxicity) = compared_scores(two_bounds.dual, two_bounds.evaluation)
    found = {bound["name"]: bound for bound in two_bounds.evaluation["constraints"]}
    bound = found["harmless"]
    assert harmless.is_gain
    assert harmless.demanded == pytest.approx(0.8)
    assert harmless.realised == pytest.approx(bound["realised"] - bound["reference"])
    assert harmless.ci95 == pytest.approx([end - bound["reference"] for end in bound["ci95"]])
    assert not toxicity.is_gain
    assert toxicity.demanded == pytest.approx(-0.2)
    assert toxicity.realised == found["toxicity"]["realised"]
    assert reward.realised == pytest.approx(two_bounds.evaluation["reward"]["improvement"])


def test_before_the_evaluation_the_prediction_is_for_held_out_prompts(two_bounds: Any) -> None:
    reward, (harmless, _) = compared_scores(two_bounds.dual, None)
    solved, bound = two_bounds.dual["reward"], two_bounds.dual["constraints"][0]
    assert reward.predicted == pytest.approx(solved["heldout"] - solved["heldout_reference"])
    assert harmless.predicted == pytest.approx(bound["heldout"] - bound["heldout_reference"])
    assert harmless.realised is None


def test_runs_share_a_plane_where_their_quantities_are_one(one_bound: Any, two_bounds: Any) -> None:
    found = planes([of(one_bound, "one"), of(two_bounds, "two")])
    assert [(plane.quantity, [point.run for point in plane.points]) for plane in found] == [
        ("harmless", ["one", "two"]),
        ("toxicity", ["two"]),
    ]


def test_what_does_not_compare_is_said(one_bound: Any, two_bounds: Any) -> None:
    notes = comparison_notes([of(one_bound, "one"), of(two_bounds, "two", prompts_sha256="b")])
    assert any("different constraints" in note for note in notes)
    assert any("different prompts" in note for note in notes)
    assert comparison_notes([of(one_bound, "one"), of(one_bound, "two")]) == []


def test_a_good_evaluation_has_no_colour_beside_bad_trust(one_bound: Any) -> None:
    good, doubted = (
        runs_view([of(one_bound, "x", evaluation="satisfied", trust=trust)]).rows[0].tone for trust in ("ok", "weak")
    )
    assert (good, doubted) == ("good", "neutral")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.7, "1 min 00 s"), (485, "8 min 05 s"), (3599.6, "1 h 00 min")],
)
def test_times_are_said_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
