from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.keys import PromptPlaces, find_keys


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_places_follow_the_order_given_and_strangers_have_none(kind: pa.DataType) -> None:
    places = PromptPlaces(["c", "a", "b"])
    column = pa.chunked_array([pa.array(["a", "x", "c"]).cast(kind), pa.array(["b"]).cast(kind)])
    assert places.of(column).tolist() == [1, -1, 0, 2]
    assert (len(places), places.ids) == (3, ["c", "a", "b"])


def test_no_rows_have_no_places() -> None:
    assert PromptPlaces([]).of(pa.chunked_array([], pa.string())).tolist() == []


def test_a_repeated_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="3 prompts have 2 distinct ids"):
        PromptPlaces(["a", "b", "a"])


def test_keys_are_found_among_sorted_ones() -> None:
    assert find_keys(np.array([2, 5, 9]), np.array([9, 1, 5, 10])).tolist() == [2, -1, 1, -1]
    assert find_keys(np.array([], dtype=np.int64), np.array([3])).tolist() == [-1]
