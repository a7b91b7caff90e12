from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.python_function import PythonScorer, find_source

ROWS = [ScoreRequest(f"p{k}", 0, [{"role": "user", "content": "u"}], "word " * k) for k in range(4)]
_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    """What a test imports from its folder is forgotten after it."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("rules_"):
            del sys.modules[name]


def write_rules(folder: Path, body: str) -> str:
    """A module with a name of its own; returns it."""
    name = f"rules_{next(_NUMBERS)}"
    (folder / f"{name}.py").write_text(body)
    return name


def test_one_number_a_row_with_settings_and_units(tmp_path: Path) -> None:
    module = write_rules(
        tmp_path, "def words(rows, *, at_most):\n  return [min(at_most, len(r.completion.split())) for r in rows]"
    )
    scorer = PythonScorer(f"{module}:words", folders=[str(tmp_path)], settings={"at_most": 2}, affine=Affine(-1, 10.0))
    found = scorer.score(ROWS)
    assert [score.values for score in found if isinstance(score, Score)] == [(10.0,), (9.0,), (8.0,), (8.0,)]
    assert len({score.scored_sha256 for score in found if isinstance(score, Score)}) == len(ROWS)
    assert scorer.describe()["model"] == f"{module}:words"


@pytest.mark.parametrize(
    "body",
    ["[0.5, 1, True, None]", "np.array([0.5, 1, 1, np.nan])", "(v for v in [np.float32(0.5), 1, np.True_, None])"],
)
def test_numbers_of_all_sorts_and_none(tmp_path: Path, body: str) -> None:
    module = write_rules(tmp_path, f"import numpy as np\ndef f(rows):\n  return {body}")
    found = PythonScorer(f"{module}:f", folders=[str(tmp_path)]).score(ROWS)
    assert [s.values[0] for s in found[:3] if isinstance(s, Score)] == [0.5, 1.0, 1.0]
    last = found[3]
    # None is a failure here; NaN is left to the caller, who takes any value that is not finite for one.
    assert isinstance(last, RowFailure) or math.isnan(last.values[0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1.0]", r"rules_\d+:f returned 1 values for 4 rows"),
        ("1.0", r"rules_\d+:f returned float; it must return one number a row"),
        ("['high', 1, 1, 1]", r"returned 'high' for prompt p0, sample 0; a score must be a number"),
        ("[1, 1, [1], 1]", r"returned \[1\] for prompt p2, sample 0"),
        ("None", "returned NoneType"),
    ],
)
def test_what_is_not_a_number_a_row_is_refused(tmp_path: Path, body: str, message: str) -> None:
    module = write_rules(tmp_path, f"def f(rows):\n  return {body}")
    with pytest.raises(InputError, match=message):
        PythonScorer(f"{module}:f", folders=[str(tmp_path)]).score(ROWS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("rules", "must be of the form module:name"),
        ("rules:", "must be of the form module:name"),
        ("rules/x:f", "must be of the form module:name"),
        ("rules_nowhere:f", "there is no module rules_nowhere in "),
        ("{module}:g", "has no function 'g'"),
        ("{module}:VALUE", "has no function 'VALUE'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(tmp_path: Path, function: str, message: str) -> None:
    module = write_rules(tmp_path, "VALUE = 3\ndef f(rows): ...")
    with pytest.raises(InputError, match=message):
        PythonScorer(function.format(module=module), folders=[str(tmp_path)])


def test_a_module_that_does_not_import_says_why(tmp_path: Path) -> None:
    module = write_rules(tmp_path, "raise ValueError('no key')")
    with pytest.raises(InputError, match=r"importing rules_\d+ failed: ValueError\('no key'\)"):
        PythonScorer(f"{module}:f", folders=[str(tmp_path)])


def test_the_first_folder_wins(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "rules_twice.py").write_text("")
    assert find_source("rules_twice:f", folders=[str(other), str(one)]) == other / "rules_twice.py"


def test_a_module_in_a_package(tmp_path: Path) -> None:
    package = tmp_path / "rules_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def f(rows): return [2.0] * len(rows)")
    assert find_source("rules_package.inner:f", folders=[str(tmp_path)]) == package / "inner.py"
    assert PythonScorer("rules_package.inner:f", folders=[str(tmp_path)]).score(ROWS[:0]) == []
    with pytest.raises(InputError, match=r"there is no module rules_package\.outer in"):
        find_source("rules_package.outer:f", folders=[str(tmp_path)])
    with pytest.raises(InputError, match=r"there is no module rules_package\.inner\.most in"):
        find_source("rules_package.inner.most:f", folders=[str(tmp_path)])


def test_two_modules_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rules_alike.py").write_text("def f(rows): return [0.0] * len(rows)")
    PythonScorer("rules_alike:f", folders=[str(tmp_path / "one")])
    with pytest.raises(InputError, match=r"rules_alike is already the name of .*one.rules_alike\.py: rename .*other"):
        PythonScorer("rules_alike:f", folders=[str(tmp_path / "other")])


def test_an_exception_of_the_function_reaches_the_caller(tmp_path: Path) -> None:
    module = write_rules(tmp_path, "def f(rows):\n  return [1 / len(r.completion) for r in rows]")
    scorer = PythonScorer(f"{module}:f", folders=[str(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        scorer.score(ROWS)
    assert [s.values for s in scorer.score(ROWS[1:]) if isinstance(s, Score)] == [
        (pytest.approx(v),) for v in 1 / np.array([5, 10, 15])
    ]
