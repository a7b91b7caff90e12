"""The pages of the experiments and the index that lists them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from matplotlib.figure import Figure

from pipeline.baselines.results import Result, markdown_table, write_index, write_result


def _result(name: str) -> Result:
    return Result(name, f"What {name} shows", pa.table({"x": [1.0]}), Figure(), [f"finding of {name}"])


def test_findings_of_another_recipe_are_not_repeated(tmp_path: Path) -> None:
    write_result(_result("cost"), tmp_path, origin="Recipe a; seeds 0.", metadata={})
    write_result(_result("geometry"), tmp_path, origin="Recipe b; seeds 0.", metadata={})
    index = write_index(tmp_path, ["cost", "geometry", "trade_off"], origin="Recipe b; seeds 0.").read_text()
    assert "finding of geometry" in index
    assert "finding of cost" not in index
    assert "[What cost shows](cost.md)\n\nMade otherwise: Recipe a; seeds 0." in index
    assert "trade_off" not in index


@pytest.mark.parametrize(
    ("value", "cell"),
    [(0.12345, "0.123"), (1234.5, "1,234"), (None, "–"), (float("nan"), "–"), (True, "yes"), ("a|b", "a\\|b")],
)
def test_cells(value: object, cell: str) -> None:
    assert markdown_table(pa.table({"x": [value]}))[-1] == f"| {cell} |"
