from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from jinja2 import DictLoader, Environment

import pipeline.report.shell as shell
from pipeline.report.shell import data_uri, packed, render_page, visible

REPORT = Path(shell.__file__).parent
PAGE = (
    "{% extends 'shell.html.jinja' %}{% block title %}{{ name }}{% endblock %}"
    "{% block main %}<p>{{ name }}</p>{% endblock %}"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A page of a template of this test."""

    def environment() -> Environment:
        made = original()
        there = (REPORT / "shell.html.jinja").read_text()
        made.loader = DictLoader({"shell.html.jinja": there, "small.html.jinja": PAGE})
        return made

    original = shell.page_environment
    monkeypatch.setattr(shell, "page_environment", environment)
    return "small.html.jinja"


def test_nothing_runs_but_the_pages_own_scripts(small: str) -> None:
    page = render_page(small, scripts=["data.js", "report.js"], data={"a": [1, "é"]}, name="<script>alert(1)</script>")
    tree = ET.fromstring(page)
    scripts = [element for element in tree.iter("script") if "type" not in element.attrib]
    # What a browser hashes is the text as it stands between the tags.
    bodies = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies}
    policy = next(one.attrib["content"] for one in tree.iter("meta") if "http-equiv" in one.attrib)
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert len(scripts) == len(hashes) == 3
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "".join(tree.find("body/main").itertext()).strip() == "<script>alert(1)</script>"


def test_a_page_without_scripts_has_none_and_allows_none(small: str) -> None:
    page = render_page(small, name="a")
    assert "script-src &#39;none&#39;" in page
    assert "<script" not in page


def test_data_come_back_as_they_were() -> None:
    data = {"text": "</script><!-- ]]> \u2028 é", "numbers": [0.1, -3, None]}
    text = str(packed(data))
    assert re.fullmatch(r'"[A-Za-z0-9+/=]+"', text)
    assert json.loads(gzip.decompress(base64.b64decode(text.strip('"')))) == data
    assert packed(data) == packed(data)
    with pytest.raises(ValueError, match="not JSON compliant"):
        packed({"a": float("nan")})


def test_a_script_that_html_would_end_is_refused() -> None:
    with pytest.raises(ValueError, match="</script"):
        shell._as_script("const a = '</SCRIPT>';")


def test_what_no_reader_sees_is_shown_as_an_escape() -> None:
    assert visible("a\x1b[31m\u202eb\tc\n") == "a\\x1b[31m\\u202eb\tc\n"
    assert data_uri(b"{}", "application/json") == "data:application/json;base64,e30="


def test_the_libraries_are_those_that_are_pinned() -> None:
    sums = dict(reversed(line.split()) for line in (REPORT / "vendor" / "SHA256SUMS").read_text().splitlines())
    files = {path.name for path in (REPORT / "vendor").iterdir()} - {"SHA256SUMS"}
    assert set(sums) == files == {"d3.min.js", "d3.LICENSE", "plot.umd.min.js", "plot.LICENSE"}
    for name, expected in sums.items():
        assert hashlib.sha256((REPORT / "vendor" / name).read_bytes()).hexdigest() == expected, name
    pinned = (REPORT.parents[1] / "Makefile").read_text()
    for name, package in (("d3.min.js", "d3"), ("plot.umd.min.js", "@observablehq/plot")):
        version = re.search(r"v?(\d+\.\d+\.\d+)", (REPORT / "vendor" / name).read_text()[:300])
        assert version is not None
        assert f"{package}@{version[1]}:" in pinned
