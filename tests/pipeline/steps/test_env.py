from __future__ import annotations

import sys

import numpy as np
import pytest

from pipeline.steps.env import describe_environment


def test_versions_and_devices_are_listed() -> None:
    lines = describe_environment().splitlines()
    assert f"{'numpy':14} {np.__version__}" in lines
    assert any(line.startswith(("devices", "device 0")) for line in lines)


def test_without_torch_it_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch is not installed: solve, frontier and report work" in describe_environment()
