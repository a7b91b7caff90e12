from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.contracts.artifacts import write_json
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.report.readers import (
    build_comparisons,
    build_dual_curves,
    build_frontier_curves,
    build_gold_comparisons,
    build_ladder_curves,
    build_problem,
    read_examples,
    read_frontier,
    read_policy_examples,
    read_tilted_scores,
    read_training_curve,
    sample_size_shares,
)
from pipeline.report.solved import ReportedSolution

NAMES = ["harmless", "toxicity"]


def _curves(path: Path, solved: ReportedSolution) -> Any:
    return build_frontier_curves(read_frontier(path, solved.names), solved, None)


def test_the_ladder_is_that_of_the_dual(two_bounds: Any) -> None:
    for curve, bound in zip(build_ladder_curves(two_bounds.solved), two_bounds.dual["constraints"], strict=True):
        assert curve.multiplier_r[0] == curve.lam_star.value == bound["multiplier"]
        assert curve.corrected == pytest.approx(2 * curve.multiplier_r[0] - curve.multiplier_r[1])
        assert list(curve.responses_r[:1] / curve.responses_r) == [1, 2, 4][: len(curve.responses_r)]
    ladder = two_bounds.dual["ladder"]
    short = {**two_bounds.dual, "ladder": {**ladder, "rungs": ladder["rungs"][:1]}}
    assert build_ladder_curves(ReportedSolution.from_document(short)) == []


def test_the_dual_curves_have_their_minimum_at_the_multipliers(two_bounds: Any) -> None:
    scores = read_tilted_scores(two_bounds.folder / "tilted", NAMES)
    curves = build_dual_curves(two_bounds.solved, build_problem(two_bounds.solved, scores), n_points=31)
    assert [curve.name for curve in curves] == NAMES
    for curve, bound in zip(curves, two_bounds.dual["constraints"], strict=True):
        lowest = int(np.argmin(curve.dual_value_k))
        assert curve.lam_k[lowest] == bound["multiplier"] > 0
        assert curve.dual_value_k[lowest] == pytest.approx(two_bounds.dual["dual_value"], abs=1e-10)
        assert curve.slack_k[lowest] == pytest.approx(bound["slack"], abs=1e-10)
        # The slack is the derivative of the dual: it changes sign once, from below.
        assert np.all(np.diff(curve.slack_k) > 0)
        assert curve.slack_k[0] < 0 < curve.slack_k[-1]


def test_the_sample_sizes_are_those_of_the_solve(two_bounds: Any) -> None:
    share_p = sample_size_shares(read_tilted_scores(two_bounds.folder / "tilted", NAMES))
    assert share_p.shape == (two_bounds.dual["n_prompts"],)
    assert np.median(share_p) * 48 == pytest.approx(two_bounds.dual["diagnostics"]["ess_median"], rel=1e-9)


def test_the_runs_own_point_is_on_its_frontier(two_bounds: Any) -> None:
    path = two_bounds.folder / "dual" / "frontier.parquet"
    curves = build_frontier_curves(read_frontier(path, NAMES), two_bounds.solved, two_bounds.evaluation)
    assert [curve.is_margin for curve in curves] == [True, False]
    for curve in curves:
        at_own = np.interp(curve.predicted.score.value, curve.score_k, curve.reward_k)
        assert at_own == pytest.approx(curve.predicted.reward.value, abs=1e-9)
        assert curve.predicted.score.value == pytest.approx(curve.bound.threshold, abs=1e-9)
        assert curve.reference.reward.value == 0.0
        # A stricter threshold never raises the reward, and its price never falls.
        strictness = 1.0 if curve.bound.direction == ">=" else -1.0
        assert np.all(strictness * np.diff(curve.reward_k) <= 1e-9)
        assert np.all(strictness * np.diff(curve.multiplier_k) >= -1e-9)
    margin, absolute = curves
    assert margin.bound.threshold == pytest.approx(0.8)
    assert margin.reference.score.value == 0.0
    assert absolute.bound.threshold == pytest.approx(-0.2)
    evaluated = two_bounds.evaluation["constraints"]
    assert margin.realised is not None
    assert margin.realised.score.ci95 == tuple(evaluated[0]["improvement_ci95"])
    assert absolute.realised is not None
    assert absolute.realised.score.value == evaluated[1]["realised"]


