"""Which slacks a prediction counts as missed."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.pilots import draw_gaussian, draw_unlike, pilot_rows

from stage1_dual.dual import Pilot


def test_an_inactive_constraint_moves_with_the_active_one():
    rng = np.random.default_rng(2)
    r_pk, g_pkm = draw_gaussian(rng, 80, 64)
    # The second column is the first with a looser demand: it follows it one to one.
    rows = pilot_rows(r_pk, np.concatenate([g_pkm, g_pkm], axis=2), 0.3)
    target_m = np.array([0.3, 0.1])
    rows = replace(rows, target_m=target_m, multipliers_m=np.array([rows.multipliers_m.sum(), 0.0]))
    pilot = Pilot.measure(rows)
    np.testing.assert_allclose(pilot.moments.room_m, [0.0, 0.2], atol=1e-9)
    between_mm = pilot.moments.between_mm.first
    np.testing.assert_allclose(between_mm[0, 0], between_mm[1, 1])
    prediction = pilot.predict(64)
    assert not prediction.two_sided_m[1]
    # It is 0.2 beyond its demand, so that only the other one can be missed.
    assert prediction.miss(200, np.array([0.1, 0.1])) == prediction.miss(200, np.array([0.1, 10.0]))


def test_a_run_of_few_prompts_of_unlike_spread_goes_further_beyond_its_demand_than_short_of_it():
    rng = np.random.default_rng(6)
    variance_p = rng.gamma(2.0, 0.5, size=1500)
    pilot = Pilot.measure(pilot_rows(*draw_unlike(rng, variance_p, 256), 0.3))
    # A run of 60 prompts and responses without end takes lam = margin beta / its mean variance.
    mean_d = rng.choice(variance_p, size=(20_000, 60)).mean(axis=1)
    slack_d = 0.3 * np.mean(variance_p) / mean_d - 0.3
    prediction = pilot.predict(100_000)
    for share in (0.8, 0.95):
        above, below = np.quantile(slack_d, share), -np.quantile(slack_d, 1 - share)
        assert above > 1.05 * below
        reach = prediction.reach(60, np.array([1.0]), confidence=share)
        assert reach == pytest.approx(np.quantile(np.abs(slack_d), share), rel=0.1)
