"""Which slacks a prediction counts as missed."""

from dataclasses import replace

import numpy as np
from helpers.pilots import draw_gaussian, pilot_rows

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
    np.testing.assert_allclose(pilot.moments.between_mm[0, 0], pilot.moments.between_mm[1, 1])
    prediction = pilot.predict(64)
    assert not prediction.two_sided_m[1]
    # It is 0.2 beyond its demand, so that only the other one can be missed.
    assert prediction.miss(200, np.array([0.1, 0.1])) == prediction.miss(200, np.array([0.1, 10.0]))
