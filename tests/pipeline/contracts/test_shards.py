import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.shards import ShardedTable, count_parquet, iterate_parquet, write_table
from pipeline.contracts.tables import SCORES


def rows(prompt, indices, value=0.5):
    return pa.Table.from_pylist(
        [
            {"prompt_id": prompt, "sample_index": i, "value": value, "scored_sha256": "h", "truncated": False}
            for i in indices
        ],
        schema=SCORES,
    )


def keys(table, split="train", prompts=("a", "b", "c"), n_samples=3):
    grid = table.presence(split, PromptPlaces(prompts), n_samples=n_samples)
    return {(prompts[place], int(sample)) for place, sample in np.argwhere(grid)}


@pytest.fixture
def table(tmp_path):
    return ShardedTable(folder=tmp_path / "scores", schema=SCORES, metadata={"run": "r"})


def test_finishing_renames_shards_in_order_and_is_repeatable(table):
    table.write_shard(rows("b", [0, 1]), split="train", order="000001-x")
    table.write_shard(rows("a", [0]), split="train", order="000000-x")
    table.write_shard(rows("c", [0]), split="test", order="000000-x")
    files = table.finish()
    assert sorted(files) == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    assert table.read("train")["prompt_id"].to_pylist() == ["a", "b", "b"]
    assert table.finish() == files
    assert not (table.folder / "parts").exists()


def test_a_top_up_renumbers_without_losing_rows(table):
    table.write_shard(rows("a", [0]), split="train", order="000000-x")
    table.write_shard(rows("b", [0]), split="train", order="000001-x")
    table.finish()
    table.write_shard(rows("a", [1]), split="train", order="000000-y")
    files = table.finish()
    assert len(files) == 3
    assert keys(table) == {("a", 0), ("a", 1), ("b", 0)}
    assert len(list((table.folder / "data").iterdir())) == 3


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_between_the_renames_of_a_finish_loses_nothing(table, moved):
    """The state after a kill is some shards in data/ under final names and the rest in parts/."""
    for place in range(3):
        table.write_shard(rows("p", [place]), split="train", order=f"{place:06d}-x")
    (table.folder / "data").mkdir()
    for place in range(moved):
        path = table.folder / "parts" / f"train-{place:06d}-x.parquet"
        path.rename(table.folder / "data" / f"train-{place:05d}-of-00003.parquet")
    table.finish()
    assert table.read("train")["sample_index"].to_pylist() == [0, 1, 2]


def test_leftovers_of_a_killed_write_are_not_rows(table):
    table.write_shard(rows("a", [0]), split="train", order="000000-x")
    (table.folder / "parts" / ".train-000001-x.parquet.tmp123").write_bytes(b"half a shard")
    assert keys(table) == {("a", 0)}
    table.finish()
    assert not (table.folder / "parts").exists()


def test_two_shards_with_the_same_row_are_refused(table):
    table.write_shard(rows("a", [0, 1]), split="train", order="000000-x")
    table.write_shard(rows("a", [1, 2]), split="train", order="000001-x")
    with pytest.raises(CorruptArtifactError, match="repeats 1 rows"):
        keys(table)


def test_truncated_and_bit_flipped_shards_are_named(table):
    noisy = rows("a", range(2000)).set_column(2, "value", pa.array(np.random.default_rng(0).normal(size=2000)))
    path = table.write_shard(noisy.cast(SCORES), split="train", order="000000-x")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptArtifactError, match=path.name):
        table.read("train")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0x10]) + whole[middle + 1 :])
    with pytest.raises(CorruptArtifactError, match=path.name):
        table.read("train")


