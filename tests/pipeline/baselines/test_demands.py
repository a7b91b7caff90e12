"""The summary of realised against demanded margins, on policies whose errors are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.baselines import policies
from pipeline.baselines.demands import _satisfaction_summary

SD = 2.0


def _row(demanded: float, realised: float, **changes: Any) -> dict[str, Any]:
    row = {
        "method": policies.ONE_SHOT,
        "seed": 0,
        "demanded": demanded,
        "lambda": 0.5,
        "predicted": demanded,
        "response_bias": 0.0,
        "realised": realised,
        "ci95_low": realised - 0.196,
        "ci95_high": realised + 0.196,
        "status": "undecided",
        "sd": SD,
        "error_sd": (realised - demanded) / SD,
        "gold_realised": realised,
        "reward_predicted": 0.2,
        "reward_realised": 0.2,
        "kl": 0.5,
        "closed_fraction": 0.9,
        "seconds": 30.0,
        "run": "study/seed0/one-shot",
    }
    return row | changes


def test_errors_of_both_signs_cancel_in_the_bias_alone():
    summary = _satisfaction_summary(policies.ONE_SHOT, [_row(0.4, 0.6), _row(0.8, 0.6)])
    assert summary["policies"] == 2
    assert summary["mean absolute error (sd)"] == pytest.approx(0.1)
    assert summary["bias (sd)"] == pytest.approx(0.0, abs=1e-15)


def test_dual_and_training_add_up_to_the_bias():
    rows = [_row(0.4, 0.35, predicted=0.5), _row(0.8, 0.7, predicted=0.8)]
    summary = _satisfaction_summary(policies.ONE_SHOT, rows)
    assert summary["dual (sd)"] == pytest.approx(0.05 / SD)
    assert summary["training (sd)"] == pytest.approx(-0.125 / SD)
    assert summary["dual (sd)"] + summary["training (sd)"] == pytest.approx(summary["bias (sd)"])


def test_the_noise_is_what_a_policy_without_error_would_show():
    """A normal error of the evaluation's standard error 0.1 has the mean absolute value 0.1 sqrt(2 / pi)."""
    summary = _satisfaction_summary(policies.ONE_SHOT, [_row(0.4, 0.4)] * 3)
    assert summary["noise (sd)"] == pytest.approx(0.1 * np.sqrt(2 / np.pi) / SD)
    drawn = np.abs(np.random.default_rng(0).normal(scale=0.1 / SD, size=200_000))
    assert abs(summary["noise (sd)"] - drawn.mean()) < 4 * drawn.std() / np.sqrt(len(drawn))


def test_shares_count_policies_by_their_status():
    rows = [_row(0.4, 0.4, status=status) for status in ("satisfied", "undecided", "undecided", "violated")]
    summary = _satisfaction_summary(policies.ONE_SHOT, rows)
    assert (summary["satisfied"], summary["not violated"]) == (0.25, 0.75)


def test_what_the_correction_took_off_is_positive():
    summary = _satisfaction_summary(policies.ONE_SHOT, [_row(0.4, 0.4, response_bias=-0.05)])
    assert summary["responses (sd)"] == pytest.approx(0.05 / SD)


def test_a_later_iterate_was_asked_for_other_thresholds_than_were_demanded():
    summary = _satisfaction_summary(policies.MULTI_SHOT, [_row(0.4, 0.3, predicted=0.5)])
    assert summary["dual (sd)"] is None
    assert summary["responses (sd)"] is None
    assert summary["training (sd)"] == pytest.approx(-0.1)


def test_gold_is_compared_with_the_score_model_over_all_policies():
    rows = [_row(0.4, 0.5, gold_realised=0.6), _row(0.8, 1.0, gold_realised=0.9)]
    assert _satisfaction_summary(policies.ONE_SHOT, rows)["gold / proxy"] == pytest.approx(1.0)
