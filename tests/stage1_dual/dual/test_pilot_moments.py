"""A, B and C against closed forms and each other."""

import math

import numpy as np
import pytest
from helpers.pilots import BETA, draw_gaussian, draw_unlike, pilot_rows

from stage1_dual.dual import Pilot


def test_moments_are_those_of_a_gaussian_population():
    # Tilted by v = 2 KL: E w^2 = exp(v), and under w^2 the mean moves by as much again.
    effect, margin, n_responses = 0.5, 0.4, 512
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(1), 400, n_responses, effect=effect)
    pilot = Pilot.measure(pilot_rows(r_pk, g_pkm, margin, relative=False))
    moment, moved = math.exp(2 * pilot.kl), margin - g_pkm.mean()
    assert pilot.second_moment == pytest.approx(moment, rel=0.05)
    assert pilot.moments.bias_m.first[0] == pytest.approx(moment * moved, rel=0.05)
    assert pilot.moments.between_mm.first[0, 0] == pytest.approx(effect**2, rel=0.2)
    # E w^2 (g - E_lam g)^2 = exp(v) (1 + margin^2), `moved` being how far the tilt moves the mean.
    assert pilot.moments.within_mm.first[0, 0] == pytest.approx(moment * (1 + moved**2), rel=0.05)
    assert pilot.sampled_m[0] == pytest.approx(1.0, rel=0.05)


def test_equalities_are_planned_for_like_bounds():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(10), 64, 32)
    bound, equal = (Pilot.measure(pilot_rows(r_pk, g_pkm, 0.4, equal=equal)) for equal in (False, True))
    np.testing.assert_allclose(equal.moments.between_mm.first, bound.moments.between_mm.first, rtol=1e-6)
    np.testing.assert_allclose(equal.bias_at(32), bound.bias_at(32), rtol=1e-6)


def test_how_prompts_differ_is_told_though_few_responses_hold_the_strongest_tilts_back():
    rng = np.random.default_rng(3)
    variance_p = rng.gamma(2.0, 0.5, size=4000)
    pilot = Pilot.measure(pilot_rows(*draw_unlike(rng, variance_p, 32), 0.7))
    # psi_p = lam variance_p / beta - margin, of responses without end, at the multiplier of the pilot.
    expected = (pilot.multipliers_m[0] / BETA) ** 2 * np.var(variance_p)
    between = pilot.moments.between_mm
    # 32 responses show by themselves 22% too little, of which the next term finds half.
    assert between.at(32)[0, 0] == pytest.approx(0.78 * expected, rel=0.03)
    assert between.first[0, 0] == pytest.approx(0.89 * expected, rel=0.03)
