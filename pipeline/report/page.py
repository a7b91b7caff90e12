"""The report of a run: figures as files, and one HTML page that holds everything and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pipeline.contracts.artifacts import atomic_write_bytes, is_complete, read_json, read_manifest
from pipeline.contracts.training_verdict import read_training_verdict
from pipeline.published import PublishedPoint
from pipeline.report.evaluated import read_evaluation
from pipeline.report.page_data import Command, cut_of, page_data
from pipeline.report.plates import Plate, distribution_plate, stage1_plates, stage2_plates
from pipeline.report.populations import read_populations
from pipeline.report.readers import (
    PolicyExamples,
    PromptExamples,
    build_distributions,
    build_problem,
    read_examples,
    read_frontier,
    read_policy_examples,
    read_tilted_scores,
    sample_size_shares,
)
from pipeline.report.shell import data_uri, render_page
from pipeline.report.solved import ReportedConstraint, ReportedSolution
from pipeline.report.style import save_figure
from pipeline.report.views import (
    category_table,
    decimals,
    demand_in_words,
    demanded,
    number,
    stage1_view,
    stage2_view,
    subject,
)

SCRIPTS = (
    "data.js",
    "dom.js",
    "dual.js",
    "demand.js",
    "charts.js",
    "explore.js",
    "distributions.js",
    "responses.js",
    "report.js",
)

_STEPS = ("prompts", "samples", "dual", "tilted", "policy", "evaluation")
_EXAMPLE_PROMPTS = 3
_EXAMPLES_EACH = 2

_MOST_FIGURE_BYTES = 1_000_000
_MOST_TABLE_BYTES = 250_000
"""Of all figures in the page and of all their tables; others are named, and lie beside it."""
_MOST_DOCUMENT_BYTES = 125_000
"""Of ``dual.json`` and of ``evaluation.json``. In base64 all that is bounded is under 8 MB with the libraries."""


@dataclass(frozen=True)
class PagePlate:
    """A figure in a page.

    Attributes:
        plate: the figure and its words.
        source: address of the picture, or None where the page is full.
        table: address of its numbers as CSV, or None likewise.
    """

    plate: Plate
    source: str | None
    table: str | None


@dataclass(frozen=True)
class _StepRecord:
    """What the page says about where a part of the run came from."""

    name: str
    identity: str
    seconds: float
    counts: Mapping[str, int]
    inputs: Mapping[str, str]


def write_report(
    run_dir: Path,
    *,
    output: Path,
    published: Mapping[str, Sequence[PublishedPoint]] = MappingProxyType({}),
    commands: Mapping[str, Command] = MappingProxyType({}),
) -> list[Path]:
    """Write the figures of a run (PNG, SVG and PDF) and its page.

    Everything is recomputed from the artifacts. Before stage 2, without ``policy/`` and ``evaluation/``, the report
    covers stage 1. The page is one file of at most 8 MB: of large runs it holds a part of the scores and texts, evenly
    taken, and says so.

    Args:
        run_dir: folder of the run, with ``dual/`` and ``tilted/``, and after stage 2 ``policy/`` and ``evaluation/``.
        output: folder to write ``report.html`` and ``figures/`` into.
        published: others' results by constraint, for its frontier.
        commands: what asks for another demand, by constraint.

    Returns:
        What was written: the page first.

    Raises:
        CorruptArtifactError: an artifact is missing, damaged or lacks a column.
    """
    path = run_dir / "dual" / "dual.json"
    dual = read_json(path)
    solved = ReportedSolution.from_document(dual, source=path)
    evaluation_path = run_dir / "evaluation" / "evaluation.json"
    evaluation = read_json(evaluation_path) if evaluation_path.exists() else None
    is_trained = is_complete(run_dir / "policy")
    training = read_training_verdict(run_dir / "policy") if is_trained else None
    tables = [stage1_view(dual, training)]
    if evaluation is not None:
        read_evaluation(evaluation_path, solved)
        tables.insert(0, stage2_view(evaluation, dual, training))
    scores = read_tilted_scores(run_dir / "tilted", solved.names)
    problem = build_problem(solved, scores)
    frontier = read_frontier(run_dir / "dual" / "frontier.parquet", solved.names)
    drops = solved.truncation is not None and solved.truncation.rule == "drop"
    populations = read_populations(run_dir, solved, drops_cut_off=drops)
    stage1 = stage1_plates(
        solved,
        problem,
        share_p=sample_size_shares(scores),
        frontier=frontier,
        evaluation=evaluation,
        published=published,
    )
    stage2 = stage2_plates(run_dir, solved, evaluation)
    cuts = {name: cut_of(solved, name) for name in solved.scores}
    spread = [distribution_plate(found) for found in [build_distributions(solved, populations, cuts)] if found]
    plates = [*stage2, *spread, *stage1]
    written = save_plates(plates, output / "figures")
    placed = place_plates(plates, written)

    page = render_page(
        "report.html.jinja",
        scripts=SCRIPTS,
        data=page_data(run_dir, solved, problem, frontier, populations, commands),
        run=run_dir.resolve().name,
        solved=solved,
        dual=dual,
        demands=[_demand(bound) for bound in solved.constraints],
        evaluation=evaluation,
        is_trained=is_trained,
        tables=tables,
        stage1=[placed[plate.stem] for plate in stage1],
        stage2=[placed[plate.stem] for plate in stage2],
        spread=[placed[plate.stem] for plate in spread],
        documents=_documents(run_dir),
        categories=category_table(evaluation or dual, solved),
        examples=_examples(run_dir, solved),
        policy_examples=_policy_examples(run_dir),
        steps=_step_records(run_dir),
        inputs={**dual.get("inputs", {}), **(evaluation or {}).get("inputs", {})},
        environment={**dual.get("environment", {}), **(evaluation or {}).get("environment", {})},
    )
    path = output / "report.html"
    atomic_write_bytes(path, page.encode())
    return [path, *(path for paths in written.values() for path in paths)]


def save_plates(plates: Sequence[Plate], folder: Path) -> dict[str, list[Path]]:
    """Write the figures and what they show into a folder.

    Returns:
        Their files by stem: PNG, SVG, PDF and CSV.
    """
    written = {}
    for plate in plates:
        written[plate.stem] = [*save_figure(plate.figure, folder / plate.stem), folder / f"{plate.stem}.csv"]
        atomic_write_bytes(written[plate.stem][-1], plate.numbers.csv().encode())
    return written


def place_plates(plates: Sequence[Plate], written: Mapping[str, Sequence[Path]]) -> dict[str, PagePlate]:
    """The figures as a page holds them: those there is room for, the first ones first.

    Args:
        plates: the figures.
        written: as :func:`save_plates` has them.
    """
    placed = {}
    figures, tables = _MOST_FIGURE_BYTES, _MOST_TABLE_BYTES
    for plate in plates:
        _, svg, _, csv = written[plate.stem]
        picture, table = svg.read_bytes(), csv.read_bytes()
        has_picture, has_table = len(picture) <= figures, len(table) <= tables
        figures -= has_picture * len(picture)
        tables -= has_table * len(table)
        placed[plate.stem] = PagePlate(
            plate,
            data_uri(picture, "image/svg+xml") if has_picture else None,
            data_uri(table, "text/csv") if has_table else None,
        )
    return placed


def _documents(run_dir: Path) -> dict[str, str]:
    """The files with all numbers, as addresses that hold them, where they are not too large."""
    paths = [run_dir / "dual" / "dual.json", run_dir / "evaluation" / "evaluation.json"]
    there = [path for path in paths if path.is_file() and path.stat().st_size < _MOST_DOCUMENT_BYTES]
    return {path.name: data_uri(path.read_bytes(), "application/json") for path in there}


def _demand(bound: ReportedConstraint) -> tuple[str, str, str]:
    """The constraint as a sentence: what was demanded, of what, and where the reference policy stands."""
    digits = decimals(bound.reference, bound.threshold)
    asked, margin = bound.demanded.threshold, bound.demanded.margin
    stands = f"the reference is at {number(bound.reference, digits)} on the train prompts"
    if margin is not None:
        stands += f": {demanded(bound.direction, asked, digits)} there"
    what = f"{subject(bound.name, bound.stated)} {demand_in_words(bound.direction, asked, margin, digits)}"
    return what, " on average" if bound.stated.kind == "mean" else "", stands


def _examples(run_dir: Path, solved: ReportedSolution) -> list[PromptExamples]:
    return read_examples(run_dir / "tilted", solved, n_prompts=_EXAMPLE_PROMPTS, n_each=_EXAMPLES_EACH)


def _policy_examples(run_dir: Path) -> list[PolicyExamples]:
    return read_policy_examples(run_dir, n_prompts=_EXAMPLE_PROMPTS, n_each=_EXAMPLES_EACH)


def _step_records(run_dir: Path) -> list[_StepRecord]:
    records = []
    for name in _STEPS:
        if is_complete(run_dir / name):
            manifest = read_manifest(run_dir / name)
            records.append(
                _StepRecord(manifest.step, manifest.identity, manifest.wall_seconds, manifest.counts, manifest.inputs)
            )
    return records
