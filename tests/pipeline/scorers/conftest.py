from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from helpers.scorers import RULES


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    """What a test imports from its folder is forgotten after it."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop(RULES, None)
