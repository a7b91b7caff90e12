from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.contracts.section import Positive, Section, nearest


class Example(Section):
    rows: Positive = 1
    share: float = 0.5
    shown: bool = False
    limit: int | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rowz": 2}, "Extra inputs are not permitted"),
        ({"rows": True}, "it must not be true or false"),
        ({"limit": False}, "it must not be true or false"),
        ({"rows": 0}, "greater than or equal to 1"),
        ({"share": float("nan")}, "finite number"),
    ],
)
def test_what_no_section_takes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Example(**settings)


def test_switches_are_switches_and_nothing_changes_afterwards() -> None:
    section = Example(shown=True, anything=True)
    assert (section.shown, section.anything) == (True, True)
    with pytest.raises(ValidationError, match="frozen"):
        section.rows = 3


def test_the_nearest_name_or_all() -> None:
    assert nearest("sampels", ["samples", "scores"]) == "; did you mean `samples`?"
    assert nearest("xyz", ["scores", "samples"]) == "; known: samples, scores"
