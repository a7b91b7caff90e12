"""What a table of results says, apart from where it is shown: the terminal and the page render the same cells.

Values are in the user's own direction and units. Slack is positive where a constraint is satisfied
(:mod:`pipeline.contracts.problem`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.contracts.problem import Direction
from pipeline.contracts.solution import SolvedConstraint
from pipeline.report.solved import ReportedConstraint, ReportedReward, ReportedSolution, Trust

_GUARDS = ("reserve", "assurance", "score_error", "response_bias")

Tone = Literal["good", "doubtful", "bad", "neutral"]

_TONES: Mapping[str, Tone] = {
    "satisfied": "good",
    "undecided": "doubtful",
    "violated": "bad",
    "binding": "neutral",
    "inactive": "neutral",
    "ok": "neutral",
    "weak": "doubtful",
    "unreliable": "bad",
}


@dataclass(frozen=True)
class Cell:
    """One cell: a value, and the detail shown below it."""

    value: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One score: its cells in the order of the table's header, and how its verdict is to be coloured."""

    cells: tuple[Cell, ...]
    tone: Tone = "neutral"


@dataclass(frozen=True)
class TableView:
    """A table of results.

    Attributes:
        title: what the table is about.
        header: one cell per column; the detail explains the detail of the cells below.
        rows: the reward, then the constraints.
        verdict: one sentence, or empty.
        tone: how the verdict is to be coloured.
        facts: label and text of each line below the table.
        warnings: what the reader must know before trusting the numbers.
    """

    title: str
    header: tuple[Cell, ...]
    rows: tuple[Row, ...]
    verdict: str
    tone: Tone
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def stage1_view(dual: Mapping[str, Any]) -> TableView:
    """The tilted optimum: what was demanded, the multipliers, and what is predicted.

    Args:
        dual: the content of ``dual/dual.json``.
    """
    solved = ReportedSolution.from_document(dual)
    reward = solved.reward
    digits = _reward_decimals(reward)
    rows = [
        Row(
            (
                Cell(reward.name, "reward"),
                Cell("maximise"),
                Cell(number(reward.reference, digits)),
                Cell(),
                Cell(number(reward.predicted, digits), interval(reward.predicted_ci95, digits)),
                Cell(number(reward.heldout, digits)),
            )
        )
    ]
    for bound in solved.constraints:
        digits = decimals(bound.reference, bound.threshold, bound.predicted, bound.predicted_ci95)
        lam_digits = decimals(0.0, bound.multiplier, bound.multiplier_ci95)
        verdict = binding_verdict(bound)
        rows.append(
            Row(
                (
                    Cell(bound.name, verdict),
                    Cell(
                        demanded(bound.direction, bound.demanded.threshold, digits),
                        as_given(bound.demanded.margin, digits),
                    ),
                    Cell(number(bound.reference, digits)),
                    Cell(number(bound.multiplier, lam_digits), interval(bound.multiplier_ci95, lam_digits)),
                    Cell(number(bound.predicted, digits), interval(bound.predicted_ci95, digits)),
                    Cell(number(bound.heldout, digits), _heldout_slack(bound, digits)),
                ),
                _TONES[verdict],
            )
        )
    return TableView(
        title=f"Stage 1: the tilted optimum, from {solved.n_samples:,} samples of {solved.n_prompts:,} prompts",
        header=(
            Cell("score", "verdict"),
            Cell("demanded", "as given"),
            Cell("reference"),
            Cell("lambda*", "95% interval"),
            Cell("predicted", "95% interval"),
            Cell("held-out", "slack"),
        ),
        rows=tuple(rows),
        verdict=_trust_sentence(solved.trust),
        tone=_TONES[solved.trust.verdict],
        facts=(
            ("reward", _predicted_reward(reward)),
            ("KL", _predicted_kl(solved)),
            ("ESS", _effective_sample_size(solved)),
            ("ladder", _ladder(solved)),
            *_safeguards(solved),
            (
                "solution",
                (
                    f"{solved.status}: KKT residual {solved.kkt_residual:.0e}, "
                    f"duality gap {solved.duality_gap:.0e}, beta {solved.beta:g}"
                ),
            ),
        ),
        warnings=tuple(text for text in solved.warnings if text not in solved.trust.reasons),
    )


