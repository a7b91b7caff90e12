"""Tables of scores as other writers leave them: each is solved rightly, or refused with file, column and rule.

``docs/faults.md`` lists the cases; each is one test here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dualign
import pipeline.dual.from_table
import stage1_dual.dual.on_disk
from dualign import SolveResult
from pipeline.cli import main

pytestmark = pytest.mark.slow

ASKED = ["--reward", "r", "--constraint", "g >= ref + 0.3", "--beta", "1", "--no-progress"]
_RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "prompt_id": np.repeat([f"p{i:02d}" for i in range(40)], 16),
        "sample_index": np.tile(np.arange(16), 40),
        "r": _RNG.normal(size=640),
        "g": _RNG.normal(size=640),
    }
)
SPLIT = FRAME.assign(split=np.repeat(["train", "test"] * 20, 16))


def run(table: Path, output: Path, *more: str, command: str = "solve", asked: list[str] = ASKED) -> int:
    return main([command, "--table", str(table), "--output", str(output), *asked, *more])


def solve(table: Path) -> SolveResult:
    return dualign.solve(table, reward="r", constraints=["g >= ref + 0.3"], beta=1.0)


def multiplier(result: SolveResult) -> float:
    return result.multipliers["g"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """lambda* of the frames, from plain Parquet with the responses in order."""
    folder = tmp_path_factory.mktemp("expected")
    found = {}
    for name, frame in (("plain", FRAME), ("split", SPLIT)):
        frame.to_parquet(folder / f"{name}.parquet")
        found[name] = multiplier(solve(folder / f"{name}.parquet"))
    assert found["plain"] != pytest.approx(found["split"], abs=1e-4)
    return found


def by_pandas(folder: Path) -> Path:
    SPLIT.to_parquet(folder / "hive", partition_cols=["split"])
    return folder / "hive"


def by_duckdb(folder: Path) -> Path:
    connection = duckdb.connect()
    connection.register("scores", SPLIT)
    connection.execute(f"COPY scores TO '{folder / 'hive'}' (FORMAT parquet, PARTITION_BY (split))")
    return folder / "hive"


def by_prompt(folder: Path) -> Path:
    """Every prompt a folder, numbered: the ids are integers."""
    frame = SPLIT.assign(prompt_id=SPLIT["prompt_id"].str[1:].astype(int))
    frame.to_parquet(folder / "hive", partition_cols=["split", "prompt_id"])
    return folder / "hive"


def as_spark_leaves_it(folder: Path) -> Path:
    for split, rows in SPLIT.groupby("split"):
        inside = folder / "spark" / f"split={split}"
        inside.mkdir(parents=True)
        for place, half in enumerate((rows.iloc[:160], rows.iloc[160:])):
            name = f"part-{place:05d}-c000.snappy.parquet"
            half.drop(columns="split").to_parquet(inside / name)
            (inside / f".{name}.crc").write_bytes(b"crc\0")
    (folder / "spark" / "_SUCCESS").touch()
    (folder / "spark" / "._SUCCESS.crc").write_bytes(b"crc\0")
    pq.write_metadata(pa.schema([("prompt_id", pa.string())]), folder / "spark" / "_common_metadata")
    return folder / "spark"


@pytest.mark.parametrize("write", [by_pandas, by_duckdb, by_prompt, as_spark_leaves_it])
def test_folders_of_partitions_are_columns(tmp_path: Path, write: Callable[[Path], Path], expected: dict) -> None:
    result = solve(write(tmp_path))
    assert multiplier(result) == pytest.approx(expected["split"], abs=1e-10)
    assert (result.dual["n_samples"], result.dual["diagnostics"]["heldout_prompts"]) == (320, 20)
    assert result.weights["split"].to_pylist().count("test") == 320


def in_parts(folder: Path) -> Path:
    """Names in capitals, a short suffix, a folder that is a link, and a note beside them."""
    (folder / "table").mkdir()
    (folder / "elsewhere").mkdir()
    FRAME.iloc[:300].to_parquet(folder / "table" / "A.PARQUET")
    FRAME.iloc[300:400].to_parquet(folder / "table" / "b.pq")
    FRAME.iloc[400:].to_parquet(folder / "elsewhere" / "c.parquet")
    (folder / "table" / "more").symlink_to(folder / "elsewhere", target_is_directory=True)
    (folder / "table" / "README.md").write_text("scores")
    FRAME.iloc[:16].to_parquet(folder / "table" / "_old.parquet")
    return folder / "table"


def test_whatever_is_in_a_folder_is_read_or_named(tmp_path: Path, expected: dict) -> None:
    result = solve(in_parts(tmp_path))
    assert multiplier(result) == pytest.approx(expected["plain"], abs=1e-10)
    assert result.dual["n_samples"] == 640
    assert result.dual["warnings"][0].endswith("2 names in it are not read as data ('README.md', '_old.parquet')")


TEXTS: dict[str, Callable[[Path], None]] = {
    "scores.csv": lambda path: FRAME.to_csv(path, index=False),
    "mark.csv": lambda path: FRAME.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n"),
    "mac.csv": lambda path: FRAME.to_csv(path, index=False, lineterminator="\r"),
    "comments.csv": lambda path: FRAME.assign(note='a, "quoted"\nline').to_csv(path, index=False),
    "scores.CSV": FRAME.to_csv,  # with the index, in a column without a name
    "scores.jsonl": lambda path: FRAME.to_json(path, orient="records", lines=True, double_precision=15),
    "scores.ndjson": lambda path: FRAME.assign(note=[None, "x"] * 320).to_json(
        path, orient="records", lines=True, double_precision=15
    ),
    "scores.json": lambda path: FRAME.to_json(path, orient="records", double_precision=15),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_formats_give_what_parquet_gives(tmp_path: Path, name: str, expected: dict) -> None:
    TEXTS[name](tmp_path / name)
    assert multiplier(solve(tmp_path / name)) == pytest.approx(expected["plain"], abs=1e-9)


def test_ids_of_digits_stay_texts_in_csv(tmp_path: Path, expected: dict) -> None:
    """``007`` and ``7`` are two prompts, and none of them is a number."""
    names = {f"p{i:02d}": f"{i:03d}" if i < 20 else str(i - 20) for i in range(40)}
    FRAME.assign(prompt_id=FRAME["prompt_id"].map(names)).to_csv(tmp_path / "t.csv", index=False)
    result = solve(tmp_path / "t.csv")
    assert (result.dual["n_prompts"], multiplier(result)) == (40, pytest.approx(expected["plain"], abs=1e-9))
    ids = result.weights["prompt_id"].to_pylist()
    assert ids[:16] == ["000"] * 16
    assert ids[-16:] == ["19"] * 16


COLUMN_TYPES = {
    "decimal": lambda table: table["g"].cast(pa.decimal128(20, 6), safe=False),
    "half": lambda table: table["g"].cast(pa.float16(), safe=False),
    "single": lambda table: table["g"].cast(pa.float32()),
    "dictionary": lambda table: table["g"].dictionary_encode(),
}


@pytest.mark.parametrize("kind", COLUMN_TYPES)
def test_numbers_of_every_kind(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pandas(FRAME)
    column = COLUMN_TYPES[kind](table)
    pq.write_table(table.set_column(3, "g", column), tmp_path / "t.parquet")
    FRAME.assign(g=np.array([float(value) for value in column.to_pylist()])).to_parquet(tmp_path / "same.parquet")
    found, same = (multiplier(solve(tmp_path / f"{name}.parquet")) for name in ("t", "same"))
    assert found == pytest.approx(same, abs=1e-12)


def write(frame: pd.DataFrame) -> Callable[[Path], Path]:
    def to(folder: Path) -> Path:
        frame.to_parquet(folder / "t.parquet", index=False)
        return folder / "t.parquet"

    return to


def write_table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], Path]:
    def to(folder: Path) -> Path:
        pq.write_table(change(pa.Table.from_pandas(FRAME)), folder / "t.parquet")
        return folder / "t.parquet"

    return to


def write_folder(**files: pd.DataFrame | bytes) -> Callable[[Path], Path]:
    def to(folder: Path) -> Path:
        for name, content in files.items():
            path = folder / "table" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.to_parquet(path, index=False)
        return folder / "table"

    return to


def write_text(name: str, content: bytes) -> Callable[[Path], Path]:
    def to(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return to


def linked_to_itself(folder: Path) -> Path:
    write_folder(a_DOT_parquet=FRAME)(folder)
    (folder / "table" / "again").symlink_to(folder / "table", target_is_directory=True)
    return folder / "table"


HEAD = b"prompt_id,r,g\n"
FIRST, SECOND = FRAME.iloc[:320], FRAME.iloc[320:]
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a key twice": (
        write(pd.concat([FRAME, FRAME[:200]])),
        "200 rows are of responses that are there before (by 'prompt_id' and 'sample_index': 'p00' 0, 'p00' 1, ",
    ),
    "a key twice, shuffled": (
        write(pd.concat([FRAME, FRAME[-2:]]).sample(frac=1, random_state=0)),
        "2 rows are of responses that are there before (by 'prompt_id' and 'sample_index': 'p39' 1",
    ),
    "a prompt in both splits": (
        write(SPLIT.assign(split=["test" if i == 3 else split for i, split in enumerate(SPLIT["split"])])),
        "1 prompts are in both splits, train and test (column 'prompt_id': 'p00')",
    ),
    "a prompt twice, with lists": (
        write_table(lambda _: pa.table({"prompt_id": ["a", "b", "a"], "r": [[0.0, 1.0]] * 3, "g": [[0.0, 2.0]] * 3})),
        "2 rows are of responses that are there before (by 'prompt_id' and its place in the lists: 'a' 0, 'a' 1)",
    ),
    "an index beside lists": (
        write_table(lambda _: pa.table({"prompt_id": ["a"], "r": [[0.0]], "g": [[0.0]], "sample_index": [3]})),
        "column 'sample_index' beside lists of scores",
    ),
    "no such split": (write(SPLIT.assign(split="Train")), "no row of the split 'train'; its splits are 'Train'"),
    "rows without a split": (
        write(SPLIT.assign(split=[None, *SPLIT["split"][1:]])),
        "column 'split' has 1 empty values (first rows: [0])",
    ),
    "a split of numbers": (write(SPLIT.assign(split=1)), "column 'split' is of type int64; a split is a text"),
    "files named after splits": (
        write_folder(train_DOT_parquet=FIRST, test_DOT_parquet=SECOND),
        "files named after several splits (test.parquet, train.parquet) and no column 'split'",
    ),
    "shards of different types": (
        write_folder(a_DOT_parquet=FIRST, b_DOT_parquet=SECOND.assign(g="high")),
        "b.parquet: column 'g' is of type string, in ",
    ),
    "ids of different types": (
        write_folder(a_DOT_parquet=FIRST, b_DOT_parquet=SECOND.assign(prompt_id=7)),
        "b.parquet: column 'prompt_id' is of type int64, in ",
    ),
    "a shard without a column": (
        write_folder(a_DOT_parquet=FIRST, b_DOT_parquet=SECOND.drop(columns="g")),
        "b.parquet has no column 'g'",
    ),
    "a shard without a split": (
        write_folder(a_DOT_parquet=FIRST.assign(split="train"), b_DOT_parquet=SECOND),
        "a.parquet has a column 'split' and ",
    ),
    "a copied shard": (
        write_folder(
            a_DOT_parquet=FIRST.drop(columns="sample_index"), b_DOT_parquet=FIRST.drop(columns="sample_index")
        ),
        "b.parquet is a copy of ",
    ),
    "an empty shard": (write_folder(a_DOT_parquet=FIRST, b_DOT_parquet=b""), "b.parquet cannot be read: "),
    "files of several formats": (
        write_folder(a_DOT_parquet=FIRST, b_DOT_csv=HEAD),
        "holds tables of several formats (a.parquet and b.csv)",
    ),
    "a packed file": (write_folder(a_DOT_parquet=FIRST, b_DOT_csv_DOT_gz=b"x"), "holds b.csv.gz, which may be data"),
    "an unfinished file": (
        write_folder(a_DOT_parquet=FIRST, b_DOT_parquet_DOT_tmp=b"x"),
        "holds b.parquet.tmp, which may be data",
    ),
    "a Delta table": (
        write_folder(a_DOT_parquet=FIRST, _delta_log__0_DOT_json=b"{}"),
        "holds _delta_log: it is a Delta Lake table",
    ),
    "an unfinished write": (write_folder(_temporary__0_DOT_parquet=b""), "whose writer has not finished"),
    "a folder of notes": (write_folder(README_DOT_md=b"x"), "holds no table: names must end in one of .parquet, .pq"),
    "a link into itself": (linked_to_itself, "are the same; its rows would count twice"),
    "uneven partitions": (
        write_folder(**{"a=1__x_DOT_parquet": FIRST, "y_DOT_parquet": SECOND}),
        "lies in folders of no column",
    ),
    "a column in file and folder": (
        write_folder(**{"split=train__x_DOT_parquet": FIRST.assign(split="test")}),
        "has the column 'split', and so has the name of its folder",
    ),
    "another suffix": (write_text("t.tsv", b"a\tb\n"), "its name must end in one of .parquet, .pq, .csv, .jsonl"),
    "a column twice": (
        write_table(lambda table: table.append_column("g", table["r"])),
        "has the column 'g' twice",
    ),
    "empty Parquet": (write(FRAME[:0]), "has no rows"),
    "no bytes": (write_text("t.csv", b""), "has no column 'prompt_id'"),
    "a line of names alone": (write_text("t.csv", HEAD), "has no rows"),
    "one prompt": (write(FRAME[:16]), "has 1 prompt to solve on"),
    "whole numbers float64 cannot tell apart": (
        write(FRAME.assign(g=2**60 + np.arange(640))),
        "column 'g' has 640 whole numbers beyond 2^53 (row 0: 1152921504606846976)",
    ),
    "unsigned beyond": (
        write(FRAME.assign(g=np.full(640, 2**64 - 1, np.uint64))),
        "column 'g' has 640 whole numbers beyond 2^53",
    ),
    "true and false": (write(FRAME.assign(g=FRAME["g"] > 0)), "column 'g' is of type bool; a score must be a number"),
    "bytes as ids": (
        write(FRAME.assign(prompt_id=FRAME["prompt_id"].str.encode("utf-8"))),
        "column 'prompt_id' is of type binary; an id must be text or an integer",
    ),
    "ids that are nothing": (
        write(FRAME.assign(prompt_id=None)),
        "column 'prompt_id' is of type null; an id must be text or an integer",
    ),
    "text that is not UTF-8": (
        write_table(
            lambda table: table.set_column(
                0,
                "prompt_id",
                pa.Array.from_buffers(
                    pa.string(),
                    640,
                    pa.array([b"\xff"] * 640).buffers(),
                ),
            )
        ),
        "t.parquet: a text is not UTF-8",
    ),
    "an empty list": (
        write_table(lambda _: pa.table({"prompt_id": ["a", "b"], "r": [[0.0], []], "g": [[0.0], []]})),
        "row 1 has 0 scores in 'r'",
    ),
    "a hole in a list": (
        write_table(lambda _: pa.table({"prompt_id": ["a", "b"], "r": [[0.0], [None]], "g": [[0.0], [1.0]]})),
        "column 'r' has 1 empty values (first rows: [1])",
    ),
    "a text among numbers": (write_text("t.csv", HEAD + b"a,1,2\nb,x,1\n"), "column 'r', row 1 is 'x', which is not"),
    "a decimal comma": (
        write_text("t.csv", HEAD + b'a,"1,5",2\n'),
        "column 'r', row 0 is '1,5', which is not a number",
    ),
    "a number that is missing": (write_text("t.csv", HEAD + b"a,1,NA\n"), "column 'g' has 1 empty values"),
    "not finite": (
        write_text("t.csv", HEAD + b"a,1,inf\n"),
        "column 'g' has 1 values that are not finite (row 0: inf)",
    ),
    "a row that is too long": (write_text("t.csv", HEAD + b"a,1,2,3\n"), "line 2 ends a row of 4 fields; the first"),
    "quotes that stay open": (
        write_text("t.csv", HEAD + b'"a,1,2\n'),
        "cannot be read: line 2: unexpected end of data",
    ),
    "names twice in CSV": (write_text("t.csv", b"prompt_id,r,g,g\na,1,2,3\n"), "the column 'g' is there twice"),
    "Latin-1": (
        write_text("t.csv", HEAD + "a,1,2\ncafé,1,2\n".encode("latin-1")),
        "line 3 is not UTF-8: byte 4 of it is 0xe9; write the file as UTF-8",
    ),
    "UTF-16": (write_text("t.csv", "prompt_id,r,g\n".encode("utf-16")), "(it looks like UTF-16)"),
    "JSON of two kinds": (
        write_text("t.jsonl", b'{"prompt_id": "a", "r": 1, "g": 2}\n{"prompt_id": 7, "r": 1, "g": 2}\n'),
        "column 'prompt_id', row 1 is of another kind (number) than row 0 (text)",
    ),
    "no JSON": (write_text("t.jsonl", b'{"prompt_id": "a"}\n{"prompt_id":\n'), "line 2 is not JSON"),
    "deep JSON": (write_text("t.jsonl", b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "line 1 is nested too deeply"),
    "a key twice in JSON": (write_text("t.jsonl", b'{"r": 1, "r": 2}\n'), "the key 'r' is there twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_solved_rightly_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, message = REFUSED[case]
    table = make(tmp_path)
    assert run(table, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(table) in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*"))


ASKED_WRONGLY: dict[str, tuple[list[str], str]] = {
    "an id called weight": (
        ["--prompt-id", "weight"],
        "weights.parquet has columns sample_index, weight, split of its",
    ),
    "an id called sample_index": (["--prompt-id", "sample_index"], "weights.parquet has columns sample_index, weight"),
    "an id called split": (["--prompt-id", "split"], "weights.parquet has columns sample_index, weight, split"),
    "an id that is a score": (["--prompt-id", "g"], "the prompt's id is 'g', which is a score too"),
    "a reward that does not show": (["--reward", "r\n"], "the reward is 'r\\n': a name has no characters that do not"),
    "a negative seed": (["--seed", "-1"], "the seed is -1; it must not be negative"),
    "a beta beyond float64": (["--beta", "1e300"], "beta is of the size 1e+300"),
    "a beta below float64": (["--beta", "1e-300"], "beta is of the size 1e-300"),
    "a threshold beyond float64": (["--constraint", "h >= 1e200"], "no column 'h'"),
    "more constraints than can be": (
        [word for j in range(100_000) for word in ("--constraint", f"c{j} >= 0")],
        "100001 constraints are given; a problem has at most 100",
    ),
}


@pytest.mark.parametrize("case", ASKED_WRONGLY)
def test_what_cannot_be_asked_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options, message = ASKED_WRONGLY[case]
    FRAME.assign(weight=FRAME["prompt_id"]).to_parquet(tmp_path / "t.parquet")
    assert run(tmp_path / "t.parquet", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("case", ["a key twice", "a key twice, shuffled", "a prompt in both splits"])
@pytest.mark.parametrize("command", ["solve", "frontier"])
def test_keys_are_checked_on_disk_and_for_a_frontier(
    case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", 0)
    monkeypatch.setattr(stage1_dual.dual.on_disk, "_FILE_ROWS", 100)
    make, message = REFUSED[case]
    asked = [text.replace("0.3", "0.1:0.3:0.1") if command == "frontier" else text for text in ASKED]
    assert run(make(tmp_path), tmp_path / "out", command=command, asked=asked) == 2
    assert message.split("(")[0] in capsys.readouterr().err


def test_rows_in_any_order_with_an_index_are_no_repeats(tmp_path: Path, expected: dict) -> None:
    FRAME.sample(frac=1, random_state=1).to_parquet(tmp_path / "t.parquet")
    result = solve(tmp_path / "t.parquet")
    assert multiplier(result) == pytest.approx(expected["plain"], abs=1e-10)
    assert result.dual["warnings"] == []


@pytest.mark.parametrize("limit", [2**30, 0])
def test_without_an_index_equal_rows_are_counted_and_said(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", limit)
    pd.concat([FRAME, FRAME[:200]]).drop(columns="sample_index").to_parquet(tmp_path / "t.parquet")
    dual = solve(tmp_path / "t.parquet").dual
    assert dual["n_samples"] == 840
    assert "200 of 840 rows have the scores of an earlier row of their prompt" in dual["warnings"][0]


def test_rows_of_other_splits_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    split = np.repeat(["train", "test", "validation", "dev"] * 10, 16)
    FRAME.assign(split=split).to_parquet(tmp_path / "t.parquet")
    assert run(tmp_path / "t.parquet", tmp_path / "out", asked=ASKED[:-1]) == 0
    dual = json.loads((tmp_path / "out" / "dual.json").read_text())
    said = capsys.readouterr().err
    assert "160 rows of the split 'validation' are left out" in said
    assert "frontier: 100%" in said  # a sweep a constraint, and how many of them are done
    assert (dual["n_samples"], dual["diagnostics"]["heldout_prompts"]) == (160, 10)
    assert [warning.split(": ")[1] for warning in dual["warnings"][:2]] == [
        "160 rows of the split 'dev' are left out; train and test are read",
        "160 rows of the split 'validation' are left out; train and test are read",
    ]


@pytest.mark.parametrize("name", ["safety score", "harmless/v2", "安全", 'says "no"', "a >= b", "$\\alpha$", "1st"])
def test_columns_of_any_name(tmp_path: Path, name: str, expected: dict) -> None:
    FRAME.rename(columns={"g": name, "r": "how good?"}).to_parquet(tmp_path / "t.parquet")
    quoted = name.replace('"', '""')
    asked = ["--reward", "how good?", "--constraint", f'"{quoted}" >= ref + 0.3', "--beta", "1", "--no-progress"]
    assert run(tmp_path / "t.parquet", tmp_path / "out", "--reserve", f"{name}=0", asked=asked) == 0
    bound = json.loads((tmp_path / "out" / "dual.json").read_text())["constraints"][0]
    assert (bound["name"], bound["multiplier"]) == (name, pytest.approx(expected["plain"], abs=1e-10))
    frontier = pq.read_table(tmp_path / "out" / "frontier.parquet")
    assert f"multiplier_{name}" in frontier.column_names
    figures = [path.name for path in (tmp_path / "out" / "figures").iterdir()]
    assert len(figures) == 16  # four of them, as PNG, SVG, PDF and CSV
    assert all(figure.isascii() and " " not in figure for figure in figures)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (["g >= ref + 0:1:0.0000001"], "has 1e+07 steps; a frontier has at most 10000 points"),
        (["g >= 0:1:1e-320"], "has inf steps"),
        (["g >= 0:1:0.01", "h >= 0:1:0.01"], "10201 combinations; a frontier has at most 10000 points"),
        (["g >= 1:0:0.1"], "a range needs STEP > 0 and STOP >= START"),
        (["g >= a:b:c"], "is not three numbers START:STOP:STEP"),
    ],
)
def test_a_frontier_has_a_limit(
    tmp_path: Path, ranges: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    """Said before the table is looked at: there is none."""
    asked = ["--reward", "r", "--beta", "1", *(word for text in ranges for word in ("--constraint", text))]
    assert run(tmp_path / "none.parquet", tmp_path / "out", command="frontier", asked=asked) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "beta"),
    [
        (lambda frame: frame, "1e-5"),
        (lambda frame: frame.assign(g=np.where(frame.index == 0, 1e49, frame["g"])), "1"),
        (lambda frame: frame.assign(r=frame["r"] * 1e-49, g=frame["g"] * 1e48), "1e-49"),
    ],
)
def test_no_scaling_ends_in_a_raw_warning(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], beta: str
) -> None:
    """Warnings are errors here: whatever float64 cannot hold is unknown, and the solution certified all the same."""
    frame = change(FRAME)
    frame.to_parquet(tmp_path / "t.parquet")
    margin = 0.3 * float(frame["g"].std())
    result = dualign.solve(
        tmp_path / "t.parquet", reward="r", constraints=[f"g >= ref + {margin!r}"], beta=float(beta)
    )
    result.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dual.json").read_text())["status"] == "certified"
