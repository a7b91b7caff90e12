from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import pipeline.report.page
from pipeline.contracts.artifacts import Manifest, write_manifest
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.problem import Constraint
from pipeline.published import read_points
from pipeline.report.page import write_report
from pipeline.report.plates import stage2_plates

pytestmark = pytest.mark.slow

ATTACK = "<script>alert('x')</script><img src=\"https://example.org/p.png\"/> {{ 7 * 7 }}"


def _tree(path: Path) -> ET.Element:
    # The template is written so that an XML parser, which forgives nothing, reads it too.
    return ET.fromstring(path.read_text(encoding="utf-8"))


def _words(tree: ET.Element) -> str:
    parts = [part for name in ("header", "nav", "main", "footer") for part in tree.findall(f"body/{name}")]
    return " ".join(" ".join("".join(part.itertext()) for part in parts).split())


@pytest.fixture(scope="session")
def page_of_two(two_bounds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report")
    return write_report(two_bounds.folder, output=output)[0]


def test_the_page_says_verdict_numbers_and_origin(two_bounds: Any, page_of_two: Path) -> None:
    tree = _tree(page_of_two)
    words = _words(tree)
    assert (
        words.index("Evaluation: violated. harmless misses") < words.index("What was asked") < words.index("Stage 2")
    )
    assert "harmless at least 0.800 above the reference on average" in words
    assert "toxicity at most −0.200 on average" in words
    for bound in two_bounds.evaluation["constraints"]:
        value = bound["realised"] - (0.0 if bound["margin"] is None else bound["reference"])
        assert f"{value:.3f}".replace("-", "\N{MINUS SIGN}") in words
    assert "harmless: at least 0.800 above the reference demanded; realised +0." in words
    assert "cd" * 32 in words
    assert "2.13.0+cpu" in words
    assert "solve" in words
    assert "1.2 s" in words
    assert len(tree.findall(".//figure")) == 11
    assert "family" in words
    assert "each category judged by its own 95% interval" in words
    assert "Trained: Take a walk & call <someone> you trust." in words


def test_a_satisfied_evaluation_does_not_outshine_an_unreliable_dual(build_run: Any, tmp_path: Path) -> None:
    run = build_run([Constraint("harmless", ">=", margin=0.3)], achieved=1.5, n_prompts=40, n_samples=4)
    assert run.evaluation["status"] == "satisfied"
    trust = run.dual["trust"]
    assert trust["verdict"] == "unreliable"
    verdict = {
        "verdict": "did not pay",
        "closed_fraction": -0.1,
        "closed_fraction_ci95": [-0.2, 0.0],
        "n_checkpoints": 4,
        "n_prompts": 9,
        "reasons": ["no checkpoint beat the reference on 9 held-out prompts"],
        "advice": ["lower learning_rate from 0.0002 to 6.7e-05"],
    }
    write_manifest(
        run.folder / "policy",
        Manifest(step="train", run="gaussian", settings={}, inputs={}, files={}, details={"verdict": verdict}),
    )
    tree = _tree(write_report(run.folder, output=tmp_path)[0])
    badges = {"".join(badge.itertext()): badge.attrib["class"] for badge in tree.findall(".//ul[@class='badges']/li")}
    assert badges == {
        "Evaluation: satisfied": "badge neutral",
        "Trust in λ*: unreliable": "badge bad",
        "Training: did not pay": "badge bad",
    }
    words = _words(tree)
    first = words.index("What was asked")
    for text in (*trust["advice"], "no checkpoint beat the reference", "lower learning_rate from 0.0002 to 6.7e-05"):
        assert text[1:] in words[:first], text
    assert not [element for element in tree.iter() if "good" in element.attrib.get("class", "").split()]


def test_the_page_is_self_contained(page_of_two: Path) -> None:
    tree = _tree(page_of_two)
    sources = [value for element in tree.iter() for key, value in element.attrib.items() if key in {"src", "href"}]
    pictures = [one for one in sources if one.startswith("data:image/svg+xml;base64,")]
    tables = [one for one in sources if one.startswith("data:text/csv;base64,")]
    documents = [one for one in sources if one.startswith("data:application/json;base64,")]
    places = [one for one in sources if one.startswith("#")]
    assert [len(pictures), len(tables), len(documents)] == [11, 11, 2]
    assert len(sources) == 24 + len(places)
    there = {element.attrib["id"] for element in tree.iter() if "id" in element.attrib}
    assert {one[1:] for one in places} <= there
    assert {element.tag for element in tree.iter()}.isdisjoint({"link", "iframe", "object", "form"})
    policy = next(one.attrib["content"] for one in tree.iter("meta") if "http-equiv" in one.attrib)
    assert "http" not in policy
    assert page_of_two.stat().st_size < 3_000_000


def test_a_page_stays_small_whatever_the_run(build_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(
        [Constraint(f"bound_{place}", ">=", margin=0.01) for place in range(4)], n_prompts=12, n_samples=24
    )
    monkeypatch.setattr(pipeline.report.page, "_MOST_FIGURE_BYTES", 100_000)
    tree = _tree(write_report(run.folder, output=tmp_path)[0])
    shown, named = len(tree.findall(".//figure/img")), _words(tree).count("the figure is a file beside it: figures/")
    assert 0 < shown < 6
    assert shown + named == len(tree.findall(".//figure"))


def test_what_a_page_has_no_room_for_takes_no_room_from_others(
    build_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run([Constraint("harmless", ">=", margin=0.3)], n_prompts=12, n_samples=24)
    largest = len(stage2_plates(run.folder, run.solved, run.evaluation)[-1].numbers.csv())
    monkeypatch.setattr(pipeline.report.page, "_MOST_TABLE_BYTES", largest - 1)
    page = write_report(run.folder, output=tmp_path)[0]
    tree = _tree(page)
    beside = [code.text or "" for code in tree.findall(".//figcaption/code")]
    assert "figures/training.csv" in beside
    assert all((tmp_path / name).is_file() for name in beside)
    named = {link.attrib["download"] for link in tree.iter("a") if "download" in link.attrib}
    assert {"predicted_realised.csv", "effective_sample_size.csv"} <= named  # before and after it


def test_every_figure_is_written_with_its_numbers(two_bounds: Any, tmp_path: Path) -> None:
    paths = write_report(two_bounds.folder, output=tmp_path / "out")
    assert all(path.is_file() for path in paths)
    assert paths[0] == tmp_path / "out" / "report.html"
    stems = {path.stem for path in paths[1:]}
    assert stems == {
        "dual_harmless",
        "dual_toxicity",
        "frontier_harmless",
        "frontier_toxicity",
        "effective_sample_size",
        "ladder_harmless",
        "ladder_toxicity",
        "predicted_realised",
        "distributions",
        "gold",
        "training",
    }
    assert sorted(path.suffix for path in paths[1:]) == [
        kind for kind in (".csv", ".pdf", ".png", ".svg") for _ in stems
    ]
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == {path.name for path in paths[1:]}


def test_the_text_of_a_model_cannot_become_markup(build_run: Any, tmp_path: Path) -> None:
    run = build_run([Constraint("harmless", ">=", margin=0.3)], completion=ATTACK, n_prompts=12, n_samples=8)
    tree = _tree(write_report(run.folder, output=tmp_path)[0])
    assert ATTACK in _words(tree)
    assert len(tree.findall(".//script")) == 4  # data, two libraries and the page's own
    assert all(image.attrib["src"].startswith("data:") for image in tree.findall(".//img"))


def test_published_policies_are_named_on_the_page(two_bounds: Any, tmp_path: Path) -> None:
    points = read_points("2405.19544", ["Figure 3 left"], score="safety_gain", reward="helpful_gain")
    paths = write_report(two_bounds.folder, output=tmp_path, published={"harmless": points, "toxicity": points})
    # Gains over a reference have a place beside a margin, and none beside the absolute threshold of `toxicity`.
    assert _words(_tree(paths[0])).count("policies that arXiv 2405.19544 reports") == 1


def test_before_stage_2_the_page_shows_stage_1(build_run: Any, tmp_path: Path) -> None:
    run = build_run([Constraint("harmless", ">=", margin=0.8)], has_stage2=False)
    paths = write_report(run.folder, output=tmp_path)
    words = _words(_tree(paths[0]))
    assert "stage 1 only" in words
    assert "Stage 2" not in words
    assert {path.stem for path in paths[1:]} == {
        "dual_harmless",
        "frontier_harmless",
        "effective_sample_size",
        "ladder_harmless",
        "distributions",
    }


def test_names_that_collide_as_file_names_are_kept_apart(build_run: Any, tmp_path: Path) -> None:
    constraints = [Constraint("calm.x", ">=", margin=0.2), Constraint("Calm_x", ">=", margin=0.2)]
    run = build_run(constraints, has_stage2=False, n_prompts=12, n_samples=16)
    stems = {path.stem for path in write_report(run.folder, output=tmp_path)}
    assert {"dual_calm_x", "dual_Calm_x_1"} <= stems


def test_a_run_without_a_dual_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match=r"dual\.json cannot be read"):
        write_report(tmp_path, output=tmp_path / "report")