def stage2_view(evaluation: Mapping[str, Any], dual: Mapping[str, Any]) -> TableView:
    """The trained policy: what was demanded, what the dual predicted for these prompts, and what came out.

    Args:
        evaluation: the content of ``evaluation/evaluation.json``.
        dual: the content of ``dual/dual.json`` it was trained from.
    """
    stage1 = ReportedSolution.from_document(dual)
    solved_bounds = {bound.name: bound for bound in stage1.constraints}
    reward = evaluation["reward"]
    digits = decimals(reward["reference"], reward["predicted"], reward["realised"], reward["ci95"])
    rows = [
        Row(
            (
                Cell(stage1.reward.name, "reward"),
                Cell("maximise"),
                Cell(),
                Cell(number(reward["reference"], digits)),
                Cell(number(reward["predicted"], digits)),
                Cell(number(reward["realised"], digits), interval(reward["ci95"], digits)),
            )
        )
    ]
    for bound in evaluation["constraints"]:
        solved = solved_bounds[bound["name"]]
        margin = bound.get("margin", solved.demanded.margin)
        digits = _realised_decimals(bound)
        lam_digits = decimals(0.0, solved.multiplier, solved.multiplier_ci95)
        rows.append(
            Row(
                (
                    Cell(bound["name"], bound["status"]),
                    Cell(demanded(bound["direction"], bound["threshold"], digits), as_given(margin, digits)),
                    Cell(number(solved.multiplier, lam_digits)),
                    Cell(number(bound["reference"], digits)),
                    Cell(number(bound["predicted"], digits)),
                    Cell(number(bound["realised"], digits), interval(bound["ci95"], digits)),
                ),
                _TONES[bound["status"]],
            )
        )
    return TableView(
        title=(
            f"Stage 2: the trained policy, on {evaluation['n_samples']:,} samples of "
            f"{evaluation['n_prompts']:,} test prompts"
        ),
        header=(
            Cell("score", "verdict"),
            Cell("demanded", "as given"),
            Cell("lambda*"),
            Cell("reference"),
            Cell("predicted"),
            Cell("realised", "95% interval"),
        ),
        rows=tuple(rows),
        verdict=verdict_sentence(evaluation),
        tone=_TONES[evaluation["status"]],
        facts=(
            ("reward", _realised_reward(stage1.reward.name, evaluation["reward"])),
            *_gains(stage1.reward.name, evaluation),
            ("KL", _realised_kl(evaluation["kl"])),
            ("closed fraction", _closed_fraction(evaluation["lagrangian"])),
            ("ESS", _effective_sample_size(stage1)),
        ),
        warnings=(*stage1.warnings, *evaluation.get("warnings", ())),
    )


def verdict_sentence(evaluation: Mapping[str, Any]) -> str:
    """The verdict on the trained policy, with the reason, as one line per constraint that is not satisfied."""
    bounds = evaluation["constraints"]
    status = evaluation["status"]
    if status == "satisfied":
        those = "the constraint" if len(bounds) == 1 else f"each of the {len(bounds)} constraints"
        return f"SATISFIED: for {those} the whole 95% interval is on the right side of the threshold."
    lines = []
    for bound in sorted(bounds, key=lambda bound: bound["status"] != status):  # the one that decides comes first
        if bound["status"] == "satisfied":
            continue
        digits = _realised_decimals(bound)
        threshold, found = number(bound["threshold"], digits), interval(bound["ci95"], digits)
        if bound["status"] == "undecided":
            lines.append(f"{bound['name']} cannot be told from its threshold: {threshold} lies inside {found}.")
        else:
            miss = number(abs(bound["realised"] - bound["threshold"]), digits)
            lines.append(
                f"{bound['name']} misses its threshold {threshold} by {miss}: all of {found} is on the wrong side."
            )
    return "\n".join([f"{status.upper()}: {lines[0]}", *lines[1:]])


def binding_verdict(bound: SolvedConstraint) -> str:
    """Whether a constraint costs reward: ``binding`` where its multiplier is positive."""
    return "binding" if bound.multiplier > 0 else "inactive"


