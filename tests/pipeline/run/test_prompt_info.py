from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from helpers.tiny_runs import N_PROMPTS, dualign, rows_of, run_folder, write_recipe

from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import CorruptArtifactError, StaleArtifactError
from pipeline.contracts.shards import write_parquet
from pipeline.contracts.tables import INFO
from pipeline.run.prompt_info import claim_prompt_info, read_prompt_info, select_info

RULES = "def known(rows): return [row.info['answer'] + 0.1 * len(row.info) for row in rows]"


def _prompts(n: int = N_PROMPTS, **changed: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {k}", "topic": "t", "answer": k, "tests": [f"{k}"], **changed} for k in range(n)]


def _recipe(folder: Path, prompts: list[dict[str, Any]], **changes: Any) -> Path:
    (folder / "info_rules.py").write_text(RULES)
    known = {"kind": "python", "function": "info_rules:known", "info": ["answer"]}
    path = write_recipe(folder, prompts=prompts, scorers={"known": known})
    tree = yaml.safe_load(path.read_text())
    tree["prompts"] |= {"info_columns": ["answer", "tests"], **changes}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_columns_reach_a_scorer_and_may_not_change_under_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path, _prompts())
    for command in ("prepare", "sample", "score"):
        assert dualign(command, recipe) == 0
    folder = run_folder(recipe)
    questions = {row["prompt_id"]: row["prompt"][0]["content"] for row in rows_of_prompts(folder)}
    assert read_prompt_info(folder / "prompts")[next(iter(questions))].keys() == {"answer", "tests"}
    scores = rows_of(folder / "scores" / "known")
    assert {(questions[r["prompt_id"]], r["value"]) for r in scores} == {(f"question {k}", k + 0.1) for k in range(24)}
    assert len(scores) == 144
    before = read_manifest(folder / "scores" / "known").identity

    # More prompts are scored as they come; what is there stays.
    assert dualign("score", _recipe(tmp_path, _prompts())) == 0
    assert read_manifest(folder / "scores" / "known").identity == before
    for command in ("prepare", "sample", "score"):
        assert dualign(command, _recipe(tmp_path, _prompts(26))) == 0
    assert len(rows_of(folder / "scores" / "known")) == 156

    # Another value of a column that is read is refused, one of a column that is not is none of its business.
    for command in ("prepare", "sample", "score"):
        assert dualign(command, _recipe(tmp_path, _prompts(26, tests=[]))) == 0
    changed = _recipe(tmp_path, _prompts(26, answer=7))
    assert dualign("prepare", changed) == dualign("sample", changed) == 0
    capsys.readouterr()
    assert dualign("score", changed) == 2
    assert "`info` of 25 prompts" in capsys.readouterr().err


def rows_of_prompts(folder: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in (folder / "prompts" / "data").glob("*.parquet")
        for row in pa.parquet.read_table(path).to_pylist()
    ]


def test_faults_of_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, message in (
        ({"info_columns": ["tests"]}, "it reads the column 'answer' of the prompts"),
        ({"info_columns": ["answr", "answer"]}, "`prompts.info_columns` is 'answr', but "),
        ({"info_columns": ["answer"], "source": "embedded"}, "embedded world have no column 'answer'"),
    ):
        assert dualign("prepare", _recipe(tmp_path, _prompts(), **settings)) == 2
        assert message in capsys.readouterr().err, message


def test_what_is_no_object_of_json_is_damage(tmp_path: Path) -> None:
    assert read_prompt_info(tmp_path) == {}
    for text, message in (("[1]", "no JSON object"), ("{", "is not JSON")):
        table = pa.table({"prompt_id": ["p"], "info": [text]}, schema=INFO)
        write_parquet(tmp_path / "info.parquet", table, metadata={})
        with pytest.raises(CorruptArtifactError, match=message):
            read_prompt_info(tmp_path)


def test_claims(tmp_path: Path) -> None:
    claim_prompt_info(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    claim_prompt_info(tmp_path, {"p": {"a": 1}})
    claim_prompt_info(tmp_path, {"p": {"a": 1}, "q": {"a": 2}})
    claim_prompt_info(tmp_path, {"q": {"a": 2}})
    with pytest.raises(StaleArtifactError, match=r"of 1 prompts \(first: p\)"):
        claim_prompt_info(tmp_path, {"p": {"a": 2}})
    everything = {"p": {"a": 1, "b": 2}}
    assert select_info(everything, None) == everything
    assert select_info(everything, ("b",)) == {"p": {"b": 2}}
    assert select_info(everything, ()) == {}
