"""Rows from which nothing can be told."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.pilots import draw_gaussian, pilot_rows

from pipeline.contracts.errors import InputError


def test_rows_that_say_nothing_are_refused():
    rows = pilot_rows(*draw_gaussian(np.random.default_rng(9), 6, 4), 0.1)
    with pytest.raises(InputError, match="1 response"):
        replace(rows, counts_p=np.array([1, 7, 4, 4, 4, 4]))
    with pytest.raises(InputError, match="at least 4"):
        replace(rows, counts_p=np.array([12, 12]))
