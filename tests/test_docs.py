"""The documentation names what is there: every module once, no file, link or test that has moved, no command that is
not understood; and its reference pages are what the code says.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dualign
from pipeline.commands.parsers import parser_for
from pipeline.commands.run_options import _overrides
from pipeline.config.loading import load_config
from pipeline.contracts.errors import ConfigError

ROOT = Path(__file__).parents[1]
PACKAGES = ("dualign", "pipeline", "stage1_dual", "stage2_policy")
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md")
PAGES = sorted([*(ROOT / name for name in OUTSIDE), *ROOT.glob("docs/**/*.md")])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

# Paths that pages name as examples, that are made and not kept, or that are those of another trainer.
NOT_IN_THE_TREE = (
    *("data/runs", "data/models", "data/prompts", "data/pairs", "data/ratings"),
    "pipeline/scorers/length.py",
    "examples/run_",
)


def _page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


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


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
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


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_paths_that_a_page_names_are_there(page: Path) -> None:
    rooms = "|".join((*PACKAGES, "tests", "benchmarks", "docs", "data", "examples", "requirements"))
    for named in re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w./-]*\w", page.read_text()):
        if named.startswith(NOT_IN_THE_TREE) or re.search(r"[/_](?:NAME|X)\.", named):
            continue
        assert (ROOT / named).exists(), f"{page.name} names {named}"


def test_every_page_is_in_the_index_once() -> None:
    docs = ROOT / "docs"
    listed = re.findall(r"\]\(([^)#]+\.md)\)", (docs / "index.md").read_text().split("## Learn")[1])
    pages = [str(page.relative_to(docs)) for page in docs.glob("**/*.md") if page.name != "index.md"]
    assert Counter(listed) == Counter(pages)


# The reference pages.


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_pages_are_what_the_code_says(reference: ModuleType) -> None:
    pages = reference.pages()
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs" / "reference").iterdir())
    for name, text in pages.items():
        assert (ROOT / "docs" / "reference" / name).read_text() == text, "stale: run `make reference`"


def test_every_setting_says_what_it_means(reference: ModuleType) -> None:
    assert reference.settings_without_a_sentence() == [], "a string below the field says what it means"


def test_the_reference_has_every_setting_and_command(reference: ModuleType) -> None:
    settings, commands = (reference.pages()[name] for name in ("settings.md", "command-line.md"))
    for name in ("seed", "beta", "sampling.samples_per_prompt", "training.lora_r", "training.pairs.limit"):
        assert f"| `{name}` |" in settings
    assert "| `scorers.NAME.endpoint.draws` |" in settings
    for name in ("solve", "solve --table", "frontier", "stage1", "validate"):
        assert f"\n## `dualign {name}`\n" in commands


# What pages tell a user to type.


def _blocks(text: str) -> Iterator[str]:
    """Lines of code of a page, fenced or indented, with what continues a line on it."""
    fenced = re.findall(r"^```(?:bash|sh|text)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    unfenced = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n)+", unfenced, flags=re.MULTILINE)
    for block in (*fenced, *indented):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()


def _commands(page: Path) -> list[list[str]]:
    """Commands of dualign that a page shows, as the shell would split them; those with a `...` are none."""
    found = []
    for line in _blocks(page.read_text()):
        if match := re.match(r"\s*(?:srun )?(?:\.venv/bin/|\"\$bin/)?dualign\"? (.+)", line):
            words = shlex.split(re.sub(r"\[.*?\]", "", match[1]), comments=True)
            words = words[: words.index("|")] if "|" in words[1:] else words
            if words and "..." not in words and re.fullmatch(r"[a-z0-9]+", words[0]):
                found.append(words)
    return found


SHOWN = [(page, words) for page in PAGES for words in _commands(page) if "reference" not in page.parts]


def test_pages_show_commands() -> None:
    assert len(SHOWN) > 40


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda part: part.stem if isinstance(part, Path) else part[0])
def test_a_command_that_a_page_shows_is_understood(page: Path, words: list[str]) -> None:
    words = [re.sub(r"^\$\w+$", "x", word) for word in words]
    try:
        options, rest = parser_for(words).parse_known_args(words)
    except (SystemExit, ConfigError):
        pytest.fail(f"{_page_id(page)}: dualign {' '.join(words)}")
    if "config" not in options:
        assert rest == []
        return
    overrides = {key: text for key, text in _overrides(rest).items() if ".NAME." not in key}
    ours = options.config.suffix == "" or options.config.parts[0] == "examples"
    recipe = options.config if ours else Path("embedded")
    faults: tuple[str, ...] = ()
    try:
        load_config(recipe, overrides)
    except ConfigError as error:
        faults = error.faults
    if not ours:  # of a recipe of the reader's, only the names of settings can be known here
        faults = tuple(fault for fault in faults if "unknown setting" in fault)
    assert faults == (), f"{_page_id(page)}: dualign {' '.join(words)}"


# Keys of the JSON files.


_NAMED = {"inputs", "environment", "signs", "multipliers", "means", "ess_quantiles", "drift", "refusal"}
"""Objects whose keys are names of scores, settings and files, or numbers."""


def _keys(document: Any, within: str = "") -> Iterator[str]:
    """Every key of a document but those of :data:`_NAMED`."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            if within not in _NAMED:
                yield key
            yield from _keys(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from _keys(value, within)


@pytest.fixture(scope="module")
def example() -> dualign.SolveResult:
    return dualign.solve(
        ROOT / "examples" / "scores.csv", reward="helpful", constraints=["harmless >= ref + 0.5"], beta=1.0
    )


def test_every_key_of_dual_json_is_described(example: dualign.SolveResult) -> None:
    text = (ROOT / "docs" / "artifacts.md").read_text()
    described = text.split("## `dual.json`")[1].split("## `frontier.parquet`")[0]
    missing = {key for key in _keys(json.loads(json.dumps(example.dual))) if not re.search(rf"\b{key}\b", described)}
    assert missing == set()


def test_the_tutorial_shows_what_the_table_gives(example: dualign.SolveResult) -> None:
    shown = (ROOT / "docs" / "tutorial.md").read_text()
    multiplier = example.multipliers["harmless"]
    assert f"{multiplier:.3f}" in shown
    assert f"Trust in lambda*: {example.trust.verdict.upper()}" in shown
