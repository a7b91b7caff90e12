"""Bars in a terminal, lines elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipeline import progress
from pipeline.progress import progress_bar


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found)
    monkeypatch.setattr("tqdm.std.time", found)
    return iter([found])


def lines_of(
    clock: Clock, capsys: pytest.CaptureFixture[str], *, seconds: float, count: int, initial: int = 0
) -> list[str]:
    """What a file gets of a task of ``count`` units that take so long each."""
    with progress_bar(total=count, doing="sampling", unit="samples", initial=initial) as bar:
        for _ in range(initial, count):
            clock.now += seconds
            bar.update()
            bar.set_postfix_str("7 tokens/s")
    return capsys.readouterr().err.splitlines()


def test_a_file_gets_a_line_each_tenth(clock: Iterator[Clock], capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(next(clock), capsys, seconds=0.5, count=200)
    assert [line.split(",")[0] for line in lines] == [f"sampling: {share}%" for share in range(10, 101, 10)]
    assert lines[4].startswith("sampling: 50%, 100/200 samples, 00:50 passed, 00:50 left, 2.00 samples/s")
    assert lines[4].endswith("7 tokens/s")
    assert "\r" not in "".join(lines)


def test_slow_work_gets_a_line_a_minute(clock: Iterator[Clock], capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(next(clock), capsys, seconds=25, count=100)  # a tenth takes 250 s
    assert len(lines) == pytest.approx(2500 / 75, abs=8)  # each third unit is the first one past a minute
    assert lines[0].startswith("sampling: 3%, 3/100 samples, 01:15 passed, 40:24 left, 0.04 samples/s")


def test_fast_work_and_work_already_done_get_one_line(
    clock: Iterator[Clock], capsys: pytest.CaptureFixture[str]
) -> None:
    moving = next(clock)
    assert [line.split(",")[0] for line in lines_of(moving, capsys, seconds=0.001, count=500)] == ["sampling: 100%"]
    continued = lines_of(moving, capsys, seconds=1.5, count=100, initial=95)
    assert [line.split(",")[0] for line in continued] == ["sampling: 100%"]


def test_what_ends_early_says_where_and_what_does_not_stay_leaves_nothing(
    clock: Iterator[Clock], capsys: pytest.CaptureFixture[str]
) -> None:
    moving = next(clock)
    with progress_bar(total=100, doing="scoring", unit="rows") as bar:
        moving.now += 0.1
        bar.update(7)
    assert capsys.readouterr().err.startswith("scoring: 7%, 7/100 rows")
    with progress_bar(total=100, doing="scoring", unit="rows", stays=False) as bar:
        bar.update(100)
    with progress_bar(total=100, doing="scoring", unit="rows", shown=False) as bar:
        bar.update(100)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(total=10, doing="scoring", unit="rows") as bar:
        bar.update(10)
    assert "\r" in terminal.getvalue()
    assert "scoring: 100%|" in terminal.getvalue()


def test_bars_of_others_are_rare_in_a_file_by_tqdms_own_variables() -> None:
    script = (
        "from pipeline.cli import main\n"
        "main(['env'])\n"
        "from tqdm import tqdm\n"
        "bar = tqdm(total=3)\n"
        "print('intervals', bar.mininterval, bar.maxinterval)\n"
    )

    def intervals(**variables: str) -> str:
        environment = {name: text for name, text in os.environ.items() if not name.startswith("TQDM_")}
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            capture_output=True,
            text=True,
            env={**environment, "PYTHONPATH": ".", **variables},
        )
        return done.stdout.splitlines()[-1]

    assert intervals() == "intervals 60.0 60.0"
    assert intervals(TQDM_MININTERVAL="5") == "intervals 5.0 60.0"
