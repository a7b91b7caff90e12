"""What a figure shows, in words for readers who do not see it and as a table for those who draw it themselves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.report.figures import (
    Comparison,
    DualCurve,
    FrontierCurve,
    GoldComparison,
    LadderCurve,
    Measured,
    Outcome,
    ScoreDistribution,
    TrainingCurve,
)

Value = str | float | None


@dataclass(frozen=True)
class Numbers:
    """The numbers of a figure.

    Attributes:
        words: its values, as whole sentences.
        head: names of the columns.
        rows: the table.
    """

    words: str
    head: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    def csv(self) -> str:
        """The table as CSV: numbers in full, empty where there is none."""
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(self.head)
        writer.writerows([["" if value is None or value != value else value for value in row] for row in self.rows])
        return sink.getvalue()


def dual_numbers(curve: DualCurve) -> Numbers:
    """Of a curve of the dual."""
    at_star = int(np.argmin(np.abs(curve.lam_k - curve.lam_star.value)))
    return Numbers(
        f"lambda* is {_measured(curve.lam_star)}; D is {curve.dual_value_k[at_star]:.4g} and the slack "
        f"{_rounded(curve.slack_k[at_star])} there.",
        ("multiplier", "dual_value", "slack"),
        _rows(curve.lam_k, curve.dual_value_k, curve.slack_k),
    )


def frontier_numbers(curve: FrontierCurve) -> Numbers:
    """Of a frontier; the outcomes of the run stand below the points of the line."""
    outcomes = {
        "reference": curve.reference,
        "predicted": curve.predicted,
        "predicted on test prompts": curve.predicted_test,
        "realised": curve.realised,
    }
    there = {name: one for name, one in outcomes.items() if one is not None}
    said = "; ".join(
        f"{name} {_measured(one.score)} at a gain of {_measured(one.reward)}" for name, one in there.items()
    )
    points = [("frontier", *row) for row in _rows(curve.score_k, curve.reward_k, curve.multiplier_k)]
    return Numbers(
        f"{curve.bound.name} must be {curve.bound.direction} {curve.bound.threshold:.3f}: {said}.",
        ("what", "score", "gain_in_reward", "multiplier", "score_low", "score_high", "gain_low", "gain_high"),
        (
            *((*row, None, None, None, None) for row in points),
            *(_outcome_row(name, one) for name, one in there.items()),
        ),
    )


def _outcome_row(name: str, one: Outcome) -> tuple[Value, ...]:
    return (name, one.score.value, one.reward.value, None, *_ends(one.score), *_ends(one.reward))


def sample_size_numbers(share_p: FloatArray, *, n_responses: float) -> Numbers:
    """Of a histogram of effective sample sizes."""
    counts, edges = np.histogram(share_p, bins=np.linspace(0.0, 1.0, 26))
    below = float(np.mean(share_p * n_responses < 2))
    return Numbers(
        f"The median prompt uses {100 * float(np.median(share_p)):.0f}% of its {n_responses:g} responses; "
        f"{100 * below:.1f}% of the prompts lean on fewer than two.",
        ("from", "to", "prompts"),
        _rows(edges[:-1], edges[1:], counts.astype(np.float64)),
    )


def ladder_numbers(curve: LadderCurve) -> Numbers:
    """Of a ladder."""
    rungs = ", ".join(
        f"{value:.3f} from {size:g}" for size, value in zip(curve.responses_r, curve.multiplier_r, strict=True)
    )
    tail = "" if curve.corrected is None else f"; corrected {curve.corrected:.3f}"
    return Numbers(
        f"lambda* is {rungs} responses{tail}.",
        ("responses", "multiplier"),
        (
            *_rows(curve.responses_r, curve.multiplier_r),
            *([("corrected", curve.corrected)] if curve.corrected is not None else []),
        ),
    )


def training_numbers(curve: TrainingCurve) -> Numbers:
    """Of a training run."""
    kept = int(np.argmin(np.abs(curve.heldout_step_e - curve.chosen_step)))
    closed = curve.closed_fraction_e
    tail = "" if closed is None else f", the closed fraction {closed[kept]:.2f}"
    loss = [("loss", step, value) for step, value in _rows(curve.step_t, curve.loss_t)]
    gap = [("held_out_gap", step, value) for step, value in _rows(curve.heldout_step_e, curve.heldout_e)]
    fraction = [] if closed is None else [("closed_fraction", *row) for row in _rows(curve.heldout_step_e, closed)]
    return Numbers(
        f"The checkpoint of step {curve.chosen_step} was kept: the gap on held-out prompts is "
        f"{curve.heldout_e[kept]:.3f} nats there{tail}, from {curve.heldout_e[0]:.3f} at step "
        f"{curve.heldout_step_e[0]:g}.",
        ("what", "step", "value"),
        (*loss, *gap, *fraction),
    )


def comparison_numbers(comparisons: Sequence[Comparison]) -> Numbers:
    """Of predicted and realised means."""
    said: list[str] = []
    rows: list[tuple[Value, ...]] = []
    for one in comparisons:
        bound = "" if one.bound is None else f", {one.bound.direction} {one.bound.threshold:.3f} demanded"
        said.append(
            f"{one.name}: reference {_measured(one.reference)}, predicted {_measured(one.predicted)}, realised "
            f"{_measured(one.realised)}{bound}."
        )
        for name, found in (("reference", one.reference), ("predicted", one.predicted), ("realised", one.realised)):
            threshold = None if one.bound is None else one.bound.threshold
            rows.append((one.name, name, found.value, *_ends(found), threshold))
    return Numbers(" ".join(said), ("score", "what", "value", "low", "high", "threshold"), tuple(rows))


def gold_numbers(comparisons: Sequence[GoldComparison]) -> Numbers:
    """Of score models and the ground truth."""
    return Numbers(
        " ".join(
            f"{one.name}: by the score model {one.proxy[0]:.3f} to {one.proxy[1]:.3f}, by the ground truth "
            f"{one.gold[0]:.3f} to {one.gold[1]:.3f}."
            for one in comparisons
        ),
        ("score", "by", "reference", "realised"),
        tuple(
            row
            for one in comparisons
            for row in ((one.name, "score model", *one.proxy), (one.name, "ground truth", *one.gold))
        ),
    )


def distribution_numbers(distributions: Sequence[ScoreDistribution]) -> Numbers:
    """Of distributions of scores."""
    said: list[str] = []
    rows: list[tuple[Value, ...]] = []
    for one in distributions:
        parts = []
        for name, share_b in zip(one.policies, one.share_kb, strict=True):
            where = np.interp([0.1, 0.5, 0.9], np.cumsum([0.0, *share_b]), one.edges_e)
            parts.append(f"{name} {where[1]:.2f} ({where[0]:.2f} to {where[2]:.2f})")
            rows += [(one.name, name, *row) for row in _rows(one.edges_e[:-1], one.edges_e[1:], share_b)]
        said.append(f"{one.name}, median and middle 80%: {', '.join(parts)}.")
    return Numbers(" ".join(said), ("score", "policy", "from", "to", "share"), tuple(rows))


def _rows(*columns: FloatArray) -> tuple[tuple[Value, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in zip(*columns, strict=True))


def _ends(found: Measured) -> tuple[Value, Value]:
    return (None, None) if found.ci95 is None else found.ci95


def _measured(found: Measured) -> str:
    ends = "" if found.ci95 is None else f" [{found.ci95[0]:.3f}, {found.ci95[1]:.3f}]"
    return f"{_rounded(found.value)}{ends}"


def _rounded(value: float) -> str:
    return f"{value + 0.0:.3f}".replace("-0.000", "0.000")
