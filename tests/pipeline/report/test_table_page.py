"""The page of a table of scores: the answer, its trust and its figures, whole and of its own."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import dualign

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    harmless = rng.normal(size=40 * 16)
    table = {
        "prompt_id": np.repeat(np.arange(40), 16),
        "helpful": rng.normal(size=harmless.size) - harmless / 2,
        "a <b> & c": harmless,
    }
    output = tmp_path_factory.mktemp("saved") / "out"
    dualign.solve(pa.table(table), reward="helpful", constraints=["'a <b> & c' >= ref + 0.3"], beta=1.0).save(output)
    return output


def test_the_page_has_verdict_answer_figures_and_origin(saved: Path) -> None:
    tree = ET.fromstring((saved / "report.html").read_text(encoding="utf-8"))
    words = " ".join("".join(tree.itertext()).split())
    assert "Trust in λ*" in words
    assert "a <b> & c: at least 0.300 above the reference demanded" in words
    assert "640 responses to 40 prompts" in words
    assert "table in memory" in words
    sources = [image.attrib["src"] for image in tree.findall(".//img")]
    assert len(sources) == len(list((saved / "figures").glob("*.png")))
    assert all(source.startswith("data:image/") for source in sources)


def test_it_asks_for_nothing(saved: Path) -> None:
    text = (saved / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert len(text) < 3_000_000
