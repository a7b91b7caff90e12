from __future__ import annotations

import time
from typing import Any

import pytest

from stage1_dual.scoring.protocol import ScoreRequest
from stage1_dual.scoring.verifiable import exact_match, normalise, unit_tests

ADD = "assert add(1, 2) == 3"


def _row(completion: str, **info: Any) -> ScoreRequest:
    return ScoreRequest("p", 0, [{"role": "user", "content": "?"}], completion, info=info)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("1,250.0", "1250"), ("+7", "7."), ("-0.50", "-.5"), ("-0", "0"), ("007", "7"), ("  New\nYork. ", "new york"),
        ("**Ａ**", "a"), ("$1,000", "1000"), ("STRASSE", "straße"),
    ],
)  # fmt: skip
def test_answers_that_are_one(text: str, same: str) -> None:
    assert normalise(text) == normalise(same)


def test_answers_that_are_not() -> None:
    texts = ["1.5", "15", "-15", "1", "new york", "york", ""]
    assert len({normalise(text) for text in texts}) == len(texts)


def test_the_last_line_or_the_last_match_is_the_answer() -> None:
    assert exact_match([_row("I think\n42\n\n", answer=42), _row("42 it is", answer="42")]) == [1.0, 0.0]
    assert exact_match([_row("so", answer=["SO", "thus"]), _row("so"), _row("so", answer=[])]) == [1.0, None, None]
    boxed = [_row(r"\boxed{3} no, \boxed{4}", answer="4"), _row("4", answer="4")]
    assert exact_match(boxed, pattern=r"\\boxed\{(.*?)\}") == [1.0, 0.0]
    assert exact_match([_row("1 or 2.0", right="2")], column="right", pattern=r"[\d.]+") == [1.0]


@pytest.mark.slow
def test_code_that_passes_its_tests_within_limits_and_only_that() -> None:
    good = "def add(a, b):\n    return a + b\n"
    cases = {
        f"Here:\n```python\nbad\n```\nor\n```python\n{good}```\nwell": 1.0,
        good: 1.0,
        "def add(a, b): return a - b": 0.0,
        "def add(a, b": 0.0,
        "raise SystemExit(0)": 0.0,
        "import os; os._exit(0)": 0.0,
        "while True: pass": 0.0,
        "x = 'a' * 10**9\n" + good: 0.0,
        "open('big', 'w').write('a' * 2**22)\n" + good: 0.0,
        "import os\nassert 'HOME' not in os.environ and os.listdir() == ['program.py']\n" + good: 1.0,
        "import subprocess as s, sys\ns.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n" + good: 1.0,
        "\ud800": 0.0,
    }  # fmt: skip
    started = time.monotonic()
    found = unit_tests([_row(code, tests=ADD) for code in cases], seconds=3, processes=4)
    assert dict(zip(cases, found, strict=True)) == cases
    assert time.monotonic() - started < 120
    assert unit_tests([_row(good), _row(good, tests=[ADD, "assert add(0, 0) == 1"])]) == [None, 0.0]