def test_before_stage_2_the_frontier_has_no_realised_point(two_bounds: Any) -> None:
    (first, _) = _curves(two_bounds.folder / "dual" / "frontier.parquet", two_bounds.solved)
    assert first.realised is None
    assert first.predicted_test is None


def test_infeasible_points_are_left_out(two_bounds: Any, tmp_path: Path) -> None:
    table = pq.read_table(two_bounds.folder / "dual" / "frontier.parquet")
    feasible = np.array(table["feasible"].to_pylist())
    first = np.array(table["constraint"].to_pylist()) == "harmless"
    feasible[np.flatnonzero(first)[-3:]] = False
    place = table.schema.get_field_index("feasible")
    pq.write_table(table.set_column(place, "feasible", [feasible]), tmp_path / "frontier.parquet")
    curve, _ = _curves(tmp_path / "frontier.parquet", two_bounds.solved)
    assert len(curve.score_k) == first.sum() - 3


def test_comparisons_are_those_of_the_evaluation(two_bounds: Any) -> None:
    reward, harmless, toxicity = build_comparisons(two_bounds.evaluation, two_bounds.solved)
    assert reward.bound is None
    assert reward.realised.ci95 == tuple(two_bounds.evaluation["reward"]["ci95"])
    assert harmless.bound is not None
    assert toxicity.bound is not None
    assert toxicity.bound.direction == "<="
    # Of a margin the difference to the reference on the same prompts; of an absolute bound the mean.
    margin, absolute = two_bounds.solved.constraints
    assert harmless.predicted.ci95 is not None
    assert toxicity.predicted.ci95 == absolute.heldout_ci95
    moved = np.array(harmless.predicted.ci95) - harmless.predicted.value
    assert moved == pytest.approx(np.array(margin.heldout_slack_ci95) - margin.heldout_slack)
    assert moved != pytest.approx(np.array(margin.heldout_ci95) - margin.heldout)
    (gold,) = build_gold_comparisons(two_bounds.evaluation, "helpful")
    assert gold.gold == (0.31, 0.62)
    assert build_gold_comparisons({**two_bounds.evaluation, "gold": None}, "helpful") == []


def test_the_checkpoint_kept_is_the_best_held_out_one(one_bound: Any) -> None:
    curve = read_training_curve(one_bound.folder / "policy" / "training_log.json")
    assert curve.chosen_step == 160
    assert curve.heldout_step_e[0] == 0
    assert len(curve.step_t) == 120
    assert curve.closed_fraction_e is not None
    assert len(curve.closed_fraction_e) == len(curve.heldout_e)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"step": 1}, "must be a list"),
        ([1, 2], "must be a list"),
        ([{"step": 0, "eval_loss": 1.0}, {"step": 5, "loss": 1.0}], "no held-out evaluation"),
    ],
)
def test_what_is_no_training_log_is_refused(log: Any, message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "training_log.json", log)
    with pytest.raises(CorruptArtifactError, match=message):
        read_training_curve(tmp_path / "training_log.json")


def test_examples_come_from_both_ends_of_the_weights(two_bounds: Any) -> None:
    found = read_examples(two_bounds.folder / "tilted", two_bounds.solved, n_prompts=3, n_each=2)
    assert len(found) == 3
    for item in found:
        weights = [example.weight or 0.0 for example in (*item.raised, *item.lowered)]
        assert weights == sorted(weights, reverse=True)
        assert len(item.raised) == len(item.lowered) == 2
        assert weights[0] > 1 > weights[-1]
        assert list(item.raised[0].scores) == ["helpful", *NAMES]


def test_policy_examples_are_the_first_ones_drawn(one_bound: Any) -> None:
    found = read_policy_examples(one_bound.folder, n_prompts=2, n_each=2)
    assert len(found) == 2
    assert found[0].texts[0].endswith("(0)")
    assert found[0].messages[0]["content"].startswith("Question 0:")


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="no Parquet file"):
        read_tilted_scores(tmp_path / "tilted", NAMES)


def test_a_missing_column_is_named(one_bound: Any) -> None:
    with pytest.raises(CorruptArtifactError, match="constraint_toxicity"):
        read_tilted_scores(one_bound.folder / "tilted", NAMES)


def test_a_table_of_test_prompts_only_is_refused(one_bound: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in (one_bound.folder / "tilted" / "data").glob("test-*.parquet"):
        shutil.copy(path, tmp_path / "data")
    with pytest.raises(CorruptArtifactError, match="no rows of the split 'train'"):
        read_tilted_scores(tmp_path, ["harmless"])
