"""What the report reads of a ``dual.json``: all of it, or a message that names what is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts.artifacts import write_json
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.solution import Solution
from pipeline.report.page import write_report
from pipeline.report.solved import ReportedSolution


def test_the_statistics_are_those_of_the_file(two_bounds: Any) -> None:
    solved, dual = two_bounds.solved, two_bounds.dual

    assert solved.multipliers_m.tolist() == Solution.from_document(dual).multipliers_m.tolist()
    assert solved.reward.predicted == dual["reward"]["predicted"]
    assert solved.kl.log_samples == dual["kl"]["log_samples"]
    assert [rung.multipliers for rung in solved.ladder.rungs] == [
        rung["multipliers"] for rung in dual["ladder"]["rungs"]
    ]
    for bound, entry in zip(solved.constraints, dual["constraints"], strict=True):
        assert bound.multiplier_ci95 == tuple(entry["multiplier_ci95"])
        assert (bound.predicted, bound.heldout_slack) == (entry["predicted"], entry["heldout_slack"])


def test_an_interval_may_be_open_and_a_rung_without_solution(one_bound: Any) -> None:
    (bound,) = one_bound.dual["constraints"]
    rung = {**one_bound.dual["ladder"]["rungs"][0], "multipliers": {"harmless": None}}
    solved = ReportedSolution.from_document(
        {
            **one_bound.dual,
            "constraints": [{**bound, "multiplier_ci95": [0.5, None]}],
            "ladder": {"rungs": [rung]},
        }
    )

    assert solved.constraints[0].multiplier_ci95 == (0.5, None)
    assert solved.ladder.rungs[0].multipliers == {"harmless": None}


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda dual: {**dual, "constraints": [{**dual["constraints"][0], "multiplier": -1.0}]},
            "multiplier` of 'harmless' is -1; it must not be negative",
        ),
        (lambda dual: {**dual, "trust": {}}, "`trust.verdict` is missing"),
        (lambda dual: {**dual, "ladder": {"rungs": None}}, "`ladder.rungs` is None; it must be a list"),
        (lambda dual: {**dual, "reward": {"name": "helpful"}}, "`reward.reference` is missing"),
        (
            lambda dual: {**dual, "constraints": [{**dual["constraints"][0], "predicted_ci95": [1.0]}]},
            r"`constraints\[0\].predicted_ci95\[1\]` is missing",
        ),
    ],
)
def test_a_damaged_dual_is_named_with_its_key(
    damage: Callable[[dict[str, Any]], Any], fault: str, one_bound: Any, tmp_path: Path
) -> None:
    shutil.copytree(one_bound.folder, tmp_path / "run")
    write_json(tmp_path / "run" / "dual" / "dual.json", damage(one_bound.dual))

    with pytest.raises(CorruptArtifactError, match=rf"run/dual/dual\.json is damaged: .*{fault}"):
        write_report(tmp_path / "run", output=tmp_path / "report")
