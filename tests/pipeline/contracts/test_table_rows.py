"""One way to read each format: RFC 4180, JSON Lines and Parquet as real writers leave them."""

import csv
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.table_files import TableFile, file_format, find_table
from pipeline.contracts.table_rows import TableRows, integer_in, number_in

TEXTS = [
    "plain",
    "a, b",
    'say "no"',
    "two\nlines",
    "old\rMac",
    "DOS\r\nlines",
    "007",
    "2024-01-01",
    "NA",
    "null",
    "1e5",
]


def open_rows(path: Path) -> TableRows:
    return TableRows(TableFile(path, file_format(path, what="`prompts.source`"), {}), what="`prompts.source`")


def column(path: Path, name: str = "text") -> list:
    return open_rows(path).column(name)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_fields_come_back_as_they_were_written(tmp_path: Path, end: str, mark: str) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        stream.write(mark)
        writer = csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([["text", "id"], *([text, str(place)] for place, text in enumerate(TEXTS))])
    assert column(path) == TEXTS
    assert column(path, "id") == [str(place) for place in range(len(TEXTS))]


@pytest.mark.parametrize("writer", ["pandas", "pyarrow"])
def test_files_larger_than_a_readers_block(tmp_path: Path, writer: str) -> None:
    """5 MB with line breaks in quotes at every place, a field of 3 MB, and a number that turns into a text."""
    texts = ["line\n" * (place % 97) + str(place) for place in range(20_000)]
    texts[11] = 'x"\n' * 1_000_000
    marks = ["1"] * 19_999 + ["one"]
    path = tmp_path / "t.csv"
    if writer == "pandas":
        pd.DataFrame({"text": texts, "mark": marks}).to_csv(path, index=False)
    else:
        pyarrow.csv.write_csv(pa.table({"text": texts, "mark": marks}), path)
    assert path.stat().st_size > 5_000_000
    assert column(path) == texts
    assert column(path, "mark") == marks


def test_json_lines_keep_every_kind_of_value(tmp_path: Path) -> None:
    """Larger than a block; what is a list in one row and a text in the next, and a date that stays a text."""
    rows = [{"text": f"row {place} " + "y" * 100, "mark": place} for place in range(20_000)]
    rows += [{"text": "2024-01-01", "mark": "late"}, {"text": [{"role": "user", "content": "z"}], "new": 1.5}]
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode() + b"\r\n\r\n")
    assert path.stat().st_size > 2_000_000
    assert column(path) == [row["text"] for row in rows]
    assert column(path, "mark")[-2:] == ["late", None]
    assert open_rows(path).names == ["text", "mark", "new"]


def test_a_file_of_one_array(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert column(path) == ["a", "b"]


def test_a_parquet_file_in_a_folder_named_like_a_partition_has_its_own_columns(tmp_path: Path) -> None:
    folder = tmp_path / "split=train"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "a.b": [1]}), folder / "t.PQ")
    assert open_rows(folder / "t.PQ").names == ["text", "a.b"]
    assert column(folder / "t.PQ", "a.b") == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"text,text\na,b\n", "the column 'text' is there twice"),
        ("t.csv", b"text,id\na,b\nc\n", "line 3 ends a row of 1 fields; the first line has 2"),
        ("t.csv", b'text\n"open\n', "line 2: unexpected end of data"),
        ("t.csv", b'text,id\n"a"b,c\n', "line 2: ',' expected after '\"'"),
        ("t.csv", b"text\none\rtwo\nthree\n", "line 2 ends in a carriage return and line 1 in a line feed"),
        ("t.csv", b"text\nna\xefve\n", "line 2 is not UTF-8: byte 3 of it is 0xef"),
        ("t.csv", "text\na\n".encode("utf-16"), "looks like UTF-16"),
        ("t.jsonl", b'{"text": "na\xefve"}\n', "line 1 is not UTF-8: byte 13 of it is 0xef"),
        ("t.jsonl", b'{"text": 1}\n[1]\n', "line 2 holds '\\[1\\]'; it must be an object"),
        ("t.jsonl", b'{"text": 1', "line 1 is not JSON"),
        ("t.jsonl", b'{\n  "text": 1\n}\n', "line 1 is not JSON"),
        ("t.jsonl", b'{"text": 1, "text": 2}', "the key 'text' is there twice"),
        ("t.jsonl", b'{"text": "\\ud83d"}', "holds half of a surrogate pair"),
        ("t.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 is nested too deeply"),
        ("t.jsonl", b'{"text": ' + b"1" * 5_000 + b"}", "line 1 is not JSON: Exceeds the limit"),
        ("t.json", b'[{"text": 1}, 2]', "item 1 holds '2'"),
        ("t.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_is_malformed_is_named_by_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        column(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_numbers_of_text() -> None:
    assert [number_in(text, place="p") for text in ("1", " -2.5e3 ", "", "NA", "null")] == [
        1.0,
        -2500.0,
        None,
        None,
        None,
    ]
    assert [integer_in(text, place="p") for text in ("007", "3.0", "")] == [7, 3, None]
    for text in ("1_000", "1,5", "x", "0x10"):
        with pytest.raises(InputError, match="which is not a number"):
            number_in(text, place="row 3")
    for text in ("1.5", "inf", "1e300"):
        with pytest.raises(InputError, match="which is not a whole number"):
            integer_in(text, place="row 3")


def test_names_of_partitions_are_unquoted_and_their_gaps_are_empty(tmp_path: Path) -> None:
    for value in ("a%20b", "__HIVE_DEFAULT_PARTITION__"):
        folder = tmp_path / f"topic={value}"
        folder.mkdir()
        pq.write_table(pa.table({"text": ["x"]}), folder / "t.parquet")
    found = find_table(tmp_path, what="--table")
    assert [dict(file.partition) for file in found.files] == [{"topic": None}, {"topic": "a b"}]
