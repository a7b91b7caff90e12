"""The figures of each stage with their titles and captions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from pipeline.contracts.arrays import FloatArray
from pipeline.published import PublishedPoint
from pipeline.report.figures import (
    ScoreDistribution,
    comparison_figure,
    distribution_figure,
    dual_figure,
    frontier_figure,
    gold_figure,
    ladder_figure,
    sample_size_figure,
    training_figure,
)
from pipeline.report.plate_numbers import (
    Numbers,
    comparison_numbers,
    distribution_numbers,
    dual_numbers,
    frontier_numbers,
    gold_numbers,
    ladder_numbers,
    sample_size_numbers,
    training_numbers,
)
from pipeline.report.readers import (
    build_comparisons,
    build_dual_curves,
    build_frontier_curves,
    build_gold_comparisons,
    build_ladder_curves,
    read_training_curve,
)
from pipeline.report.solved import ReportedSolution
from stage1_dual.dual import DualProblem

# Points of a curve of the dual, each a pass over the samples; fewer where a pass reads the disk.
_CURVE_POINTS = 81
_FEW_CURVE_POINTS = 15
_MANY_SAMPLES = 10_000_000


@dataclass(frozen=True)
class Plate:
    """A figure on its way to the page.

    Attributes:
        stem: of its files.
        title: what it shows.
        caption: how to read it.
        figure: the figure.
        numbers: what it shows, in words and as a table.
    """

    stem: str
    title: str
    caption: str
    figure: Figure
    numbers: Numbers

    @property
    def values(self) -> str:
        """What it shows in words."""
        return self.numbers.words


def stage1_plates(
    solved: ReportedSolution,
    problem: DualProblem,
    *,
    share_p: FloatArray,
    frontier: pa.Table,
    evaluation: Mapping[str, Any] | None,
    published: Mapping[str, Sequence[PublishedPoint]] = MappingProxyType({}),
) -> list[Plate]:
    """The figures of the dual.

    Args:
        solved: the solution.
        problem: what was solved.
        share_p: effective sample size over number of samples of each prompt, shape (p,).
        frontier: the content of ``frontier.parquet``.
        evaluation: the content of ``evaluation.json``, or None before stage 2.
        published: others' results by constraint.
    """
    stems = _file_stems(solved.names)
    n_responses = float(np.median(problem.samples.counts_p))
    n_points = _CURVE_POINTS if problem.n_samples < _MANY_SAMPLES else _FEW_CURVE_POINTS
    plates = [
        Plate(
            f"dual_{stems[curve.name]}",
            f"The dual along the multiplier of {curve.name}",
            "Top: the dual is convex and lambda* is its minimum; a flat valley means a multiplier the samples do not "
            "pin down. Bottom: the slack under the tilted policy; where the constraint binds it crosses zero at "
            "lambda*. The band is the 95% interval of lambda*, moved by the correction for finitely many responses "
            "where there is one. Other multipliers are held at their optimum.",
            dual_figure(curve),
            dual_numbers(curve),
        )
        for curve in build_dual_curves(solved, problem, n_points=n_points)
    ]
    plates += [
        Plate(
            f"frontier_{stems[curve.bound.name]}",
            f"What {curve.bound.name} costs",
            "Each point of the line is a solved problem with another threshold: the largest predicted gain in reward "
            "for that level of the constraint (the whole line is in frontier.parquet). "
            "The shaded side does not meet the demand. Below, the price: "
            "how much reward one more unit of the constraint costs there."
            + (_OUTCOMES if curve.realised is not None else "")
            + _published_caption(curve.published, alone=len(solved.constraints) == 1),
            frontier_figure(curve),
            frontier_numbers(curve),
        )
        for curve in build_frontier_curves(frontier, solved, evaluation, published)
    ]
    plates.append(
        Plate(
            "effective_sample_size",
            "How many samples carry the prediction",
            "For each prompt, 1 over the sum of squared weights, as a share of its samples. Prompts far to the left "
            "rest on a few responses: their predictions are noisy, and more samples or a larger beta help. Left of "
            "the broken line a prompt leans on fewer than two.",
            sample_size_figure(share_p, n_responses=n_responses),
            sample_size_numbers(share_p, n_responses=n_responses),
        )
    )
    plates += [
        Plate(
            f"ladder_{stems[curve.name]}",
            f"How lambda* of {curve.name} depends on the number of responses",
            "Lambda* solved again on halves and quarters of each prompt's responses, against one over their number. A "
            "steep line is bias that is still in lambda*; the line through the two first rungs ends at the corrected "
            "value. The 95% interval is over prompts: at the corrected value, or, where there is none, at the one on "
            "all responses, whose bias it does not know.",
            ladder_figure(curve),
            ladder_numbers(curve),
        )
        for curve in build_ladder_curves(solved)
    ]
    return plates


_OUTCOMES = (
    " The ring is the same prediction for the test prompts; the diamond, with 95% intervals, is what the trained "
    "policy does there. Where they lie on each other an inset enlarges them."
)


def _published_caption(published: Sequence[PublishedPoint], *, alone: bool) -> str:
    if not published:
        return ""
    papers = ", ".join(sorted({f"arXiv {point.paper}" for point in published}))
    return (
        f" The thin grey markers are policies that {papers} reports, as gains over its own reference: from other "
        "samples, test prompts and training seeds, some read off its plots."
        + ("" if alone else " Each met demands of its own on the other constraints, where the line meets this run's.")
    )


def distribution_plate(distributions: Sequence[ScoreDistribution]) -> Plate:
    """The scores under the policies there are."""
    return Plate(
        "distributions",
        "The scores under each policy",
        "Every prompt counts the same; the outermost bins hold what lies beyond. A bound on a mean says nothing of "
        "the tails: look at what is left on the wrong side of the dotted demand.",
        distribution_figure(distributions),
        distribution_numbers(distributions),
    )


def stage2_plates(run_dir: Path, solved: ReportedSolution, evaluation: Mapping[str, Any] | None) -> list[Plate]:
    """The figures of training and evaluation, as far as there are any."""
    plates = []
    reward_name = solved.reward.name
    if evaluation is not None:
        comparisons = build_comparisons(evaluation, solved)
        plates.append(
            Plate(
                "predicted_realised",
                "Predicted and realised",
                "On the test prompts, with 95% intervals clustered by prompt; where a margin is demanded, of the "
                "difference to the reference. A constraint is satisfied when the whole interval of the realised "
                "value is on the white side of its threshold.",
                comparison_figure(comparisons),
                comparison_numbers(comparisons),
            )
        )
        gold = build_gold_comparisons(evaluation, reward_name)
        if gold:
            plates.append(
                Plate(
                    "gold",
                    "Score models and the ground truth",
                    "How the means moved by the score models that were optimised, and by the ground truth they stand "
                    "for. Movement in opposite directions is over-optimisation of the score model.",
                    gold_figure(gold),
                    gold_numbers(gold),
                )
            )
    log = run_dir / "policy" / "training_log.json"
    if log.is_file():
        curve = read_training_curve(log)
        plates.append(
            Plate(
                "training",
                "The training run",
                "Top: the training loss. Below, estimated on prompts held out of training: the gap to the tilted "
                "optimum, by which the checkpoint was chosen, and the closed fraction. A gap that turns up while the "
                "training loss falls is over-fitting.",
                training_figure(curve),
                training_numbers(curve),
            )
        )
    return plates


_STEM_LENGTH = 100
"""As long as the name of a scorer may be; the columns of a table may have longer ones than a file's name may be."""


def _file_stems(names: Sequence[str]) -> dict[str, str]:
    """A file name for each score: its own where that is safe, numbered where two would collide."""
    stems: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_STEM_LENGTH]
        taken = {other.lower() for other in stems.values()}
        stems[name] = stem if stem.lower() not in taken else f"{stem}_{len(stems)}"
    return stems
