"""What the error of two demands is made of, on policies whose errors are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.baselines import policies
from pipeline.baselines.two_constraints import SCORES, _findings, summarise

SD = 2.0


def _row(*, seed: int = 0, method: str = policies.ONE_SHOT, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "seed": seed}
    for name in SCORES:
        row |= {
            f"{name}_demanded": 0.4,
            f"{name}_lambda": 0.5,
            f"{name}_assurance": 0.0,
            f"{name}_promised": 0.4,
            f"{name}_predicted": 0.4,
            f"{name}_understated": 0.0,
            f"{name}_realised": 0.4,
            f"{name}_ci95_low": 0.4 - 0.196,
            f"{name}_ci95_high": 0.4 + 0.196,
            f"{name}_sd": SD,
            f"{name}_status": "undecided",
        }
    assert changes.keys() <= row.keys()
    return row | changes


def _summary(rows: list[dict[str, Any]], name: str = "harmless") -> dict[str, Any]:
    return summarise(rows, policies.ONE_SHOT, name)


def test_assurance_correction_prompts_and_training_add_up_to_the_bias():
    rows = [
        _row(harmless_assurance=0.1, harmless_promised=0.5, harmless_predicted=0.46, harmless_realised=0.5),
        _row(harmless_assurance=0.2, harmless_promised=0.54, harmless_predicted=0.62, harmless_realised=0.5),
    ]
    summary = _summary(rows)
    assert summary["assurance (sd)"] == pytest.approx(0.15 / SD)
    assert summary["correction (sd)"] == pytest.approx((0.0 - 0.06) / 2 / SD)
    assert summary["prompts (sd)"] == pytest.approx((-0.04 + 0.08) / 2 / SD)
    assert summary["training (sd)"] == pytest.approx((0.04 - 0.12) / 2 / SD)
    parts = sum(summary[f"{part} (sd)"] for part in ("assurance", "correction", "prompts", "training"))
    assert summary["realised less demanded (sd)"] == pytest.approx(parts) == pytest.approx(0.1 / SD)


def test_errors_of_both_signs_cancel_in_the_bias_alone():
    summary = _summary([_row(harmless_realised=0.3), _row(harmless_realised=0.5)])
    assert summary["realised less demanded (sd)"] == pytest.approx(0.0, abs=1e-15)
    assert summary["|realised less demanded| (sd)"] == pytest.approx(0.1 / SD)
    assert summary["|realised less predicted| (sd)"] == pytest.approx(0.1 / SD)


def test_a_demand_that_another_one_overfulfils_is_no_error_but_counts_as_kept():
    rows = [_row(), _row(harmless_lambda=0.0, harmless_realised=2.0, harmless_status="satisfied")]
    summary = _summary(rows)
    assert (summary["demands"], summary["binding"], summary["satisfied"]) == (2, 1, 1)
    assert summary["realised less demanded (sd)"] == pytest.approx(0.0, abs=1e-15)
    assert _summary(rows[1:])["realised less demanded (sd)"] is None


def test_each_score_is_judged_by_its_own_columns():
    rows = [_row(humour_realised=0.2, humour_status="violated", humour_sd=0.5)]
    assert _summary(rows, "harmless")["realised less demanded (sd)"] == pytest.approx(0.0, abs=1e-15)
    humour = _summary(rows, "humour")
    assert humour["realised less demanded (sd)"] == pytest.approx(-0.2 / 0.5)
    assert (humour["not violated"], humour["demands"]) == (0, 1)


def test_the_noise_is_what_a_policy_without_error_would_show():
    """A normal error of the evaluation's standard error 0.1 has the mean absolute value 0.1 sqrt(2 / pi)."""
    assert _summary([_row()])["noise (sd)"] == pytest.approx(0.1 * np.sqrt(2 / np.pi) / SD)


def test_a_later_iterate_was_asked_for_other_thresholds_than_were_demanded():
    row = _row(method=policies.MULTI_SHOT, harmless_assurance=None)
    summary = summarise([row], policies.MULTI_SHOT, "harmless")
    assert summary["correction (sd)"] is None
    assert summary["assurance (sd)"] is None
    assert summary["training (sd)"] == pytest.approx(0.0, abs=1e-15)


def test_a_policy_is_kept_by_both_of_its_demands_and_stands_beside_multi_shot_of_its_own_pair():
    rows = [
        _row(),
        _row(humour_status="violated"),
        _row(seed=1, harmless_status="satisfied", humour_status="satisfied"),
        _row(harmless_demanded=0.8, harmless_status="violated", humour_status="violated"),
        _row(method=policies.MULTI_SHOT, harmless_demanded=0.8, harmless_assurance=None, humour_assurance=None),
    ]
    one, harmless, humour, multi, beside = _findings(rows)
    assert one == "one-shot: 2 of 4 policies violate neither demand, 1 satisfy both"
    assert harmless.startswith("one-shot, harmless: mean absolute error ")
    assert humour.startswith("one-shot, humour: mean absolute error ")
    assert multi.startswith("multi-shot, one pair of seed 0: 1 of 1 policies violate neither demand, 0 satisfy both; ")
    assert beside.startswith("one-shot, one pair of seed 0: 0 of 1 policies violate neither demand, 0 satisfy both; ")
