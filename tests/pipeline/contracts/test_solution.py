"""The solution in ``dual.json``: read as it was written, in either direction, and refused where it is damaged."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.solutions import bound, build_solution
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts.artifacts import write_json
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.problem import Constraint, constraint_signs, sign_of
from pipeline.contracts.solution import (
    AppliedSafeguard,
    Demanded,
    Solution,
    SolvedConstraint,
    SolvedReward,
    read_solution,
)
from pipeline.contracts.statistics import Statistic, statistic_columns

finite = st.floats(allow_nan=False, allow_infinity=False)
optional = st.none() | finite


@st.composite
def solutions(draw: st.DrawFn) -> Solution:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
    return Solution(
        beta=draw(st.floats(min_value=1e-300, allow_infinity=False)),
        n_prompts=draw(st.integers(1)),
        n_samples=draw(st.integers(1)),
        reward=SolvedReward(name=draw(st.text(min_size=1))),
        constraints=tuple(
            SolvedConstraint(
                name=name,
                direction=draw(st.sampled_from([">=", "<="])),
                threshold=draw(finite),
                margin=draw(optional),
                demanded=Demanded(threshold=draw(finite), margin=draw(optional)),
                safeguard=AppliedSafeguard(
                    reserve=draw(finite),
                    assurance=draw(finite),
                    assurance_level=draw(optional),
                    score_error=draw(finite),
                    response_bias=draw(finite),
                ),
                reference=draw(finite),
                multiplier=draw(st.floats(min_value=0, allow_infinity=False)),
            )
            for name in names
        ),
    )


def solution(*constraints: SolvedConstraint) -> Solution:
    return build_solution(*(constraints or (bound(),)))


@given(solutions())
def test_what_is_written_is_what_is_read(written: Solution) -> None:
    text = json.dumps(written.to_document(), allow_nan=False)

    assert Solution.from_document(json.loads(text)) == written
    assert json.dumps(Solution.from_document(json.loads(text)).to_document()) == text


def test_statistics_stand_beside_the_solution_and_are_left_alone(tmp_path: Path) -> None:
    statistics = {
        "dual_value": 0.3,
        "reward": {"reference": -0.4, "predicted": 0.3},
        "kl": {"predicted": 0.6},
        "constraints": [{"predicted": 0.25, "slack": -1e-17}],
    }
    document = solution().to_document(statistics)
    write_json(tmp_path / "dual.json", document)

    head = ["schema_version", "status", "beta", "kl_budget", "n_prompts", "n_samples"]
    assert list(document) == [*head, "dual_value", "reward", "kl", "constraints"]
    assert document["reward"] == {"name": "helpful", "reference": -0.4, "predicted": 0.3}
    assert list(document["constraints"][0])[-3:] == ["multiplier", "predicted", "slack"]
    assert read_solution(tmp_path / "dual.json") == solution()
    with pytest.raises(ValueError, match="zip"):
        solution(bound("a"), bound("b")).to_document(statistics)


def test_a_direction_becomes_a_sign_and_back() -> None:
    found = solution(bound("harmless", ">="), bound("toxicity", "<=", threshold=0.75))

    assert (sign_of(">="), sign_of("<=")) == (1.0, -1.0)
    assert constraint_signs(found.bounds).tolist() == found.signs_m.tolist() == [1.0, -1.0]
    assert found.turned_thresholds_m.tolist() == [0.25, -0.75]
    assert (found.signs_m * found.turned_thresholds_m).tolist() == [0.25, 0.75]
    assert found.multipliers_m.tolist() == [0.7, 0.7]
    assert constraint_signs([]).shape == (0,)


def test_a_bound_is_the_margin_where_there_is_one() -> None:
    found = solution(bound("a", margin=0.75), bound("b", "<="))

    assert found.bounds == (Constraint("a", ">=", margin=0.75), Constraint("b", "<=", threshold=0.25))


@pytest.mark.parametrize("direction", [">=", "<="])
def test_the_tilt_rewards_the_right_side_of_a_threshold(direction: str) -> None:
    rows = pa.table({"reward": [1.0, 1.0, 1.0], "constraint_harmless": [0.25, 1.25, -0.75]})
    better = [1.0, 1.7, 0.3] if direction == ">=" else [1.0, 0.3, 1.7]

    np.testing.assert_allclose(solution(bound(direction=direction)).tilt(rows), better, rtol=1e-15)


@given(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6), st.floats(0, 10), st.floats(0, 10))
def test_the_tilt_is_the_lagrangian_of_turned_scores(values: list[float], lam_a: float, lam_b: float) -> None:
    """Of the score as it is, and of its mirror with the mirrored bound."""
    reward, a, b = np.array(values).reshape(3, 2)
    found = solution(bound("a", multiplier=lam_a), bound("b", "<=", threshold=-0.5, multiplier=lam_b))
    mirrored = solution(bound("a", multiplier=lam_a), bound("b", ">=", threshold=0.5, multiplier=lam_b))
    rows = pa.table({"reward": reward, "constraint_a": a, "constraint_b": b})
    turned_nm = np.column_stack([a, b]) * found.signs_m

    expected = reward + (turned_nm - found.turned_thresholds_m) @ found.multipliers_m
    np.testing.assert_allclose(found.tilt(rows), expected, rtol=1e-12, atol=1e-9)
    np.testing.assert_array_equal(
        mirrored.tilt(pa.table({"reward": reward, "constraint_a": a, "constraint_b": -b})), found.tilt(rows)
    )


def test_whole_numbers_are_numbers() -> None:
    document = {**solution().to_document(), "beta": 1}

    assert Solution.from_document(document).beta == 1.0


KEYS = ("beta", "n_prompts", "n_samples", "reward", "constraints")


def of_document(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: {**document, **changes}


def of_constraint(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: {**document, "constraints": [{**document["constraints"][0], **changes}]}


def without(*path: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(document: dict[str, Any]) -> Any:
        node: Any = document
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]
        return document

    return edit


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda _: {}, "; ".join(f"`{key}` is missing" for key in KEYS)),
        (lambda document: [document], "the content is list; it must be an object"),
        (lambda _: None, "the content is None; it must be an object"),
        (lambda _: "certified", "the content is 'certified'; it must be an object"),
        (of_document(schema_version="2"), "`schema_version` is '2'; it must be '1'"),
        (of_document(beta=0.0), "`beta` is 0.0; it must be greater than 0"),
        (of_document(beta=-1.0), "`beta` is -1.0; it must be greater than 0"),
        (of_document(beta=math.nan), "`beta` is nan; it must be a finite number"),
        (of_document(beta=math.inf), "`beta` is inf; it must be a finite number"),
        (of_document(beta="1.0"), "`beta` is '1.0'; it must be a number"),
        (of_document(beta=True), "`beta` is True; it must be a number"),
        (of_document(beta=None), "`beta` is None; it must be a number"),
        (of_document(n_samples=0), "`n_samples` is 0; it must be greater than or equal to 1"),
        (of_document(n_prompts=1.5), "`n_prompts` is 1.5; it must be a whole number"),
        (of_document(reward="helpful"), "`reward` is 'helpful'; it must be an object"),
        (of_document(reward={}), "`reward.name` is missing"),
        (of_document(reward={"name": ""}), "`reward.name` is ''; it must not be empty"),
        (of_document(constraints={}), "`constraints` is dict; it must be a list"),
        (of_document(constraints=[]), "`constraints` is empty; a dual has at least one"),
        (of_document(constraints=[0.7]), "`constraints[0]` is 0.7; it must be an object"),
        (
            of_constraint(multiplier=-0.1),
            "`multiplier` of 'harmless' is -0.1; it must not be negative, but for an equality",
        ),
        (of_constraint(multiplier=math.nan), "`constraints[0].multiplier` is nan; it must be a finite number"),
        (of_constraint(multiplier="0.7"), "`constraints[0].multiplier` is '0.7'; it must be a number"),
        (of_constraint(direction="=="), "`constraints[0].direction` is '=='; it must be '>=', '<=' or '='"),
        (of_constraint(threshold=None), "`constraints[0].threshold` is None; it must be a number"),
        (of_constraint(threshold=-math.inf), "`constraints[0].threshold` is -inf; it must be a finite number"),
        (of_constraint(margin=[0.1]), "`constraints[0].margin` is list; it must be a number"),
        (of_constraint(name=3), "`constraints[0].name` is 3; it must be a string"),
        (without("constraints", 0, "multiplier"), "`constraints[0].multiplier` is missing"),
        (without("constraints", 0, "margin"), "`constraints[0].margin` is missing"),
        (without("constraints", 0, "demanded", "threshold"), "`constraints[0].demanded.threshold` is missing"),
        (without("constraints", 0, "safeguard", "reserve"), "`constraints[0].safeguard.reserve` is missing"),
        (
            lambda document: {**document, "constraints": document["constraints"] * 2},
            "`constraints` has 'harmless' twice; each has a name of its own",
        ),
        (
            lambda document: of_document(beta=0)(of_constraint(multiplier=-2)(document)),
            (
                "`beta` is 0; it must be greater than 0; "
                "`multiplier` of 'harmless' is -2; it must not be negative, but for an equality"
            ),
        ),
    ],
)
def test_damage_is_named_by_file_key_value_and_rule(
    damage: Callable[[dict[str, Any]], Any], fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "dual.json"
    path.write_text(json.dumps(damage(copy.deepcopy(solution().to_document()))))  # NaN too, which write_json refuses

    with pytest.raises(CorruptArtifactError) as caught:
        read_solution(path)
    assert str(caught.value) == f"{path} is damaged: {fault}"
    assert caught.value.exit_code == 2


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match=r"dual\.json cannot be read"):
        read_solution(tmp_path / "dual.json")
    (tmp_path / "dual.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match=r"dual\.json is not valid JSON"):
        read_solution(tmp_path / "dual.json")


def test_files_of_before_there_were_statistics_bound_the_mean_of_the_score_of_their_name() -> None:
    document = solution(bound(margin=0.75)).to_document()
    for key in ("score", "statistic", "certified_at", "column_ratio", "column_threshold"):
        del document["constraints"][0][key]
    del document["kl_budget"], document["constraints"][0]["demanded"]["tolerance"]

    read = Solution.from_document(document)

    assert read == solution(bound(margin=0.75))
    assert read.constraints[0].stated == Statistic("harmless")
    assert read.constraints[0].column_threshold == 0.25


def test_a_share_of_a_category_is_tilted_by_its_column_and_an_equality_by_either_sign() -> None:
    share = {"kind": "share", "at_least": 0.0, "where": {"category": ["a"]}}
    rest = {"certified_at": None, "column_ratio": 0.9, "column_threshold": 0.0}
    safe = bound("safe", score="harmless", statistic=share, threshold=0.9, **rest)
    words = bound("words", "=", threshold=2.0, multiplier=-0.5)
    found = solution(safe, words)
    rows = pa.table({"reward": [0.0, 0.0], "constraint_safe": [0.1, -0.9], "constraint_words": [2.0, 4.0]})

    np.testing.assert_allclose(found.tilt(rows), [0.07, -0.63 - 1.0], rtol=1e-15)
    assert found.turned_thresholds_m.tolist() == [0.0, 2.0]
    statistic = Statistic("harmless", "share", at_least=0.0, where=(("category", ("a",)),))
    assert found.bounds[0] == Constraint("safe", ">=", threshold=0.9, statistic=statistic)
    columns = statistic_columns(statistic, {"harmless": np.array([1.0, -1.0])}, {"category": np.array(["a", "a"])})
    np.testing.assert_allclose(safe.column(columns), [0.1, -0.9], rtol=1e-15)
    assert found.to_document()["constraints"][0]["statistic"] == share


def test_a_statistic_that_cannot_be_is_damage() -> None:
    broken = {**bound().model_dump(), "statistic": {"kind": "share"}}
    with pytest.raises(CorruptArtifactError, match="'harmless': the statistic `share` needs `at_least` or `at_most`"):
        SolvedConstraint.from_document(broken)
    with pytest.raises(CorruptArtifactError, match="`certified_at` of 'harmless' is missing"):
        SolvedConstraint.from_document({**broken, "statistic": {"kind": "cvar", "level": 0.1, "tail": "lower"}})
