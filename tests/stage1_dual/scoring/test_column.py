from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import prompt_id
from stage1_dual.scoring.column import ColumnScorer
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest

PROMPTS = [[{"role": "user", "content": text}] for text in ("why?", "how?\nnow", "")]
ROWS = [
    ScoreRequest(prompt_id(prompt), k, prompt, f"answer {p}.{k}", columns={"sampler_logp": -1.5 * k})
    for p, prompt in enumerate(PROMPTS)
    for k in range(2)
]
NUMBERS = [0.25, -1.0, 3.0, 4.5, 1e-3, 7.0]


def by(
    prompt: Callable[[ScoreRequest], object], sample: Callable[[ScoreRequest], object], names: tuple[str, str]
) -> pa.Table:
    return pa.table(
        {names[0]: [prompt(row) for row in ROWS], names[1]: [sample(row) for row in ROWS], "quality": NUMBERS}
    )


TABLES = {
    "ids": by(lambda r: r.prompt_id, lambda r: r.sample_index, ("prompt_id", "sample_index")),
    "texts": by(lambda r: r.messages[0]["content"], lambda r: r.completion, ("prompt", "completion")),
    "messages": by(lambda r: list(r.messages), lambda r: r.sample_index, ("prompt", "sample_index")),
}


def write(table: pa.Table, path: Path) -> str:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    return str(path)


def values(results: Sequence[Score | RowFailure]) -> list[float | str]:
    return [result.values[0] if isinstance(result, Score) else result.reason for result in results]


@pytest.mark.parametrize(
    ("keys", "suffix"),
    [(keys, suffix) for keys in ("ids", "texts") for suffix in ("parquet", "csv", "jsonl")]
    + [("messages", "parquet")],
)
def test_scores_are_looked_up_by_key(tmp_path: Path, keys: str, suffix: str) -> None:
    table = write(TABLES[keys].take([5, 0, 3, 1, 4, 2]), tmp_path / f"scores.{suffix}")
    scorer = ColumnScorer("quality", table=table, affine=Affine(-1, 1.0))
    assert values(scorer.score(ROWS)) == [1.0 - number for number in NUMBERS]
    assert values(scorer.score(ROWS[::-1])) == [1.0 - number for number in NUMBERS[::-1]]


def test_a_prompt_is_known_by_its_last_message_too(tmp_path: Path) -> None:
    table = write(TABLES["texts"], tmp_path / "scores.parquet")
    messages = [{"role": "system", "content": "be brief"}, *PROMPTS[0]]
    row = ScoreRequest(prompt_id(messages), 0, messages, "answer 0.0")
    assert values(ColumnScorer("quality", table=table).score([row])) == [NUMBERS[0]]


def test_a_column_of_the_samples() -> None:
    scorer = ColumnScorer("sampler_logp", affine=Affine(-1))
    assert values(scorer.score(ROWS)) == [0.0, 1.5] * 3
    assert values(scorer.score([ScoreRequest("p", 0, PROMPTS[0], "")])) == ["the column 'sampler_logp' is None there"]


def test_rows_without_a_number_fail_alone(tmp_path: Path) -> None:
    numbers = pa.array([0.25, None, float("nan"), 4.5, 1e-3])
    table = write(TABLES["ids"].slice(0, 5).set_column(2, "quality", numbers), tmp_path / "scores.parquet")
    assert values(ColumnScorer("quality", table=table).score(ROWS)) == [
        0.25,
        "the column 'quality' is None there",
        "the column 'quality' is nan there",
        4.5,
        1e-3,
        f"{table} has no row of this prompt_id and sample_index",
    ]


def replace(name: str, values: Sequence[object]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values))


DAMAGE: Mapping[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "twice": (lambda table: pa.concat_tables([table, table.slice(1, 2)]), r"2 rows for samples .* \(first: row 6\)"),
    "no column": (lambda table: table.drop_columns("quality"), "`column` is 'quality'; .* has the columns"),
    "no prompt": (lambda table: table.drop_columns("prompt_id"), "has neither prompt_id nor prompt"),
    "no sample": (lambda table: table.drop_columns("sample_index"), "has neither sample_index nor completion"),
    "texts": (replace("quality", ["high"] * 6), "the column 'quality' holds string; a score is a number"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    with pytest.raises(InputError, match=message):
        ColumnScorer("quality", table=write(change(TABLES["ids"]), tmp_path / "scores.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.parquet", None, "there is no such file"),
        ("scores.parquet", b"PAR1 but not really", "cannot be read"),
        ("scores.xlsx", b"x", r"must end in one of \.parquet, \.pq, \.csv, \.jsonl, \.ndjson, \.json"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        ColumnScorer("quality", table=str(path))


def test_ids_and_texts_of_csv_are_what_was_written(tmp_path: Path) -> None:
    """``007``, a date and ``NA`` are texts; a number may be missing, and true is one."""
    rows = [ScoreRequest("007", 0, PROMPTS[0], "2024-01-01"), ScoreRequest("7", 1, PROMPTS[0], "NA")]
    path = tmp_path / "scores.csv"
    path.write_text("prompt_id,sample_index,quality\n007,0,1.5\n7,1,NA\n")
    assert values(ColumnScorer("quality", table=str(path)).score(rows)) == [1.5, "the column 'quality' is None there"]
    path.write_text("prompt_id,completion,quality\n007,2024-01-01,true\n7,NA,FALSE\n")
    assert values(ColumnScorer("quality", table=str(path)).score(rows)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            "prompt_id,sample_index,quality\na,0,high\n",
            r"row 0: the column 'quality' is 'high', which is not",
        ),
        ("t.csv", "prompt_id,sample_index,quality\na,first,1\n", r"row 0: the column 'sample_index' is 'first'"),
        ("t.jsonl", '{"prompt_id": "a", "sample_index": 0, "quality": "1"}', r"row 0: the column 'quality' holds '1'"),
        (
            "t.jsonl",
            '{"prompt": [{"from": "human", "value": "q"}], "sample_index": 0, "quality": 1}',
            r"row 0: a message has the keys",
        ),
    ],
)
def test_values_that_are_none_are_named_by_row(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        ColumnScorer("quality", table=str(tmp_path / name))