def demanded(direction: Direction, threshold: float, digits: int) -> str:
    """``>= 0.400``: what the user asked for, without the safeguards of the dual."""
    return f"{direction} {number(threshold, digits)}"


def as_given(margin: float | None, digits: int) -> str:
    """``ref + 0.800`` where the threshold was given as a margin, else empty."""
    if margin is None:
        return ""
    return f"ref {'-' if margin < 0 else '+'} {number(abs(margin), digits)}"


@dataclass(frozen=True)
class CategoryRow:
    """One category: how many prompts it has, and each score's mean, before -> after."""

    category: str
    n_prompts: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class CategoryTable:
    """Means by category of prompt; ``heads`` name the scores."""

    heads: tuple[str, ...]
    rows: tuple[CategoryRow, ...]


def category_table(artifact: Mapping[str, Any], *, names: Sequence[str]) -> CategoryTable | None:
    """Means by category of a ``dual.json`` or an ``evaluation.json``; None where prompts have no categories.

    Args:
        artifact: the content of the file.
        names: the reward, then the constraints.
    """
    entries = artifact.get("by_category")
    if not entries:
        return None
    after = "realised" if "realised" in entries[0]["scores"][0] else "predicted"
    scores = [score for entry in entries for score in entry["scores"]]
    digits = {
        name: decimals([score[kind] for score in scores if score["name"] == name for kind in ("reference", after)])
        for name in names
    }
    rows = [
        CategoryRow(
            entry["category"] or "(none)",
            entry["n_prompts"],
            tuple(
                f"{number(score['reference'], digits[score['name']])} -> {number(score[after], digits[score['name']])}"
                for score in entry["scores"]
            ),
        )
        for entry in entries
    ]
    return CategoryTable(tuple(f"{name}, reference -> {after}" for name in names), tuple(rows))


def number(value: float | None, digits: int) -> str:
    """A number with a fixed count of decimals; a dash where there is none."""
    if value is None:
        return "-"
    text = f"{value:,.{digits}f}"
    # Rounding leaves "-0.000", which reads as a sign that means something.
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text


def signed(value: float, digits: int) -> str:
    """A number with its sign."""
    text = number(value, digits)
    return text if text.startswith("-") else f"+{text}"


def interval(ends: Sequence[float | None] | None, digits: int) -> str:
    """``[0.351, 0.449]``, or empty where there is none; an end that is null has no bound."""
    if ends is None:
        return ""
    low, high = ("inf" if end is None else number(end, digits) for end in ends)
    return f"[{low}, {high}]"


def decimals(*values: float | Sequence[float | None] | None) -> int:
    """Decimals that suit the spread of a row's values: three for the usual scores, more or fewer for other scales."""
    flat = list(_flatten(values))
    spread = max(flat) - min(flat) if flat else 0.0
    if spread <= 0 or not math.isfinite(spread):
        return 3
    if spread < 0.05:
        return min(8, 2 - math.floor(math.log10(spread)))
    return max(0, 3 - max(0, math.floor(math.log10(spread))))


def _flatten(values: Iterable[float | Sequence[float | None] | None]) -> Iterable[float]:
    for value in values:
        if isinstance(value, Sequence):
            yield from (one for one in value if one is not None)
        elif value is not None:
            yield value


def _realised_decimals(bound: Mapping[str, Any]) -> int:
    return decimals(bound["reference"], bound["threshold"], bound["realised"], bound["ci95"])


def _reward_decimals(reward: ReportedReward) -> int:
    return decimals(reward.reference, reward.predicted, reward.predicted_ci95, reward.heldout)


def _predicted_reward(reward: ReportedReward) -> str:
    digits = _reward_decimals(reward)
    tail = "" if reward.heldout is None else f" (held-out {number(reward.heldout, digits)})"
    return (
        f"{reward.name} {number(reward.reference, digits)} reference -> {number(reward.predicted, digits)} predicted"
        f"{tail}"
    )


