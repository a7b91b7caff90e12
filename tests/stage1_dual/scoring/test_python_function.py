from __future__ import annotations

import importlib.util
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
    with pytest.raises(InputError, match=r"importing .*rules_\d+\.py failed: ValueError\('no key'\)"):
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
        (tmp_path / folder / "rules_alike.py").write_text(f"def f(rows): return [{len(folder)}.0] * len(rows)")
    one, other = (PythonScorer("rules_alike:f", folders=[str(tmp_path / folder)]) for folder in ("one", "other"))
    assert [one.score(ROWS[:1])[0].values, other.score(ROWS[:1])[0].values] == [(3.0,), (5.0,)]


@pytest.mark.parametrize("code", ["0", "None", "'bye'"])
def test_a_module_that_ends_the_process_is_an_error(tmp_path: Path, code: str) -> None:
    module = write_rules(tmp_path, f"import sys\nsys.exit({code})")
    with pytest.raises(InputError, match=r"importing .*rules_\d+\.py ended in sys\.exit"):
        PythonScorer(f"{module}:f", folders=[str(tmp_path)])
    module = write_rules(tmp_path, f"import sys\ndef f(rows): sys.exit({code})")
    scorer = PythonScorer(f"{module}:f", folders=[str(tmp_path)])
    with pytest.raises(InputError, match=r"rules_\d+:f ended in sys\.exit"):
        scorer.score(ROWS)


def test_files_beside_the_recipe_take_the_place_of_no_package(tmp_path: Path) -> None:
    """Neither of installed packages, nor of ones that others look for and do not find."""
    (tmp_path / "statistics.py").write_text("from fractions import Fraction\ndef f(rows): return [7.0] * len(rows)")
    (tmp_path / "numpy.py").write_text("raise RuntimeError('mine')")
    (tmp_path / "rules_absent_package.py").write_text("VALUE = 5.0")
    (tmp_path / "rules_neighbour.py").write_text("import numpy\nfrom rules_absent_package import VALUE")
    (tmp_path / "rules_user.py").write_text(
        "import statistics\ndef f(rows):\n"
        "  from rules_neighbour import VALUE\n  return [VALUE + statistics.mean([1, 3])] * len(rows)"
    )
    user = PythonScorer("rules_user:f", folders=[str(tmp_path)])
    assert user.score(ROWS[:1])[0].values == (7.0,)
    assert PythonScorer("statistics:f", folders=[str(tmp_path)]).score(ROWS[:1])[0].values == (7.0,)

    import statistics

    assert statistics.mean([1, 3]) == 2
    assert importlib.util.find_spec("rules_absent_elsewhere") is None
    del sys.modules["rules_absent_package"]
    assert importlib.util.find_spec("rules_absent_package") is None  # it is asked for by others
    assert str(tmp_path) not in sys.path


def test_a_package_may_import_its_own_parts(tmp_path: Path) -> None:
    package = tmp_path / "rules_parts"
    package.mkdir()
    (package / "__init__.py").write_text("from .two import TWO")
    (package / "two.py").write_text("TWO = 2.0")
    (package / "one.py").write_text(
        "from . import TWO\nfrom rules_parts.two import TWO as again\ndef f(rows): return [TWO + again] * len(rows)"
    )
    assert PythonScorer("rules_parts.one:f", folders=[str(tmp_path)]).score(ROWS[:1])[0].values == (4.0,)


def test_an_exception_of_the_function_reaches_the_caller(tmp_path: Path) -> None:
    module = write_rules(tmp_path, "def f(rows):\n  return [1 / len(r.completion) for r in rows]")
    scorer = PythonScorer(f"{module}:f", folders=[str(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        scorer.score(ROWS)
    assert [s.values for s in scorer.score(ROWS[1:]) if isinstance(s, Score)] == [
        (pytest.approx(v),) for v in 1 / np.array([5, 10, 15])
    ]
