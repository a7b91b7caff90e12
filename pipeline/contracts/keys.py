"""Keys of rows as numbers: ten million of them are a grid of bits, where tuples of strings would be gigabytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.contracts.errors import InputError


def row_keys(place_n: np.ndarray, index_n: np.ndarray) -> np.ndarray:
    """One number for each row, the same for no two keys whatever a table claims, ordered as the keys are.

    Args:
        place_n: place of each row's prompt, as of :meth:`PromptPlaces.of`, shape (n,).
        index_n: its ``sample_index``, a 32-bit integer, shape (n,).

    Returns:
        Shape (n,), int64.
    """
    return np.asarray(place_n.astype(np.int64) * 2**32 + index_n)


def find_keys(sorted_n: np.ndarray, wanted_n: np.ndarray) -> np.ndarray:
    """The place of each wanted key among sorted ones, -1 where it is not there.

    Args:
        sorted_n: keys, ascending, shape (n,).
        wanted_n: in any order, shape (w,).

    Returns:
        Shape (w,), int64.
    """
    if len(sorted_n) == 0:
        return np.full(len(wanted_n), -1)
    place_n = np.minimum(np.searchsorted(sorted_n, wanted_n), len(sorted_n) - 1)
    return np.asarray(np.where(sorted_n[place_n] == wanted_n, place_n, -1))


class PromptPlaces:
    """A fixed order of prompts: each prompt id and its place in it.

    Args:
        prompt_ids: distinct ids, in order.

    Raises:
        InputError: an id occurs twice.
    """

    def __init__(self, prompt_ids: Sequence[str]) -> None:
        self._place = {prompt_id: place for place, prompt_id in enumerate(prompt_ids)}
        if len(self._place) != len(prompt_ids):
            raise InputError(f"{len(prompt_ids)} prompts have {len(self._place)} distinct ids; each may occur once")

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> list[str]:
        """The ids, in order."""
        return list(self._place)

    def of(self, prompt_id: pa.ChunkedArray) -> np.ndarray:
        """Place of each row's prompt, shape (n,), int64; -1 where the prompt is not among these.

        Args:
            prompt_id: ids, as strings or as a dictionary of strings.
        """
        return np.concatenate([np.empty(0, np.int64), *map(self._places, prompt_id.chunks)])

    def _places(self, chunk: pa.Array) -> np.ndarray:
        """Each distinct id is looked up once: a table has its rows prompt by prompt."""
        encoded = chunk if isinstance(chunk.type, pa.DictionaryType) else chunk.dictionary_encode()
        places = np.array([self._place.get(name, -1) for name in encoded.dictionary.to_pylist()], dtype=np.int64)
        return np.asarray(places[encoded.indices.to_numpy()])