def test_a_file_is_read_a_row_group_at_a_time_with_the_same_checks(table):
    noisy = rows("a", range(9000)).set_column(2, "value", pa.array(np.random.default_rng(0).normal(size=9000)))
    path = table.write_shard(noisy.cast(SCORES), split="train", order="000000-x")
    columns = ["sample_index", "value"]
    groups = list(iterate_parquet(path, columns=columns, schema=SCORES))
    assert [group.num_rows for group in groups] == [4096, 4096, 808]
    assert pa.concat_tables(groups).equals(noisy.cast(SCORES).select(columns))
    with pytest.raises(CorruptArtifactError, match="has the columns"):
        list(iterate_parquet(path, columns=["value"], schema=pa.schema([pa.field("value", pa.int64())])))
    whole = path.read_bytes()
    path.write_bytes(whole[:20_000] + bytes([whole[20_000] ^ 0x10]) + whole[20_001:])
    with pytest.raises(CorruptArtifactError, match=path.name):
        list(iterate_parquet(path, columns=columns, schema=SCORES))


def test_values_of_lists_are_counted_in_the_footer(tmp_path):
    lists = pa.array([[1, 2], [3], [4, 5, 6]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"tokens": lists, "tokens_more": lists}), tmp_path / "a.parquet", row_group_size=2)
    assert count_parquet(tmp_path / "a.parquet", ["tokens"]) == (3, [6])
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptArtifactError, match="damaged or not Parquet"):
        count_parquet(tmp_path / "a.parquet", [])


def test_a_foreign_parquet_file_is_named(table):
    (table.folder / "parts").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), table.folder / "parts" / "train-0.parquet")
    with pytest.raises(CorruptArtifactError, match="not a shard of this project"):
        table.paths("train")


def test_a_file_with_other_columns_is_named(table, tmp_path):
    other = ShardedTable(folder=table.folder, schema=pa.schema([pa.field("value", pa.float32())]), metadata={})
    other.write_shard(pa.table({"value": pa.array([1.0], pa.float32())}), split="train", order="0")
    with pytest.raises(CorruptArtifactError, match="has the columns"):
        table.read("train")


def test_every_reader_users_have_reads_a_folder_as_it_is(tmp_path):
    """Explicit schemas: a shard whose list or text columns are all empty must not change type (datasets, pandas)."""
    schema = pa.schema([("prompt_id", pa.string()), ("ids", pa.list_(pa.int32())), ("split", pa.string())])
    table = pa.Table.from_pylist(
        [
            {"prompt_id": "a", "ids": [], "split": "train"},
            {"prompt_id": "b", "ids": [1], "split": "train"},
            {"prompt_id": "c", "ids": [], "split": "test"},
        ],
        schema=schema,
    )
    files = write_table(tmp_path / "t", table, metadata={"run": "r"}, rows_per_file=1)
    assert len(files) == 3
    loaded = load_dataset(str(tmp_path / "t"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["prompt_id"][:] == ["a", "b"]
    assert loaded["test"]["ids"][:] == [[]]
    frame = pd.read_parquet(tmp_path / "t" / "data")
    assert sorted(frame["prompt_id"]) == ["a", "b", "c"]
    counted = (
        duckdb.sql(f"select count(*) from '{tmp_path}/t/data/*.parquet' where split = 'train'").limit(1).fetchall()
    )
    assert counted == [(2,)]


def test_metadata_carries_schema_version_and_run(table):
    path = table.write_shard(rows("a", [0]), split="train", order="000000-x")
    metadata = pq.read_metadata(path).metadata
    assert metadata[b"dualign.run"] == b"r"
    assert metadata[b"dualign.schema_version"] == b"1"


def test_rows_of_other_prompts_and_later_samples_are_passed_over(table):
    table.write_shard(rows("a", [0, 2]), split="train", order="0")
    table.write_shard(rows("z", [0]), split="train", order="1")
    assert keys(table, n_samples=2) == {("a", 0)}
    assert keys(table, split="test") == set()


def test_places_are_found_in_plain_and_dictionary_columns():
    places = PromptPlaces(["b", "a", "c"])
    column = pa.chunked_array([["a", "x"], ["c", "b", "a"]])
    expected = [1, -1, 2, 0, 1]
    assert places.of(column).tolist() == expected
    assert places.of(column.dictionary_encode()).tolist() == expected
    assert places.of(pa.chunked_array([], pa.string())).tolist() == []
    with pytest.raises(InputError, match="2 prompts have 1 distinct ids"):
        PromptPlaces(["a", "a"])
