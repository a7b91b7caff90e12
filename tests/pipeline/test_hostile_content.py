"""Prompts, categories, responses and names of strangers are text wherever they are shown, and secrets nowhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from helpers.solutions import bound, build_solution
from helpers.tiny_runs import run_folder, write_recipe
from huggingface_hub import ModelCard
from playwright.sync_api import sync_playwright

import dualign
from pipeline.cli import main
from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.markdown import code_markdown, plain_markdown
from pipeline.formats.all_formats import FORMATS
from pipeline.report.summary import html_summary, text_summary
from pipeline.report.views import Badge, Cell, Row, TableView
from pipeline.steps.export import write_dataset_card
from pipeline.steps.validate import validate

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>document.title='OWNED'</script>",
    "<img src=x onerror=\"document.title='OWNED'\">",
    "</p></blockquote></style></title><script>document.title='OWNED'</script>",
    "\x1b[31mred\x1b[0m\x1b]0;OWNED\x07",
    "{{ 7 * 7 }}{% for x in range(10 ** 9) %}{% endfor %}",
    "nul\x00 and \x9b31m",
    "\u202eevil\u202c \u2066isolated\u2069",
    "| a | b |\n---\n# head\n```\nconfigs: [OWNED]",
    "$\\frac{1}{0}$ a_b^c",
    "long " * 400,
    "<!-- --><svg onload=\"document.title='OWNED'\">",
    "&lt;b&gt; &amp;",
)
SECRETS = {
    name: f"s3cr3t-of-{name.lower()}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
}
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def followed(text: str) -> set[str]:
    """What a terminal would follow."""
    return {one for one in text if unicodedata.category(one) in {"Cc", "Cs"} and one not in "\n\t\r"} | (
        TURNING & set(text)
    )


def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        env={**os.environ, **SECRETS, **environment},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of hostile prompts with secrets around it: its recipe and all that was printed."""
    folder = tmp_path_factory.mktemp("hostile")
    prompts = [
        {"prompt": f"{HOSTILE[i % len(HOSTILE)]} {i}", "topic": HOSTILE[(5 * i + i // 12) % len(HOSTILE)]}
        for i in range(48)
    ]
    recipe = write_recipe(
        folder,
        prompts=prompts,
        max_failed_share=0.5,  # some are longer than the model
        training={"epochs": 1, "tokens_per_step": 1024, "evaluations": 1, "learning_rate": 1e-3},
        evaluation={"samples_per_prompt": 4, "bootstrap_replicates": 100},
    )
    options = ("--config", recipe, "--run", "tiny", "--data-dir", folder / "data", "--no-progress")
    said = ""
    formats = [option for name in FORMATS for option in ("--format", name)]
    for command in (("sample", "--dry-run"), ("run", "--dry-run"), ("run",), ("export", *formats)):
        done = call(*command, *options)
        assert done.returncode in {0, 6}, done.stderr  # 6: training a random policy need not pay
        said += done.stdout + done.stderr
    done = call("validate", "tiny", "--data-dir", folder / "data", "--no-progress")
    assert done.returncode == 0, done.stdout
    return recipe, said + done.stdout + done.stderr


def test_a_terminal_follows_nothing(hostile: tuple[Path, str]) -> None:
    assert followed(hostile[1]) == set()


def test_prompts_are_shown_before_sampling_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, prompts=[{"prompt": text, "topic": "t"} for text in HOSTILE if followed(text)])
    options = ("--config", str(recipe), "--data-dir", str(tmp_path / "data"), "--prompts.limit", "1")
    assert main(["sample", "--dry-run", *options]) == 0
    assert followed(shown := capsys.readouterr().out) == set()
    assert re.search(r"\\x1b\[31mred|\\x00|\\u202eevil", shown)


def test_the_report_shows_and_runs_nothing(hostile: tuple[Path, str]) -> None:
    path = run_folder(hostile[0]) / "report" / "report.html"
    text = path.read_text(encoding="utf-8")
    tree = ET.fromstring(text)  # forgives nothing, no control character either
    assert {element.tag for element in tree.iter()}.isdisjoint({"svg", "iframe", "link"})
    assert len(list(tree.iter("script"))) == 4  # data, two libraries and the page's own
    assert not any(name.startswith("on") for element in tree.iter() for name in element.attrib)
    assert followed(text) == set()
    words = "".join(tree.itertext())
    for shown in ("<script>document.title='OWNED'</script>", "\\x1b[31mred", "\\u202eevil", "{{ 7 * 7 }}"):
        assert shown in words


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium; the page is parsed above")
def test_a_browser_runs_nothing_of_theirs(hostile: tuple[Path, str]) -> None:
    path = run_folder(hostile[0]) / "report" / "report.html"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-ready]")
        for place in range(len(HOSTILE)):  # every text is shown by the page's script
            tab.fill("#find", f"{place}")
            tab.wait_for_timeout(20)
        tab.click("#found li:first-child button")
        assert tab.title() == "tiny: constrained alignment report"
        assert "OWNED" in tab.content()
        assert tab.locator("img[onerror], svg[onload]").count() == 0
        assert tab.locator("script").count() == 4
        assert followed(tab.inner_text("body")) == set()
        assert said == []
        browser.close()


def test_tables_and_cards_are_read_as_what_they_are(hostile: tuple[Path, str]) -> None:
    run = run_folder(hostile[0])
    for folder in (run / "tilted", run / "exports" / "weighted-sft"):
        rows = load_dataset(str(folder), cache_dir=str(hostile[0].parent / "cache"))["train"]
        assert rows.num_rows == sum(pq.read_table(path).num_rows for path in folder.glob("data/train-*"))
    for folder in (run / "tilted", *(run / "exports" / name for name in FORMATS)):
        card = (folder / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert set(front) == {"configs", "tags"}
        assert followed(card) == set()
    for name, kind in FORMATS.items():
        folder = run / "exports" / name
        assert validate(folder).faults == []
        for part in kind.parts:
            config = "default" if part.name == "data" else part.name
            rows = load_dataset(str(folder), config, cache_dir=str(hostile[0].parent / "cache"))["train"]
            assert rows.num_rows == read_manifest(folder).counts[part.count("train")] > 0
    assert ModelCard.load(run / "policy" / "README.md").data.library_name == "transformers"
    found = set(pq.read_table(run / "prompts" / "data", columns=["category"])["category"].to_pylist())
    assert found == set(HOSTILE)


def test_secrets_are_nowhere(hostile: tuple[Path, str]) -> None:
    said = hostile[1]
    failing = call(
        *("run", "--config", hostile[0], "--run", "other", "--data-dir", hostile[0].parent / "data"),
        *("--reference.model", "nobody/nothing", "--no-progress"),
        HF_ENDPOINT="http://127.0.0.1:9",  # where nobody listens
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    assert failing.returncode == 2
    said += failing.stdout + failing.stderr
    files = [path for path in run_folder(hostile[0]).rglob("*") if path.is_file()]
    assert len(files) > 50
    for secret in SECRETS.values():
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


NAME = "<b>|`x`$\\frac{_{{ 7 * 7 }}"
UNSEEN = "\x1b[31mred\x1b]0;OWNED\x07\u202e"


def table_of(**columns: str) -> pa.Table:
    rng = np.random.default_rng(0)
    named = {columns.get(name, name): rng.normal(size=640) for name in ("r", "g")}
    return pa.table({"prompt_id": np.repeat([f"p{i}" for i in range(40)], 16), **named})


def solve(table: pa.Table, folder: Path, reward: str) -> int:
    pq.write_table(table, folder / "scores.parquet")
    arguments = ("--table", str(folder / "scores.parquet"), "--reward", reward, "--beta", "1", "--no-progress")
    return main(["solve", *arguments, "--constraint", "g >= ref + 0.3", "--output", str(folder / "out")])


def test_names_of_columns_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = dualign.solve(table_of(r=NAME), reward=NAME, constraints=["g >= ref + 0.3"], beta=1.0)
    assert "&lt;b&gt;" in result._repr_html_()
    assert "<b>|" not in result._repr_html_()
    assert solve(table_of(r=NAME), tmp_path, NAME) == 0
    assert NAME[:12] in capsys.readouterr().out
    # Text, no formula, and shortened along the axis.
    assert "&lt;b&gt;|`x`$\\…" in (tmp_path / "out" / "figures" / "frontier_g.svg").read_text()


def test_names_that_a_terminal_would_follow_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(table_of(r=UNSEEN), tmp_path, UNSEEN) == 2
    assert followed(said := capsys.readouterr().err) == set()
    assert "a name has no characters that do not show" in said


def test_a_name_of_a_document_is_shown_as_text() -> None:
    view = TableView(
        title="Stage 1",
        header=(Cell("score"),),
        rows=(Row((Cell(UNSEEN, UNSEEN),)),),
        facts=((UNSEEN, UNSEEN),),
        warnings=(UNSEEN,),
        badges=(Badge("training", UNSEEN, "bad", (UNSEEN,), UNSEEN),),
        answers=(UNSEEN,),
    )
    for shown in (text_summary(view), html_summary(view)):
        assert followed(shown) == set()
        assert "\\x1b[31mred" in shown


def test_the_longest_name_of_a_column_is_no_file_name(tmp_path: Path) -> None:
    name = "r" * 200
    result = dualign.solve(table_of(g=name), reward="r", constraints=[f"{name} >= ref + 0.3"], beta=1.0)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "figures" / f"dual_{'r' * 100}.png").is_file()


@pytest.mark.parametrize("text", [*HOSTILE, NAME, UNSEEN, "a`b``c", "`", " "])
def test_a_text_in_a_card_is_one_line_without_markup(text: str) -> None:
    for shown in (plain_markdown(text), code_markdown(text)):
        assert followed(shown) == set()
        assert "\n" not in shown
        assert not re.search(r"(?<!\\)\|", shown)
    assert not re.search(r"(?<!\\)[<`\[*_]", plain_markdown(text))


def test_a_card_keeps_its_tables_whatever_the_names_and_warnings(tmp_path: Path) -> None:
    solution = build_solution(bound("a|b`", "<=", threshold=0.0, multiplier=1.0), beta=1.0)
    dual: dict[str, Any] = {
        **solution.to_document(),
        "reward": {**solution.to_document()["reward"], "reference": 0.0, "predicted": 0.0},
        "kl": {"predicted": 0.1},
        "diagnostics": {"ess_median": 3.0},
        "warnings": ["<script>x</script>\n# head", UNSEEN],
    }
    dual["constraints"] = [{**row, "predicted": 0.0} for row in dual["constraints"]]
    write_dataset_card(tmp_path, dual=dual, n_rows=1, run="r`\n# head", inputs={})
    lines = (tmp_path / "README.md").read_text().splitlines()
    (row,) = (line for line in lines if "| constraint |" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert not any(line.startswith("# head") for line in lines)
    assert not any(re.search(r"(?<!\\)<script", line) for line in lines)
