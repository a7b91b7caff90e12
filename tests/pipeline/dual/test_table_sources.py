"""The same rows from files, a folder, Arrow and pandas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.contracts.artifacts import file_sha256
from pipeline.contracts.errors import InputError
from pipeline.dual.table_sources import ScoreSource, open_source, require_columns

ROWS = {"prompt_id": ["a", "a", "b", "c", "c"], "helpful": [1.0, 2.0, 3.0, 4.0, 5.0], "unread": [0] * 5}
COLUMNS = ("prompt_id", "helpful")


def _file(folder: Path) -> Path:
    pq.write_table(pa.table(ROWS), folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


def _folder(folder: Path) -> Path:
    table = pa.table(ROWS)
    (folder / "t").mkdir()
    pq.write_table(table.slice(0, 3), folder / "t" / "0.parquet")
    pq.write_table(table.slice(3), folder / "t" / "1.parquet")
    return folder / "t"


MAKERS: list[Callable[[Path], Any]] = [_file, _folder, lambda _: pa.table(ROWS), lambda _: pd.DataFrame(ROWS)]


@pytest.mark.parametrize("make", MAKERS, ids=["file", "folder", "arrow", "pandas"])
def test_every_source_gives_the_rows_in_order_and_as_often_as_asked(tmp_path: Path, make: Any) -> None:
    source = open_source(make(tmp_path), COLUMNS)
    source.require_agreement(COLUMNS)
    assert (source.n_rows, source.n_values("helpful")) == (5, 5)
    for _ in range(2):
        batches = list(source.batches(COLUMNS, rows_at_once=2))
        assert max(batch.num_rows for batch in batches) <= 2
        assert pa.Table.from_batches(batches).to_pydict() == {name: ROWS[name] for name in COLUMNS}


def _lists(lists: list[list[float]], kind: pa.DataType) -> pa.Table:
    return pa.table({"prompt_id": ["a", "b"], "helpful": pa.array(lists, kind)})


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int64(), 2)])
def test_numbers_in_lists_are_counted_one_by_one(tmp_path: Path, kind: pa.DataType) -> None:
    table = _lists([[1, 2], [3, 4]], kind)
    pq.write_table(table, tmp_path / "t.parquet")
    for source in (open_source(table, COLUMNS), open_source(tmp_path / "t.parquet", COLUMNS)):
        assert (source.n_rows, source.n_values("helpful")) == (2, 4)


def test_files_are_known_by_their_content_and_must_not_change(tmp_path: Path) -> None:
    path = _file(tmp_path)
    source = open_source(path, COLUMNS)
    assert source.n_rows == 5
    assert source.file_hashes() == {"t.parquet": file_sha256(path)}
    assert open_source(pa.table(ROWS), COLUMNS).file_hashes() == {}
    pq.write_table(pa.table(ROWS).slice(1), path)
    with pytest.raises(InputError, match="has changed since it was first read"):
        list(source.batches(COLUMNS, rows_at_once=2))


def test_a_frame_that_is_changed_later_changes_nothing() -> None:
    frame = pd.DataFrame(ROWS)
    source = open_source(frame, COLUMNS)
    frame.loc[0, "helpful"] = 99.0
    (batch,) = source.batches(COLUMNS, rows_at_once=10)
    assert batch.column("helpful").to_pylist() == ROWS["helpful"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([1, 2], "the table is of type list; it must be a pandas DataFrame"),
        (pd.DataFrame({"prompt_id": ["a"], "helpfull": [1.0]}), r"no column 'helpful'; did you mean `helpfull`\?"),
        (pd.DataFrame({"prompt_id": ["a", 1], "helpful": [1.0, 2.0]}), "'prompt_id' holds values of several types"),
        (pd.DataFrame([["a", 1.0, 2.0]], columns=["prompt_id", "helpful", "helpful"]), "has 2 columns 'helpful'"),
    ],
)
def test_what_is_no_table_is_named(table: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(table, COLUMNS)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt_id": ["z"], "helpful": ["much"]}, "1.parquet: column 'helpful' is of type string"),
        ({"prompt_id": ["z"]}, "1.parquet has no column 'helpful'"),
        ({"prompt_id": ["z"], "helpful": [1.0], "split": ["train"]}, "1.parquet has a column 'split' and"),
    ],
)
def test_files_of_a_folder_must_agree(tmp_path: Path, second: dict[str, list[Any]], message: str) -> None:
    folder = _folder(tmp_path)
    pq.write_table(pa.table(second), folder / "1.parquet")
    source: ScoreSource = open_source(folder, COLUMNS)
    with pytest.raises(InputError, match=message):
        source.require_agreement(COLUMNS)


def test_whole_and_other_numbers_agree(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    pq.write_table(pa.table({"prompt_id": ["z"], "helpful": [1]}), folder / "1.parquet")
    open_source(folder, COLUMNS).require_agreement(COLUMNS)


def test_optional_columns_may_be_there_once() -> None:
    require_columns(["a", "split"], ["a"], table="t")
    with pytest.raises(InputError, match="t has 2 columns 'split'"):
        require_columns(["a", "split", "split"], ["a"], table="t")
