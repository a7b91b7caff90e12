"""An `evaluation.json` is read whole or refused: file, key, value and rule."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.solution import read_solution
from pipeline.report.evaluated import read_evaluation


def of_bound(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["constraints"][0].update(values)


def test_what_a_step_wrote_is_read(one_bound: Any) -> None:
    found = read_evaluation(
        one_bound.folder / "evaluation" / "evaluation.json", read_solution(one_bound.folder / "dual" / "dual.json")
    )
    assert found.status == one_bound.evaluation["status"]
    assert [bound.realised for bound in found.constraints] == [
        bound["realised"] for bound in one_bound.evaluation["constraints"]
    ]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda document: document.pop("kl"), "`kl` is missing"),
        (lambda document: document.update(status="splendid"), "`status` is 'splendid'; it must be"),
        (lambda document: document.update(constraints=[]), "`constraints`"),
        (lambda document: document["reward"].update(ci95=[1.0]), r"`reward\.ci95\[1\]` is missing"),
        (lambda document: document["reward"].update(name="another"), r"has the scores \['another'\], which are not"),
        (of_bound(name="another"), r"`constraints` are \['another'"),
        (of_bound(realised=float("nan")), r"`constraints\[0\]\.realised` is nan; it must be a finite number"),
        (of_bound(improvement=None), r"`constraints\[0\]\.improvement` is None; it must be a number"),
    ],
)
def test_what_no_step_wrote_is_refused(
    damage: Callable[[dict[str, Any]], object], said: str, one_bound: Any, tmp_path: Path
) -> None:
    document = copy.deepcopy(one_bound.evaluation)
    damage(document)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptArtifactError, match=rf"evaluation\.json is damaged: .*{said}"):
        read_evaluation(path, read_solution(one_bound.folder / "dual" / "dual.json"))


def test_the_status_is_the_worst_of_the_constraints(one_bound: Any, tmp_path: Path) -> None:
    document = copy.deepcopy(one_bound.evaluation)
    for bound in document["constraints"]:
        bound["status"] = "satisfied"
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**document, "status": "violated"}))
    with pytest.raises(CorruptArtifactError, match="the worst of what was demanded is 'satisfied'"):
        read_evaluation(path, read_solution(one_bound.folder / "dual" / "dual.json"))
