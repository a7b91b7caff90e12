from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts.errors import CorruptArtifactError
from stage2_policy.mapped_files import (
    MappedFolder,
    TokenLists,
    TokenListWriter,
    map_columns,
    map_token_lists,
    remove_mapped,
    write_columns,
)

LISTS = [[1, 2, 3], [], [4], [5, 6], [7, 8, 9, 10], []]


def written(folder: Path, chunks: list[list[list[int]]]) -> Path:
    path = folder / "lists.arrow"
    with TokenListWriter(path) as writer:
        for chunk in chunks:
            writer.write(pa.array(chunk, pa.list_(pa.int32())))
    return path


@pytest.mark.parametrize("cuts", [[], [1], [2, 2, 5], [0, 6]], ids=str)
def test_lists_come_back_however_they_were_cut(cuts: list[int], tmp_path: Path) -> None:
    chunks = [LISTS[start:end] for start, end in zip([0, *cuts], [*cuts, len(LISTS)], strict=True)]
    for found in (map_token_lists(written(tmp_path, chunks)), TokenLists.of(LISTS)):
        assert len(found) == len(LISTS)
        assert [found[place].tolist() for place in range(len(found))] == LISTS
        for outside in (-1, len(LISTS)):
            with pytest.raises(IndexError):
                found[outside]


def test_a_slice_is_written_without_what_it_was_cut_from(tmp_path: Path) -> None:
    many = pa.array([[0] * 10_000, [7], [0] * 10_000], pa.list_(pa.int32()))
    path = tmp_path / "lists.arrow"
    with TokenListWriter(path) as writer:
        writer.write(many.slice(1, 1))
    assert map_token_lists(path)[0].tolist() == [7]
    assert path.stat().st_size < 2_000


def test_lists_may_sum_to_more_than_an_offset_holds() -> None:
    """Three times the same 2^30 tokens of memory: 32-bit offsets into all of them would end before."""
    values = np.zeros(2**30, dtype=np.int8)
    lists = TokenLists([(values, np.array([0, 2**30 - 2, 2**30]))] * 3)
    assert len(lists[4]) == 2**30 - 2
    assert len(lists[5]) == 2


def test_columns_are_mapped_and_not_copied(tmp_path: Path) -> None:
    columns = {"place": np.arange(5), "weight": np.linspace(0, 1, 5), "name": pa.array(list("abcde"))}
    write_columns(tmp_path / "rows.arrow", columns)
    before = pa.total_allocated_bytes()
    found = map_columns(tmp_path / "rows.arrow")
    assert pa.total_allocated_bytes() == before
    assert {name: column.to_pylist() for name, column in found.items()} == {
        name: list(column.to_pylist() if isinstance(column, pa.Array) else column.tolist())
        for name, column in columns.items()
    }


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, [LISTS])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptArtifactError, match=r"lists\.arrow cannot be read.*; remove "):
        map_token_lists(path)


def test_a_folder_is_whole_once_sealed_as_it_was_written_and_of_the_same_key(tmp_path: Path) -> None:
    folder = MappedFolder(tmp_path / "mapped", {"samples": "a", "share": 0.1})
    with folder.lock():
        path = written(folder.folder, [LISTS])
        assert not folder.is_whole()
        folder.seal()
        assert folder.is_whole()
    assert not MappedFolder(folder.folder, {"samples": "b", "share": 0.1}).is_whole()
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert not folder.is_whole()
    path.write_bytes(content)
    assert folder.is_whole()
    lists = map_token_lists(path)
    folder.clear()
    assert [one.name for one in folder.folder.iterdir()] == [".lock"]
    remove_mapped(folder.folder)
    assert not folder.folder.exists()
    assert lists[4].tolist() == LISTS[4]  # what is mapped is read although its file is gone
