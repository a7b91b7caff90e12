"""The documentation names what is there: every module once, and no file, link or test that has moved."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dualign", "pipeline", "stage1_dual", "stage2_policy")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

# Paths that pages name as examples, or that are made and not kept.
NOT_IN_THE_TREE = ("data/runs", "data/prompts", "data/pairs", "data/ratings", "pipeline/scorers/length.py")


def _tree() -> list[str]:
    """The files and folders that architecture.md gives a line: ``room/`` at a line's beginning, its files indented."""
    block = ARCHITECTURE.split("## The tree")[1].split("```")[1]
    found, room = [], ""
    for line in filter(None, block.splitlines()):
        name, _, what = line.strip().partition(" ")
        assert what.strip(), f"`{line}` says nothing about its file"
        if line[0] != " ":
            room = name
            found.append(room)
        else:
            found.append(room + name)
    return found


def _modules() -> list[str]:
    """All packages as folders, and all their modules but ``__init__.py``, for which the folder stands."""
    files = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [f"{path.parent}/" if path.name == "__init__.py" else str(path) for path in files]


def test_every_module_has_exactly_one_line() -> None:
    modules, lines = _modules(), Counter(_tree())
    assert len(modules) > 150
    assert [name for name, n in lines.items() if n > 1] == []
    assert sorted(set(modules) - set(lines)) == [], "modules without a line in docs/architecture.md"
    assert sorted(set(lines) - set(modules)) == [], "lines of docs/architecture.md without a module"


def test_the_layers_are_those_that_are_checked() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert "\n".join(layers) in ARCHITECTURE


def _anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page: Path) -> None:
    rooms = "|".join((*PACKAGES, "tests", "benchmarks", "docs", "data", "requirements"))
    for named in re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w./-]*\w", page.read_text()):
        if named.startswith(NOT_IN_THE_TREE) or re.search(r"[/_](?:NAME|X)\.", named):
            continue
        assert (ROOT / named).exists(), f"{page.name} names {named}"
