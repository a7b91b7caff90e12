"""``--json``: strict, and alone on standard output, whoever else prints meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands.json_output import apart_from_json, print_json

ROOT = Path(__file__).parents[3]


def test_numbers_that_are_none_are_null_and_texts_are_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, float("nan"), {"b": float("-inf")}], "name": "\x1b[2Jé", "n": 3, "is": True})
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {"a": [1.5, None, {"b": None}], "name": "\x1b[2Jé", "n": 3, "is": True}


def test_what_others_print_goes_to_standard_error() -> None:
    """By Python, and by a library that writes to the number of the stream."""
    code = """
import os
from pipeline.commands.json_output import apart_from_json, print_json
print("before")
with apart_from_json(True):
    print("a table")
    os.write(1, b"a library\\n")
print_json({"answer": 1})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    head, _, tail = done.stdout.partition("\n")
    assert head == "before"
    assert json.loads(tail) == {"answer": 1}
    assert {"a table", "a library"} <= set(done.stderr.splitlines())


def test_nothing_moves_where_no_json_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with apart_from_json(False):
        sys.stdout.write("a table")
    assert capsys.readouterr().out == "a table"


def test_the_stream_is_back_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="stop"), apart_from_json(True):
        raise ValueError("stop")
    sys.stdout.write("after")
    sys.stdout.flush()
    assert capfd.readouterr().out == "after"
