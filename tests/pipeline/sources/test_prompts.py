import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import PromptSettings
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import PROMPTS
from pipeline.sources.prompts import PromptRow, build_prompt_table, hash_split, limit_prompts, read_prompts


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSettings(source=str(path))


def many(n):
    return [{"prompt": f"question {i}"} for i in range(n)]


def test_texts_and_messages_from_json_lines_and_parquet(tmp_path):
    rows = many(40)
    from_json, _ = read_prompts(write_jsonl(tmp_path / "p.jsonl", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    from_parquet, _ = read_prompts(PromptSettings(source=str(tmp_path / "p.parquet")))
    messages = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    from_messages, _ = read_prompts(write_jsonl(tmp_path / "m.jsonl", messages))
    columns = ["prompt_id", "prompt", "split"]
    assert from_json.select(columns) == from_parquet.select(columns) == from_messages.select(columns)
    assert from_json.schema == PROMPTS


def test_the_split_of_a_prompt_never_moves(tmp_path):
    first, _ = read_prompts(write_jsonl(tmp_path / "a.jsonl", many(200)))
    second, _ = read_prompts(write_jsonl(tmp_path / "b.jsonl", list(reversed(many(300)))))
    splits = dict(zip(second["prompt_id"].to_pylist(), second["split"].to_pylist(), strict=True))
    assert all(splits[row["prompt_id"]] == row["split"] for row in first.to_pylist())
    share = first["split"].to_pylist().count("test") / 200
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 200) ** 0.5


def test_a_stored_split_and_category_are_taken(tmp_path):
    rows = [{"prompt": f"q{i}", "fold": "test" if i % 2 else "train", "topic": f"t{i}"} for i in range(4)]
    settings = write_jsonl(tmp_path / "p.jsonl", rows).model_copy(
        update={"split_column": "fold", "category_column": "topic"}
    )
    table, _ = read_prompts(settings)
    assert table["split"].to_pylist() == ["train", "test", "train", "test"]
    assert table["category"].to_pylist() == ["t0", "t1", "t2", "t3"]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([*many(40), {"prompt": "question 3"}], {}, r"1 duplicate prompts \('question 3'\)"),
        ([{"prompt": "a", "fold": "train"}], {"split_column": "fold"}, r"has no test prompts \(1 in all\)"),
        ([{"prompt": "a", "fold": "test"}], {"split_column": "fold"}, r"has no train prompts"),
        (
            [{"prompt": "a", "fold": "valid"}],
            {"split_column": "fold"},
            r"split 'valid'; it must be one of train, test",
        ),
        (
            many(3),
            {"prompt_column": "text"},
            r"`prompts\.prompt_column` is 'text', but .* has the columns \['prompt'\]",
        ),
        (many(3), {"category_column": "topic"}, r"`prompts\.category_column` is 'topic'"),
        (
            [{"prompt": []}],
            {"system": "be brief"},
            r"row 0: the prompt is \[\]; it must be a non-empty text or a list",
        ),
        ([{"prompt": "  "}], {}, r"row 0: the prompt is '  '; it must be a non-empty text"),
        ([{"prompt": [{"role": "user"}]}], {}, r"`role` and `content` must be strings"),
    ],
)
def test_malformed_prompts_are_named(tmp_path, rows, changes, message):
    settings = write_jsonl(tmp_path / "p.jsonl", rows).model_copy(update=changes)
    with pytest.raises(InputError, match=message):
        read_prompts(settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no such file or folder, and it is not a Hub id"),
        ("p.txt", "x", r"must end in one of \.parquet, \.pq, \.csv, \.jsonl, \.ndjson, \.json"),
        ("p.parquet", "not parquet", "cannot be read"),
        ("p.jsonl", "{", "cannot be read"),
    ],
)
def test_files_that_are_not_prompts(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(PromptSettings(source=str(tmp_path / name)))


def test_hash_split_follows_its_share():
    messages = [[{"role": "user", "content": str(i)}] for i in range(1000)]
    assert all(hash_split(m, 1e-12) == "train" for m in messages)
    assert all(hash_split(m, 1 - 1e-12) == "test" for m in messages)
    nested = {i for i, m in enumerate(messages) if hash_split(m, 0.1) == "test"}
    assert nested < {i for i, m in enumerate(messages) if hash_split(m, 0.3) == "test"}


def test_given_prompts_keep_their_order():
    table, repeated = build_prompt_table(
        [
            PromptRow([{"role": "user", "content": text}], split, "c")
            for text, split in (("b", "test"), ("a", "train"))
        ],
        source="here",
    )
    assert [row["prompt"][0]["content"] for row in table.to_pylist()] == ["b", "a"]
    assert repeated == 0


def test_csv_a_system_message_and_repeated_prompts(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("question,topic\n" + "".join(f'"what, {i}?",{i % 2}\n' for i in [*range(40), 3, 4, 3]))
    settings = PromptSettings(
        source=str(path), prompt_column="question", category_column="topic", system="be brief", repeated="drop"
    )
    table, repeated = read_prompts(settings)
    assert (table.num_rows, repeated) == (40, 3)
    row = table.to_pylist()[3]
    assert row["prompt"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what, 3?"}]
    assert row["category"] == "1"
    plain, _ = read_prompts(settings.model_copy(update={"system": None}))
    assert not set(plain["prompt_id"].to_pylist()) & set(table["prompt_id"].to_pylist())
    own = [{"prompt": [{"role": "system", "content": "mine"}, {"role": "user", "content": str(i)}]} for i in range(40)]
    kept, _ = read_prompts(write_jsonl(tmp_path / "s.jsonl", own).model_copy(update={"system": "other"}))
    assert {row["prompt"][0]["content"] for row in kept.to_pylist()} == {"mine"}


def test_a_repeated_prompt_in_both_splits_is_refused_even_where_repeats_are_dropped(tmp_path):
    rows = [{"prompt": "q", "fold": "train"}, {"prompt": "q", "fold": "test"}]
    settings = write_jsonl(tmp_path / "p.jsonl", rows)
    settings = settings.model_copy(update={"split_column": "fold", "repeated": "drop"})
    with pytest.raises(InputError, match="'q' is in both splits"):
        read_prompts(settings)


def test_a_folder_that_datasets_reads_with_and_without_its_own_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, rows in (("train", many(5)), ("test", [{"prompt": "held out"}]), ("validation", [{"prompt": "v"}])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet")
    table, _ = read_prompts(PromptSettings(source=str(folder)))
    splits = {row["prompt"][0]["content"]: row["split"] for row in table.to_pylist()}
    assert splits == {**{f"question {i}": "train" for i in range(5)}, "held out": "test"}
    mapped, _ = read_prompts(
        PromptSettings(source=str(folder), dataset_splits={"train": "test", "validation": "train"})
    )
    assert sorted(mapped["split"].to_pylist()) == ["test"] * 5 + ["train"]
    with pytest.raises(InputError, match=r"names 'dev', but .* has the splits \['test', 'train', 'validation'\]"):
        read_prompts(PromptSettings(source=str(folder), dataset_splits={"dev": "train"}))


def test_a_data_set_of_the_hub_needs_a_revision():
    with pytest.raises(InputError, match=r"on the Hub; give its `prompts\.revision` too"):
        read_prompts(PromptSettings(source="somebody/some-prompts"))


def test_a_limit_takes_the_first_by_hash_of_each_split_and_a_larger_one_adds(tmp_path):
    whole, _ = read_prompts(write_jsonl(tmp_path / "a.jsonl", many(300)))
    assert limit_prompts(whole, None) is whole
    shuffled, _ = read_prompts(write_jsonl(tmp_path / "b.jsonl", list(reversed(many(300)))))
    chosen = {}
    for limit in (1, 7, 20):
        table = limit_prompts(whole, limit)
        assert {split: table["split"].to_pylist().count(split) for split in ("train", "test")} == {
            "train": limit,
            "test": limit,
        }
        chosen[limit] = set(table["prompt_id"].to_pylist())
        assert chosen[limit] == set(limit_prompts(shuffled, limit)["prompt_id"].to_pylist())
        for split in ("train", "test"):
            ids = sorted(row["prompt_id"] for row in whole.to_pylist() if row["split"] == split)
            assert set(ids[:limit]) <= chosen[limit]
    assert chosen[1] < chosen[7] < chosen[20]
    assert limit_prompts(whole, 10_000) == whole
    order = limit_prompts(whole, 20)["prompt_id"].to_pylist()
    assert order == [prompt for prompt in whole["prompt_id"].to_pylist() if prompt in chosen[20]]
