"""Rows from which nothing can be told."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.pilots import draw_gaussian, pilot_rows

from pipeline.contracts.errors import InputError


def test_rows_that_say_nothing_are_refused():
    rows = pilot_rows(*draw_gaussian(np.random.default_rng(9), 6, 4), 0.1)
    with pytest.raises(InputError, match="1 have a single response"):
        replace(rows, counts_p=np.array([1, 7, 4, 4, 4, 4]))
    with pytest.raises(InputError, match="at least 4"):
        replace(rows, counts_p=np.array([12, 12]))


def test_what_no_policy_changes_does_not_bind():
    rows = pilot_rows(*draw_gaussian(np.random.default_rng(9), 6, 4, n_constraints=2), 0.1)
    column_mn = rows.column_mn.copy()
    column_mn[1] = np.repeat(np.linspace(0.1, 0.7, 6), 4)
    rows = replace(rows, column_mn=column_mn, is_equality_m=np.array([True, True]))
    assert rows.counting_m.tolist() == [6, 0]
    assert rows.is_active_m.tolist() == [True, False]
