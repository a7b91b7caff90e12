import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import PromptSettings
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import PROMPTS
from pipeline.prompts import build_prompt_table, hash_split, read_prompts


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSettings(source=str(path))


def many(n):
    return [{"prompt": f"question {i}"} for i in range(n)]


def test_texts_and_messages_from_json_lines_and_parquet(tmp_path):
    rows = many(40)
    from_json = read_prompts(write_jsonl(tmp_path / "p.jsonl", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    from_parquet = read_prompts(PromptSettings(source=str(tmp_path / "p.parquet")))
    messages = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    from_messages = read_prompts(write_jsonl(tmp_path / "m.jsonl", messages))
    columns = ["prompt_id", "prompt", "split"]
    assert from_json.select(columns) == from_parquet.select(columns) == from_messages.select(columns)
    assert from_json.schema == PROMPTS


def test_the_split_of_a_prompt_never_moves(tmp_path):
    first = read_prompts(write_jsonl(tmp_path / "a.jsonl", many(200)))
    second = read_prompts(write_jsonl(tmp_path / "b.jsonl", list(reversed(many(300)))))
    splits = dict(zip(second["prompt_id"].to_pylist(), second["split"].to_pylist(), strict=True))
    assert all(splits[row["prompt_id"]] == row["split"] for row in first.to_pylist())
    share = first["split"].to_pylist().count("test") / 200
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 200) ** 0.5


def test_a_stored_split_and_category_are_taken(tmp_path):
    rows = [{"prompt": f"q{i}", "fold": "test" if i % 2 else "train", "topic": f"t{i}"} for i in range(4)]
    settings = write_jsonl(tmp_path / "p.jsonl", rows).model_copy(
        update={"split_column": "fold", "category_column": "topic"}
    )
    table = read_prompts(settings)
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
        ("missing.jsonl", None, "there is no such file"),
        ("p.txt", "x", "must end in .parquet, .jsonl or .json"),
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
    table = build_prompt_table(
        [([{"role": "user", "content": text}], split, "c") for text, split in (("b", "test"), ("a", "train"))],
        source="here",
    )
    assert [row["prompt"][0]["content"] for row in table.to_pylist()] == ["b", "a"]
