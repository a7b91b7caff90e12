"""How far a method's policies are from the best at their harmlessness, on a frontier that is known."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.baselines.trade_off import _distances

BETA = 0.5
# At harmlessness h the best policy has r - beta KL = 1 - h.
HARMLESS = np.linspace(0.0, 1.0, 11)
KL = 2 * HARMLESS
FRONTIER = pa.table({"harmless": HARMLESS, "helpful": 1 - HARMLESS + BETA * KL, "kl": KL})


def _policy(harmless: float, *, below: float, kl: float = 1.0, method: str = "one-shot") -> dict[str, Any]:
    return {"method": method, "harmless": harmless, "helpful": 1 - harmless - below + BETA * kl, "kl": kl}


def _gaps(rows: list[dict[str, Any]], frontier: pa.Table = FRONTIER) -> list[float]:
    return [float(re.search(r": (-?[\d.]+) reward", line)[1]) for line in _distances(rows, frontier, beta=BETA)]


@pytest.mark.parametrize("kl", [0.0, 0.4, 3.0])
def test_a_policy_on_the_frontier_is_at_no_distance_whatever_its_kl(kl):
    assert _gaps([_policy(0.35, below=0.0, kl=kl)]) == pytest.approx([0.0])


def test_the_distance_is_the_mean_over_a_methods_policies():
    rows = [_policy(0.2, below=0.1), _policy(0.8, below=0.3), _policy(0.5, below=0.05, method="rewarded soup")]
    assert _gaps(rows) == pytest.approx([0.2, 0.05])


def test_reward_bought_with_kl_is_no_gain():
    near, far = _policy(0.5, below=0.2, kl=0.1), _policy(0.5, below=0.2, kl=2.1)
    assert far["helpful"] > near["helpful"]
    assert _gaps([near]) == _gaps([far]) == pytest.approx([0.2])


def test_the_order_of_the_curve_does_not_matter():
    assert _gaps([_policy(0.35, below=0.1)], FRONTIER.take(np.arange(11)[::-1])) == pytest.approx([0.1])


def test_policies_beyond_the_curve_are_left_out_and_counted():
    (line,) = _distances([_policy(0.5, below=0.1), _policy(1.5, below=9.0)], FRONTIER, beta=BETA)
    assert "0.100 reward units" in line
    assert "1 of 2 policies" in line
    (line,) = _distances([_policy(-0.5, below=9.0)], FRONTIER, beta=BETA)
    assert line == "one-shot: outside of the range of harmlessness of the predicted policies"
