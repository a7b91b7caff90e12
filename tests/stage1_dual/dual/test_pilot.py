"""How far what a pilot says may be wrong."""

import numpy as np
from helpers.pilots import draw_gaussian, pilot_rows

from stage1_dual.dual import Pilot


def test_a_variance_of_many_gaussian_prompts_has_one_degree_of_freedom_less_than_prompts():
    degrees = [
        Pilot.measure(pilot_rows(*draw_gaussian(np.random.default_rng(seed), 80, 32), 0.3, relative=False))
        .predict(32)
        .degrees_m[0]
        for seed in range(12)
    ]
    assert 50 < np.median(degrees) < 120
