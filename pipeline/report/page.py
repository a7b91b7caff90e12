"""The report of a run: figures as files, and one HTML page that holds everything and asks the network for nothing."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from pipeline.contracts.artifacts import atomic_write_bytes, is_complete, read_json, read_manifest
from pipeline.report.figures import (
    comparison_figure,
    dual_figure,
    frontier_figure,
    gold_figure,
    sample_size_figure,
    training_figure,
)
from pipeline.report.readers import (
    PolicyExamples,
    PromptExamples,
    build_comparisons,
    build_dual_curves,
    build_gold_comparisons,
    read_examples,
    read_frontiers,
    read_policy_examples,
    read_tilted_scores,
    read_training_curve,
    sample_size_shares,
)
from pipeline.report.style import save_figure
from pipeline.report.views import as_given, decimals, number, stage1_view, stage2_view

_STEPS = ("prompts", "samples", "dual", "tilted", "policy", "evaluation")
_EXAMPLE_PROMPTS = 3
_EXAMPLES_EACH = 2


@dataclass(frozen=True)
class _Plate:
    """A figure on its way to the page: file stem, what it shows, and how to read it."""

    stem: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class _StepRecord:
    """What the page says about where a part of the run came from."""

    name: str
    identity: str
    seconds: float
    counts: Mapping[str, int]
    inputs: Mapping[str, str]


def write_report(run_dir: Path, *, output: Path) -> list[Path]:
    """Write the figures of a run (PNG and SVG) and its page.

    Everything is recomputed from the artifacts. Before stage 2, without ``policy/`` and ``evaluation/``, the report
    covers stage 1.

    Args:
        run_dir: folder of the run, with ``dual/`` and ``tilted/``, and after stage 2 ``policy/`` and ``evaluation/``.
        output: folder to write ``report.html`` and ``figures/`` into.

    Returns:
        What was written: the page first.

    Raises:
        CorruptArtifactError: an artifact is missing, damaged or lacks a column.
    """
    dual = read_json(run_dir / "dual" / "dual.json")
    evaluation_path = run_dir / "evaluation" / "evaluation.json"
    evaluation = read_json(evaluation_path) if evaluation_path.is_file() else None
    names = [bound["name"] for bound in dual["constraints"]]

    stage1 = _stage1_plates(run_dir, dual, evaluation, names)
    stage2 = _stage2_plates(run_dir, dual, evaluation)
    written = {plate.stem: save_figure(plate.figure, output / "figures" / plate.stem) for plate in stage1 + stage2}

    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,  # whatever the file is called
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    environment.filters["plain"] = _plain
    page = environment.get_template("report.html.jinja").render(
        run=run_dir.resolve().name,
        dual=dual,
        demands=[_demand(bound) for bound in dual["constraints"]],
        evaluation=evaluation,
        tables=[stage2_view(evaluation, dual), stage1_view(dual)] if evaluation else [stage1_view(dual)],
        stage1=[(plate, _data_uri(written[plate.stem][0])) for plate in stage1],
        stage2=[(plate, _data_uri(written[plate.stem][0])) for plate in stage2],
        examples=_examples(run_dir, dual),
        policy_examples=_policy_examples(run_dir),
        steps=_step_records(run_dir),
        inputs={**dual.get("inputs", {}), **(evaluation or {}).get("inputs", {})},
        environment={**dual.get("environment", {}), **(evaluation or {}).get("environment", {})},
    )
    path = output / "report.html"
    atomic_write_bytes(path, page.encode())
    return [path, *(path for paths in written.values() for path in paths)]


def _stage1_plates(
    run_dir: Path, dual: Mapping[str, Any], evaluation: Mapping[str, Any] | None, names: Sequence[str]
) -> list[_Plate]:
    scores = read_tilted_scores(run_dir / "tilted", names)
    stems = _file_stems(names)
    plates = [
        _Plate(
            f"dual_{stems[curve.name]}",
            f"The dual along the multiplier of {curve.name}",
            "Top: the dual is convex and lambda* is its minimum; a flat valley means a multiplier the samples do not "
            "pin down. Bottom: the slack under the tilted policy; where the constraint binds it crosses zero at "
            "lambda*. The band is the 95% interval of lambda*. Other multipliers are held at their optimum.",
            dual_figure(curve),
        )
        for curve in build_dual_curves(dual, scores)
    ]
    plates += [
        _Plate(
            f"frontier_{stems[curve.bound.name]}",
            f"What {curve.bound.name} costs",
            "Each point of the line is a solved problem with another threshold: the largest predicted gain in reward "
            "for that level of the constraint (the whole line is in frontier.parquet). "
            "The shaded side does not meet this run's threshold. Below, the price: "
            "how much reward one more unit of the constraint costs there. The hollow point is the same prediction for "
            "the test prompts; the realised one, with 95% intervals, falls short of it by what training left undone.",
            frontier_figure(curve),
        )
        for curve in read_frontiers(run_dir / "dual" / "frontier.parquet", dual, evaluation)
    ]
    plates.append(
        _Plate(
            "effective_sample_size",
            "How many samples carry the prediction",
            "For each prompt, 1 over the sum of squared weights, as a share of its samples. Prompts far to the left "
            "rest on a few responses: their predictions are noisy, and more samples or a larger beta help.",
            sample_size_figure(sample_size_shares(scores)),
        )
    )
    return plates


def _stage2_plates(run_dir: Path, dual: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[_Plate]:
    plates = []
    if evaluation is not None:
        plates.append(
            _Plate(
                "predicted_realised",
                "Predicted and realised",
                "Means on the test prompts, with 95% intervals clustered by prompt. A constraint is satisfied when "
                "the whole interval is on the white side of its threshold.",
                comparison_figure(build_comparisons(evaluation, dual["reward"]["name"])),
            )
        )
        gold = build_gold_comparisons(evaluation, dual["reward"]["name"])
        if gold:
            plates.append(
                _Plate(
                    "gold",
                    "Score models and the ground truth",
                    "How the means moved by the score models that were optimised, and by the ground truth they stand "
                    "for. Movement in opposite directions is over-optimisation of the score model.",
                    gold_figure(gold),
                )
            )
    log = run_dir / "policy" / "training_log.json"
    if log.is_file():
        plates.append(
            _Plate(
                "training",
                "The training run",
                "Training loss by step, and the objective on prompts held out of training, by which the checkpoint "
                "was chosen. A held-out line that turns up while the training line falls is over-fitting.",
                training_figure(read_training_curve(log)),
            )
        )
    return plates


def _demand(bound: Mapping[str, Any]) -> tuple[str, str]:
    """The constraint as a sentence: what was demanded, and where the reference policy stands."""
    digits = decimals(bound["reference"], bound["threshold"])
    given = as_given(bound, digits)
    demanded = f"{bound['direction']} {number(bound['threshold'], digits)}"
    stands = f"the reference is at {number(bound['reference'], digits)}"
    return f"{bound['name']} {demanded}", f"given as {given}; {stands}" if given else stands


def _examples(run_dir: Path, dual: Mapping[str, Any]) -> list[PromptExamples]:
    return read_examples(run_dir / "tilted", dual, n_prompts=_EXAMPLE_PROMPTS, n_each=_EXAMPLES_EACH)


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


def _file_stems(names: Sequence[str]) -> dict[str, str]:
    """A file name for each score: its own where that is safe, numbered where two would collide."""
    stems: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        taken = {other.lower() for other in stems.values()}
        stems[name] = stem if stem.lower() not in taken else f"{stem}_{len(stems)}"
    return stems


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


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
