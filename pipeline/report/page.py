"""The report of a run: figures as files, and one HTML page that holds everything and asks the network for nothing."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.contracts.artifacts import atomic_write_bytes, is_complete, read_json, read_manifest
from pipeline.contracts.training_verdict import read_training_verdict
from pipeline.published import PublishedPoint
from pipeline.report.evaluated import read_evaluation
from pipeline.report.plates import stage1_plates, stage2_plates
from pipeline.report.readers import (
    PolicyExamples,
    PromptExamples,
    build_problem,
    read_examples,
    read_frontier,
    read_policy_examples,
    read_tilted_scores,
    sample_size_shares,
)
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

_STEPS = ("prompts", "samples", "dual", "tilted", "policy", "evaluation")
_EXAMPLE_PROMPTS = 3
_EXAMPLES_EACH = 2


@dataclass(frozen=True)
class _StepRecord:
    """What the page says about where a part of the run came from."""

    name: str
    identity: str
    seconds: float
    counts: Mapping[str, int]
    inputs: Mapping[str, str]


def write_report(
    run_dir: Path, *, output: Path, published: Mapping[str, Sequence[PublishedPoint]] = MappingProxyType({})
) -> list[Path]:
    """Write the figures of a run (PNG and SVG) and its page.

    Everything is recomputed from the artifacts. Before stage 2, without ``policy/`` and ``evaluation/``, the report
    covers stage 1.

    Args:
        run_dir: folder of the run, with ``dual/`` and ``tilted/``, and after stage 2 ``policy/`` and ``evaluation/``.
        output: folder to write ``report.html`` and ``figures/`` into.
        published: others' results by constraint, for its frontier.

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
    stage1 = stage1_plates(
        solved,
        build_problem(solved, scores),
        share_p=sample_size_shares(scores),
        frontier=read_frontier(run_dir / "dual" / "frontier.parquet", solved.names),
        evaluation=evaluation,
        published=published,
    )
    stage2 = stage2_plates(run_dir, solved.reward.name, evaluation)
    written = {plate.stem: save_figure(plate.figure, output / "figures" / plate.stem) for plate in stage1 + stage2}

    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,  # whatever the file is called
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    environment.filters["plain"] = _plain
    page = environment.get_template("report.html.jinja").render(
        run=run_dir.resolve().name,
        solved=solved,
        dual=dual,
        demands=[_demand(bound) for bound in solved.constraints],
        evaluation=evaluation,
        is_trained=is_trained,
        tables=tables,
        stage1=[(plate, _data_uri(written[plate.stem][0])) for plate in stage1],
        stage2=[(plate, _data_uri(written[plate.stem][0])) for plate in stage2],
        categories=category_table(evaluation or dual, names=[solved.reward.name, *solved.names]),
        examples=_examples(run_dir, solved),
        policy_examples=_policy_examples(run_dir),
        steps=_step_records(run_dir),
        inputs={**dual.get("inputs", {}), **(evaluation or {}).get("inputs", {})},
        environment={**dual.get("environment", {}), **(evaluation or {}).get("environment", {})},
    )
    path = output / "report.html"
    atomic_write_bytes(path, page.encode())
    return [path, *(path for paths in written.values() for path in paths)]


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


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters but for tabs and line breaks, and what turns the direction of the text around it."""


def _visible(value: Any) -> Any:
    """A text for the page: what no reader would see is shown as an escape."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), value)


def _plain(value: Any) -> str:
    """A diagnostic as text: numbers to four digits, in mappings and lists too."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _typeset(text: str) -> str:
    """The terminal's ASCII as print has it. Only for our own words and numbers."""
    text = re.sub(r"(?<![\w-])-(?=[\d])", "\N{MINUS SIGN}", text)
    for ascii_form, printed in (("lambda*", "λ*"), (">=", "≥"), ("<=", "≤"), ("->", "→"), ("ref - ", "ref − ")):
        text = text.replace(ascii_form, printed)
    return text
