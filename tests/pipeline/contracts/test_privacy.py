from __future__ import annotations

import os

import pytest

from pipeline.contracts.privacy import PRIVATE, keep_private


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PRIVATE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    keep_private()
    assert {name: os.environ[name] for name in PRIVATE} == {**PRIVATE, "DO_NOT_TRACK": "0"}
    for name in PRIVATE:
        monkeypatch.delenv(name)
