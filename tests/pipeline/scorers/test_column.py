from __future__ import annotations

from pathlib import Path

import pytest
from helpers.scorers import ROWS, check_faults, identity_of, scorer_groups, settings_faults, values_of, write_marks

from stage1_dual.scoring.protocol import ScoreRequest


def test_a_table_is_found_from_any_folder(
    score_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_marks(tmp_path).parent)
    settings = {"kind": "column", "column": "mark", "table": "scores.csv", "sign": -1}
    (group,) = scorer_groups(score_models, {"x": settings}, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert values_of(group.start()) == [(0.0,), (-1.0,), (-2.0,)]
    assert (group.reads, group.uses_device) == ((), False)


def test_a_column_of_the_samples_is_asked_for(score_models: dict[str, str], tmp_path: Path) -> None:
    (group,) = scorer_groups(score_models, {"x": {"kind": "column", "column": "sampler_logp"}}, tmp_path)
    assert group.reads == ("sampler_logp",)
    row = ScoreRequest(**{**vars(ROWS[0]), "columns": {"sampler_logp": -2.0}})
    assert values_of(group.start(), [row]) == [(-2.0,)]


def test_other_numbers_are_other_scores(score_models: dict[str, str], tmp_path: Path) -> None:
    path = write_marks(tmp_path)
    settings = {"kind": "column", "column": "mark", "table": str(path)}
    before = identity_of(score_models, settings, tmp_path)
    assert before == identity_of(score_models, settings, tmp_path)
    path.rename(tmp_path / "moved.csv")
    assert before == identity_of(score_models, {**settings, "table": str(tmp_path / "moved.csv")}, tmp_path)
    path.write_text((tmp_path / "moved.csv").read_text().replace(",0\n", ",9\n"))
    assert before != identity_of(score_models, settings, tmp_path)


def test_faults(score_models: dict[str, str], tmp_path: Path) -> None:
    missing, unknown = settings_faults(score_models, {"kind": "column", "model": "m"})
    assert missing == "`scorers.x.column` is missing; it has no default"
    assert unknown.startswith("unknown setting `scorers.x.model`")
    (fault,) = check_faults(score_models, {"kind": "column", "column": "reward"})
    assert fault.startswith("`scorers.x`: `column` is 'reward'; the samples have the columns")
    (fault,) = check_faults(score_models, {"kind": "column", "column": "a", "table": str(write_marks(tmp_path))})
    assert fault.startswith("`scorers.x`: `column` is 'a'; ")
