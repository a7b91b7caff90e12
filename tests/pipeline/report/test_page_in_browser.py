"""The page in a browser: what moves, what follows, and that it asks the network for nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import dualign
import pipeline.report.page_data
from pipeline.contracts.problem import Constraint
from pipeline.report.page import write_report
from pipeline.report.page_data import Command
from pipeline.report.readers import build_problem, read_tilted_scores
from stage1_dual.dual import solve_dual

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; tests/pipeline/report/test_page.py parses the page"),
]

COMMANDS = {"harmless": Command("dualign run --constraints.harmless.margin {}", "The command.")}


class Opened:
    """A page in a tab, with what it said and asked for."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.tab: Page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            self.tab.wait_for_selector("html[data-ready]", timeout=20_000)
            self.settle()

    def settle(self) -> None:
        """Let what waits for the next frame happen."""
        self.tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def set(self, name: str, value: float | str) -> None:
        """Move a slider, or write into a field."""
        script = "([name, value]) => { const it = document.getElementById(name); it.value = value; %s }"
        events = "for (const kind of ['input', 'change']) it.dispatchEvent(new Event(kind, { bubbles: true }));"
        self.tab.evaluate(script % events, [name, value])
        self.settle()

    def number(self, selector: str) -> float:
        """A number as the page has it, not as it writes it."""
        return float(self.tab.get_attribute(selector, "data-value") or "nan")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(two_bounds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(two_bounds.folder, output=tmp_path_factory.mktemp("report"), commands=COMMANDS)[0]


@pytest.fixture
def opened(browser: Browser, path: Path) -> Iterator[Opened]:
    found = Opened(browser, path)
    yield found
    found.context.close()
    assert found.said == []
    assert [url for url in found.requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def test_a_margin_that_is_moved_is_answered_as_the_certified_frontier_answers(opened: Opened, two_bounds: Any) -> None:
    frontier = pq.read_table(two_bounds.folder / "dual" / "frontier.parquet")
    reference = two_bounds.dual["reward"]["reference"]
    how = opened.tab.inner_text("#explore-how")
    assert "Solved in this page" in how
    assert how.endswith(f"this solution's is {two_bounds.dual['trust']['verdict']}.")
    for place, bound in enumerate(two_bounds.dual["constraints"]):
        name, unit = bound["name"], "threshold" if bound["margin"] is None else "margin"
        rows = frontier.filter(pc.and_(frontier["feasible"], pc.equal(frontier["constraint"], name))).to_pylist()
        opened.tab.select_option("#explore-constraint", str(place))
        for row in rows[::6]:
            opened.set("explore-demand", row[unit])
            for other, one in enumerate(two_bounds.dual["constraints"]):
                found = opened.number(f"[data-cell=constraint-{other}-multiplier]")
                assert found == pytest.approx(row[f"multiplier_{one['name']}"], rel=1e-4, abs=1e-5)
                origin = 0.0 if one["margin"] is None else one["reference"]
                found = opened.number(f"[data-cell=constraint-{other}-predicted]")
                assert found + origin == pytest.approx(row[f"predicted_{one['name']}"], rel=1e-4, abs=1e-5)
            assert opened.number("[data-fact=kl]") == pytest.approx(row["kl"], rel=1e-4, abs=1e-6)
            assert opened.number("[data-fact=ess]") == pytest.approx(row["ess_median"], rel=1e-4)
            gain = opened.number("[data-cell=reward-predicted]")
            assert gain == pytest.approx(row["reward"] - reference, rel=1e-4, abs=1e-5)


def test_between_certified_points_the_page_solves_and_does_not_interpolate(opened: Opened, two_bounds: Any) -> None:
    solved = two_bounds.solved
    problem = build_problem(solved, read_tilted_scores(two_bounds.folder / "tilted", solved.names))
    for margin in (0.05, 0.77, 1.3):
        opened.set("explore-demand", margin)
        asked = solved.turned_thresholds_m.copy()
        asked[0] = solved.constraints[0].reference + margin
        expected = solve_dual(problem.with_thresholds(asked)).multipliers
        found = [opened.number(f"[data-cell=constraint-{place}-multiplier]") for place in range(2)]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_intervals_are_those_of_the_dual_but_for_the_bootstrap(opened: Opened, two_bounds: Any) -> None:
    bound = two_bounds.dual["constraints"][0]
    low, high = map(float, re.findall(r"[\d.]+", opened.tab.inner_text("[data-cell=constraint-0-multiplier] .detail")))
    assert (high - low) / np.diff(bound["multiplier_ci95"])[0] == pytest.approx(1, abs=0.35)


def test_charts_command_and_responses_follow_the_margin(opened: Opened) -> None:
    def state() -> dict[str, str]:
        return {
            "command": opened.tab.inner_text("#explore-command"),
            "frontier": opened.tab.get_attribute("#explore-frontier svg", "aria-label") or "",
            "weights": opened.tab.get_attribute("#explore-scatter svg", "aria-label") or "",
            "response": opened.tab.inner_text("#found li:first-child footer"),
            "tilted": opened.tab.inner_text("[data-cell=share-blue]"),
        }

    before = state()
    assert "--constraints.harmless.margin 0.8" in before["command"]
    opened.set("explore-demand", 1.1)
    after = state()
    assert [name for name in before if before[name] == after[name]] == []
    assert "--constraints.harmless.margin 1.1" in after["command"]
    opened.tab.click("#explore-back")
    opened.settle()
    assert state() == before


def test_keys_move_the_margin(opened: Opened) -> None:
    before = opened.number("[data-fact=kl]")
    opened.tab.focus("#explore-demand")
    for _ in range(3):
        opened.tab.keyboard.press("ArrowRight")
    opened.settle()
    assert opened.number("[data-fact=kl]") > before
    assert (opened.tab.get_attribute("#explore-demand", "aria-valuetext") or "").startswith("ref + ")


def test_the_cut_moves_the_shares_beyond_it(opened: Opened, two_bounds: Any) -> None:
    tilted = pq.read_table(two_bounds.folder / "tilted" / "data").to_pandas()
    test = tilted[tilted["split"] == "test"]
    n_prompts = test["prompt_id"].nunique()
    scores = pq.read_table(two_bounds.folder / "evaluation" / "scores" / "harmless" / "data").to_pandas()["value"]
    opened.tab.select_option("#cut-score", label="harmless")
    for cut in (-0.5, 0.75):
        opened.set("cut", cut)
        beyond = test["constraint_harmless"] >= cut
        assert opened.number("[data-cell=share-grey]") == pytest.approx(beyond.mean(), abs=1e-4)
        expected = (test["weight"] * beyond).sum() / n_prompts
        assert opened.number("[data-cell=share-blue]") == pytest.approx(expected, abs=1e-4)
        assert opened.number("[data-cell=share-vermillion]") == pytest.approx((scores >= cut).mean(), abs=1e-4)
    opened.tab.select_option("#cut-side", "<=")
    opened.settle()
    assert opened.number("[data-cell=share-grey]") == pytest.approx((~beyond).mean(), abs=1e-4)


def test_responses_are_searched_filtered_and_sorted(opened: Opened) -> None:
    def count() -> int:
        return int(opened.tab.inner_text("#found-count").split()[0].replace(",", ""))

    assert opened.tab.inner_text("#responses-what") == (
        "All 624 responses of the reference to 13 test prompts and 624 of the trained policy."
    )
    everything = count()
    opened.set("find", "question 3:")
    assert count() == 48
    opened.set("find", "no such word anywhere")
    assert count() == 0
    opened.set("find", "")
    opened.tab.select_option("#find-category", label="work")
    opened.settle()
    assert 0 < count() < everything
    opened.tab.select_option("#find-category", label="all")
    opened.tab.select_option("#find-policy", label="trained policy")
    opened.settle()
    assert count() == 624  # by a score: they have no weight
    opened.tab.select_option("#find-policy", label="both")
    opened.tab.select_option("#find-order", label="lowest toxicity")
    opened.settle()
    values = re.findall(r"toxicity ([−\d.]+)", opened.tab.inner_text("#found"))
    numbers = [float(one.replace("−", "-")) for one in values]
    assert len(numbers) == 12
    assert numbers == sorted(numbers)
    opened.tab.click("#found-more")
    opened.settle()
    assert opened.tab.locator("#found li").count() == 60


def test_both_policies_stand_side_by_side_for_a_prompt(opened: Opened) -> None:
    opened.tab.click("#found li:first-child button")
    heads = opened.tab.locator("#opened h4").all_inner_texts()
    assert heads == ["reference: most raised by the tilt first", "trained policy"]
    columns = opened.tab.locator("#opened .pair > div")
    assert columns.nth(0).locator("blockquote").count() == columns.nth(1).locator("blockquote").count() == 8
    weights = [float(one) for one in re.findall(r"weight × ([\d.]+)", columns.nth(0).inner_text())]
    assert weights == sorted(weights, reverse=True)
    assert "Trained: Take a walk" in columns.nth(1).inner_text()


def test_charts_and_figures_are_files(opened: Opened) -> None:
    with opened.tab.expect_download() as waiting:
        opened.tab.click("[aria-label='frontier as SVG']")
    chart = Path(waiting.value.path()).read_text()
    assert waiting.value.suggested_filename == "frontier.svg"
    assert chart.startswith("<svg")
    with opened.tab.expect_download() as waiting:
        opened.tab.click("[aria-label='distribution as CSV']")
    lines = Path(waiting.value.path()).read_text().splitlines()
    assert lines[0] == "helpful,reference,tilted,trained policy"
    assert len(lines) == 49
    for name in ("dual.json", "frontier_harmless.csv", "predicted_realised.svg"):
        with opened.tab.expect_download() as waiting:
            opened.tab.click(f"a[download='{name}']")
        assert waiting.value.suggested_filename == name
        assert Path(waiting.value.path()).stat().st_size > 100


@pytest.mark.parametrize("runs_scripts", [True, False])
def test_a_phone_shows_every_column(browser: Browser, path: Path, runs_scripts: bool) -> None:
    found = Opened(browser, path, viewport={"width": 390, "height": 844}, java_script_enabled=runs_scripts)
    script = """() => [document.scrollingElement.scrollWidth,
        ...[...document.querySelectorAll('main *, header *')].filter((one) => one.getClientRects().length
          && !one.closest('.unseen, thead, svg')).map((one) => one.getBoundingClientRect().right)]"""
    if runs_scripts:
        width, *ends = found.tab.evaluate(script)
        assert width <= 390
        assert max(ends) <= 390
    words = found.tab.inner_text("main")
    for column in ("demanded", "reference", "predicted", "realised"):
        assert column in found.tab.locator(".results td[data-label]").evaluate_all(
            "all => all.map(a => a.dataset.label)"
        )
    assert ("Solved in this page" in words) is runs_scripts
    assert ("What the tilt prefers" in words) is not runs_scripts
    found.context.close()


def test_long_names_do_not_widen_the_page(browser: Browser, build_run: Any, tmp_path: Path) -> None:
    names = ["harmlessness_under_adversarial_follow_up_questions_v2", "toxicity (upper bound, max over all sentences)"]
    names += [f"factual_consistency_with_retrieved_documents_nli_score_{place}" for place in range(2)]
    constraints = [Constraint(name, ">=", margin=0.02) for name in names]
    page = write_report(build_run(constraints, n_prompts=12, n_samples=24).folder, output=tmp_path)[0]
    for width in (390, 1200):
        found = Opened(browser, page, viewport={"width": width, "height": 800})
        assert found.tab.evaluate("document.scrollingElement.scrollWidth") == width
        assert found.said == []
        found.context.close()


CONTRASTS = """() => {
  const luminance = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((part) => part / 255)
      .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  for (const one of document.querySelectorAll('body *')) {
    const hasText = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!hasText || !one.getClientRects().length || one.closest('svg, script, .unseen')) continue;
    const [a, b] = [luminance(getComputedStyle(one).color), luminance(ground(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_ground(browser: Browser, path: Path, scheme: str) -> None:
    found = Opened(browser, path, color_scheme=scheme)
    assert found.tab.evaluate(CONTRASTS) == []
    found.context.close()


def test_readers_who_do_not_see_find_their_way(opened: Opened) -> None:
    tab = opened.tab
    for mark in ("body > header", "main", "nav[aria-label]", "body > footer"):
        assert tab.locator(mark).count() == 1
    levels = tab.eval_on_selector_all(
        "h1, h2, h3, h4", "all => all.filter(a => a.getClientRects().length).map(a => Number(a.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    without = """all => all.filter(a => a.getClientRects().length && !a.labels?.length && !a.ariaLabel
        && !a.textContent).map(a => a.id)"""
    assert tab.eval_on_selector_all("input, select, button, a", without) == []
    alternatives = tab.eval_on_selector_all("img", "all => all.map(a => a.alt)")
    assert len(alternatives) == 11
    assert all(re.search(r"\d\.\d", one) for one in alternatives)
    assert all(tab.eval_on_selector_all(".chart svg", "all => all.map(a => /\\d/.test(a.ariaLabel))"))


def test_paper_shows_what_needs_no_hand(opened: Opened) -> None:
    opened.tab.emulate_media(media="print")
    assert not opened.tab.is_visible("#explore")
    assert opened.tab.is_visible("text=What the tilt prefers")
    assert opened.tab.is_visible("img[data-file=distributions]")


def test_the_page_of_a_table_has_the_same_slider(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    harmless = rng.normal(size=40 * 16)
    table = pa.table(
        {
            "prompt_id": np.repeat(np.arange(40), 16),
            "helpful": rng.normal(size=harmless.size) - harmless / 2,
            "a long name of a score, in words": harmless,
        }
    )
    asked: dict[str, Any] = {"reward": "helpful", "beta": 1.0}
    text = "'a long name of a score, in words' >= ref + {}"
    dualign.solve(table, constraints=[text.format(0.3)], **asked).save(tmp_path)
    found = Opened(browser, tmp_path / "report.html", viewport={"width": 390, "height": 844})
    assert "Solved in this page from all 640 scores" in found.tab.inner_text("#explore-how")
    found.set("explore-demand", 0.7)
    expected = dualign.solve(table, constraints=[text.format(0.7)], **asked).solution
    assert found.number("[data-cell=constraint-0-multiplier]") == pytest.approx(expected.multipliers[0], rel=1e-4)
    assert found.number("[data-fact=kl]") == pytest.approx(expected.predicted_kl, rel=1e-4)
    assert found.tab.inner_text("#explore-command-note").startswith("No single setting asks for this")
    assert found.tab.evaluate("document.scrollingElement.scrollWidth") == 390
    assert found.said == []
    assert [url for url in found.requests if not url.startswith(("data:", "blob:"))] == [
        (tmp_path / "report.html").as_uri()
    ]
    found.context.close()


def test_a_page_without_all_scores_keeps_to_the_frontier_and_says_so(
    browser: Browser, two_bounds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.report.page_data, "_MOST_SCORE_BYTES", {"train": 6000, "test": 6000, "policy": 6000})
    found = Opened(browser, write_report(two_bounds.folder, output=tmp_path)[0])
    how = found.tab.inner_text("#explore-how")
    assert "Interpolated between certified points" in how
    assert re.search(r"the scores of \d+ of 27 prompts, evenly taken", how)
    frontier = pq.read_table(two_bounds.folder / "dual" / "frontier.parquet")
    rows = frontier.filter(pc.equal(frontier["constraint"], "harmless")).to_pylist()
    middle = (rows[3]["margin"] + rows[4]["margin"]) / 2
    found.set("explore-demand", middle)
    expected = (rows[3]["multiplier_harmless"] + rows[4]["multiplier_harmless"]) / 2
    assert found.number("[data-cell=constraint-0-multiplier]") == pytest.approx(expected)
    assert found.tab.inner_text("#responses-what").endswith("of the run.")
    assert re.match(r"Of \d+ of 13 test prompts, evenly taken", found.tab.inner_text("#distributions-what"))
    assert found.said == []
    found.context.close()
