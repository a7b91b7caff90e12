"""How the slope of a run's equations errs with them, against closed forms and direct covariances."""

import numpy as np
import pytest
from helpers.pilots import BETA, draw_gaussian, draw_unlike, pilot_rows

from stage1_dual.dual import Pilot


def test_where_prompts_differ_in_spread_alone_the_slope_errs_as_much_as_the_slack():
    # psi_p = h_p lam - margin: where h is off by a share of it, psi is off by h lam times that share. t = 1 / lam.
    rng = np.random.default_rng(4)
    pilot = Pilot.measure(pilot_rows(*draw_unlike(rng, rng.gamma(2.0, 0.5, size=1500), 256), 0.3))
    slopes_ffi = pilot.slopes.at(100_000)
    assert slopes_ffi[0, 0, 0] == pytest.approx(1 / pilot.multipliers_m[0], rel=0.06)


def test_slopes_are_the_covariances_of_a_prompts_hessian_with_its_slack():
    rng = np.random.default_rng(5)
    n_prompts, n_responses = 3000, 64
    own_pkm = draw_unlike(rng, rng.gamma(2.0, 0.5, size=n_prompts), n_responses, n_constraints=2)[1]
    r_pk, g_pkm = draw_gaussian(rng, n_prompts, n_responses, n_constraints=2)
    rows = pilot_rows(r_pk, own_pkm + 0.5 * g_pkm, 0.3)
    pilot = Pilot.measure(rows)
    logit_pk = (rows.reward_n + pilot.multipliers_m @ rows.column_mn).reshape(n_prompts, n_responses) / BETA
    weight_pk = np.exp(logit_pk) / np.exp(logit_pk).sum(axis=1, keepdims=True)
    column_mpk = rows.column_mn.reshape(2, n_prompts, n_responses)
    mean_mp = np.einsum("mpk,pk->mp", column_mpk, weight_pk)
    off_mpk = column_mpk - mean_mp[:, :, None]
    hessian_jkp = np.einsum("jpn,kpn,pn->jkp", off_mpk, off_mpk, weight_pk) / BETA
    psi_mp = mean_mp - column_mpk.mean(axis=2)
    # Both as the pilot's own responses show them, so that no other number of responses is reckoned with.
    found = pilot.slopes.at(n_responses) @ pilot.moments.equations_mm(n_responses)
    for j in range(2):
        for k in range(2):
            for i in range(2):
                expected = np.cov(hessian_jkp[j, k], psi_mp[i])[0, 1]
                assert found[j, k, i] == pytest.approx(expected, abs=0.06 * np.abs(found).max())


def test_where_nothing_binds_there_is_no_slope():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(7), 60, 32)
    pilot = Pilot.measure(pilot_rows(r_pk, g_pkm, -2.0))
    assert not pilot.is_active_m.any()
    assert pilot.slopes.at(64).shape == (0, 0, 0)
    assert pilot.predict(64).miss(100, np.array([0.1])) < 0.05
