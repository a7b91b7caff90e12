"""Rows and lists are the same responses, however they are stored and cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts.errors import InputError
from pipeline.dual import table_reader
from pipeline.dual.table_reader import ScoreTable
from pipeline.dual.table_sources import TableInMemory

ROWS = {
    "prompt_id": ["a", "a", "b", "c", "c", "c"],
    "helpful": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "harmless": [0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
}
LISTS = {
    "prompt_id": ["a", "b", "c"],
    "helpful": [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]],
    "harmless": [[0.0, -1.0], [-2.0], [-3.0, -4.0, -5.0]],
}


def _table(columns: dict[str, Any]) -> ScoreTable:
    return ScoreTable(TableInMemory(pa.table(columns)), "prompt_id", ("helpful", "harmless"))


def _read(table: ScoreTable) -> dict[str, list[Any]]:
    table.require_columns()
    chunks = list(table.chunks())
    return {
        "id": [one for chunk in chunks for one in chunk.prompt_id_n.to_pylist()],
        "index": [one for chunk in chunks for one in chunk.sample_index_n.tolist()],
        "row": [one for chunk in chunks for one in chunk.row_n.tolist()],
        "scores": [one for chunk in chunks for one in chunk.scores_ns.tolist()],
    }


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_lists_are_rows_by_prompt_whatever_is_read_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(table_reader, "_CHUNK_ROWS", at_once)
    rows, lists = _read(_table(ROWS)), _read(_table(LISTS))
    assert rows["id"] == lists["id"] == ROWS["prompt_id"]
    assert rows["scores"] == lists["scores"] == [list(pair) for pair in zip(*list(ROWS.values())[1:], strict=True)]
    assert (rows["index"], rows["row"]) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    assert (lists["index"], lists["row"]) == ([0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 2, 2])


def test_a_sample_index_of_the_table_is_kept_and_split_read() -> None:
    (chunk,) = _table({**ROWS, "sample_index": [7, 3, 0, 2, 1, 0], "split": ["train"] * 5 + ["test"]}).chunks()
    assert chunk.sample_index_n.tolist() == [7, 3, 0, 2, 1, 0]
    assert chunk.split_n is not None
    assert chunk.split_n.tolist() == ["train"] * 5 + ["test"]
    assert not _table(ROWS).has_split


def test_ids_are_told_apart_by_number_or_by_text() -> None:
    (whole,) = _table({**ROWS, "prompt_id": [-1, -1, 2**40, 3, 3, 3]}).chunks()
    assert whole.prompt_n.view(np.int64).tolist() == [-1, -1, 2**40, 3, 3, 3]
    (text,) = _table(ROWS).chunks()
    codes = pa.array(ROWS["prompt_id"]).dictionary_encode()
    (coded,) = _table({**ROWS, "prompt_id": codes}).chunks()
    assert text.prompt_n.tolist() == coded.prompt_n.tolist()
    assert len(set(text.prompt_n.tolist())) == 3


def test_the_identity_is_of_the_values_not_of_their_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _table(ROWS).identity()
    monkeypatch.setattr(table_reader, "_CHUNK_ROWS", 2)
    coded = {**ROWS, "prompt_id": pa.array(ROWS["prompt_id"]).dictionary_encode()}
    assert _table(coded).identity() == first
    assert _table({**ROWS, "helpful": [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]}).identity() != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"helpful": [1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]}, r"'helpful' has 1 values that are not finite \(row 3"),
        ({"harmless": [0.0, None, -2.0, -3.0, -4.0, -5.0]}, r"'harmless' has 1 empty values \(first rows: \[1\]\)"),
        ({"prompt_id": ["a", "a", None, "c", "c", "c"]}, "'prompt_id' has 1 empty values"),
        ({"prompt_id": [0.5] * 6}, "an id must be text or an integer"),
        ({"helpful": ["x"] * 6}, "a score must be a number"),
        ({"harmless": [[0.0]] * 6}, "holds lists and 'helpful' numbers"),
        ({"sample_index": [0.0] * 6}, "'sample_index' is of type double"),
    ],
)
def test_what_is_no_score_or_id_is_named_with_its_row(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _read(_table({**ROWS, **change}))


def test_lists_of_a_prompt_must_be_of_one_length() -> None:
    with pytest.raises(InputError, match="row 2 has 2 scores in 'harmless' and 3 in 'helpful'"):
        _read(_table({**LISTS, "harmless": [[0.0, -1.0], [-2.0], [-3.0, -4.0]]}))
    with pytest.raises(InputError, match="has no rows"):
        _read(_table({name: pa.array(values).slice(0, 0) for name, values in ROWS.items()}))