def _realised_reward(name: str, reward: Mapping[str, Any]) -> str:
    digits = decimals(reward["reference"], reward["predicted"], reward["realised"], reward["ci95"])
    return (
        f"{name} {number(reward['reference'], digits)} reference -> {number(reward['predicted'], digits)} predicted "
        f"-> {number(reward['realised'], digits)} realised"
    )


def _heldout_slack(bound: ReportedConstraint, digits: int) -> str:
    """Slack on held-out prompts: for a margin, over the reference policy on those same prompts."""
    return "" if bound.heldout_slack is None else signed(bound.heldout_slack, digits)


def _gains(reward_name: str, evaluation: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Change against the reference policy, paired by prompt, where the evaluation has it."""
    parts = []
    for name, found in [(reward_name, evaluation["reward"]), *((b["name"], b) for b in evaluation["constraints"])]:
        if "improvement" in found:
            ends = found.get("improvement_ci95")
            digits = decimals(0.0, found["improvement"], ends)
            parts.append(f"{name} {signed(found['improvement'], digits)} {interval(ends, digits)}".rstrip())
    if parts:
        yield "gain", ", ".join(parts)


def _predicted_kl(solved: ReportedSolution) -> str:
    kl = solved.kl
    return f"{kl.predicted:.3f} nats a prompt from the reference (at most {kl.log_samples:.2f} can show)"


def _realised_kl(kl: Mapping[str, Any]) -> str:
    ends = interval(kl.get("realised_ci95"), 3)
    return f"{kl['predicted']:.3f} predicted -> {kl['realised']:.3f} realised {ends}".rstrip() + " nats a prompt"


def _closed_fraction(lagrangian: Mapping[str, Any]) -> str:
    fraction = lagrangian["closed_fraction"]
    if fraction is None:
        return "undefined: the reference is already the optimum"
    ends = interval(lagrangian.get("closed_fraction_ci95"), 2)
    return f"{fraction:.2f} {ends}".rstrip() + "  (0: the reference, 1: the tilted optimum)"


def _trust_sentence(trust: Trust) -> str:
    """Empty where there is nothing to say."""
    if trust.verdict == "ok":
        return ""
    lines = [f"{trust.verdict.upper()}: {trust.reasons[0]}.", *(f"{text}." for text in trust.reasons[1:])]
    if trust.advice:
        lines.append(f"Advice: {', '.join(trust.advice)}.")
    return "\n".join(lines)


def _ladder(solved: ReportedSolution) -> str:
    """How the multipliers move with the number of responses, and where they go."""
    rungs = solved.ladder.rungs
    parts = []
    for bound in solved.constraints:
        if not bound.multiplier:
            continue
        digits = decimals(0.0, bound.multiplier, bound.multiplier_ci95)
        path = " <- ".join(number(rung.multipliers[bound.name], digits) for rung in rungs)
        corrected = bound.multiplier_corrected
        tail = (
            ""
            if corrected is None
            else f"; corrected for finite responses, as the intervals are, {number(corrected, digits)}"
        )
        parts.append(f"{bound.name} {path}{tail}")
    responses = ", ".join(f"{rung.n_responses:g}" for rung in rungs)
    return "; ".join(parts) + f" (lambda* from {responses} responses)" if parts else "no multiplier is positive"


def _safeguards(solved: ReportedSolution) -> Iterable[tuple[str, str]]:
    parts = []
    for bound in solved.constraints:
        guard = {name: getattr(bound.safeguard, name) for name in _GUARDS}
        added = [f"{name.replace('_', ' ')} {amount:.3g}" for name, amount in guard.items() if amount]
        if added:
            parts.append(f"{bound.name} {' + '.join(added)} beyond the demand")
    if parts:
        yield "safeguards", f"{'; '.join(parts)}, for {solved.reward.price_of_safeguards:.3g} of reward"


def _effective_sample_size(solved: ReportedSolution) -> str:
    diagnostics = solved.diagnostics
    typical = math.exp(solved.kl.log_samples)  # geometric mean of the responses a prompt has
    return (
        f"median {diagnostics.ess_median:.1f} of {typical:.0f} responses; "
        f"below 2 on {100 * diagnostics.ess_fraction_below_2:.1f}% of prompts"
    )
