"""What a table of results says, apart from where it is shown: the terminal and the page render the same cells.

Values are in the user's own direction and units. Slack is positive where a constraint is satisfied
(:mod:`pipeline.contracts.problem`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.contracts.errors import printable
from pipeline.contracts.problem import Direction, sign_of
from pipeline.contracts.solution import SolvedConstraint
from pipeline.contracts.statistics import Statistic
from pipeline.contracts.training_verdict import TrainingVerdict
from pipeline.report.solved import ReportedConstraint, ReportedReward, ReportedSolution, Trust

_GUARDS = ("reserve", "assurance", "score_error", "score_noise", "response_bias")

Tone = Literal["good", "doubtful", "bad", "neutral"]

_HOW_MUCH: Mapping[Direction, str] = {">=": "at least", "<=": "at most", "=": "exactly"}

_TONES: Mapping[str, Tone] = {
    "satisfied": "good",
    "undecided": "doubtful",
    "violated": "bad",
    "binding": "neutral",
    "inactive": "neutral",
    "ok": "good",
    "weak": "doubtful",
    "unreliable": "bad",
    "paid": "good",
    "did not pay": "bad",
}


_MOST_CATEGORY_CELLS = 3000
_FEWEST_CATEGORIES = 20
"""Categories that are shown however many scores there are."""
_CATEGORY_LENGTH = 200


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
class Badge:
    """One verdict, shown above everything else.

    Attributes:
        label: what is judged.
        verdict: the word.
        tone: how it is to be coloured.
        reasons: whole sentences.
        advice: what to do about it; empty where there is nothing to do.
    """

    label: str
    verdict: str
    tone: Tone
    reasons: tuple[str, ...] = ()
    advice: str = ""


@dataclass(frozen=True)
class TableView:
    """A table of results.

    Attributes:
        title: what the table is about.
        header: one cell per column; the detail explains the detail of the cells below.
        rows: the reward, then the constraints.
        facts: label and text of each line below the table.
        warnings: what the reader must know before trusting the numbers.
        badges: the verdicts, shown above the table.
        answers: sentences that say what was demanded and what came out, below the badges.
    """

    title: str
    header: tuple[Cell, ...]
    rows: tuple[Row, ...]
    facts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    badges: tuple[Badge, ...] = ()
    answers: tuple[str, ...] = ()


def printable_view(view: TableView) -> TableView:
    """A table as a terminal may have it: users' names and warnings hold nothing that a terminal would follow."""

    def plain(cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
        return tuple(Cell(printable(cell.value), printable(cell.detail)) for cell in cells)

    return replace(
        view,
        title=printable(view.title),
        header=plain(view.header),
        rows=tuple(replace(row, cells=plain(row.cells)) for row in view.rows),
        facts=tuple((printable(label), printable(text)) for label, text in view.facts),
        warnings=tuple(map(printable, view.warnings)),
        badges=tuple(map(_printable_badge, view.badges)),
        answers=tuple(map(printable, view.answers)),
    )


def _printable_badge(badge: Badge) -> Badge:
    reasons = tuple(map(printable, badge.reasons))
    return replace(badge, verdict=printable(badge.verdict), reasons=reasons, advice=printable(badge.advice))


def badges(
    trust: Trust, evaluation: Mapping[str, Any] | None, training: TrainingVerdict | None = None
) -> tuple[Badge, ...]:
    """The verdicts on a run: of the evaluation and on lambda* always, on training where there is one.

    A good verdict has no colour of its own beside one that is not: green never outshines red.

    Args:
        trust: of its dual.
        evaluation: the content of ``evaluation.json``, or None before there is one.
        training: whether training paid, or None before it, or where an older version did not judge.
    """
    if evaluation is None:
        found = [Badge("Evaluation", "not yet", "neutral", ("What follows is predicted, not realised.",))]
    else:
        reasons = tuple(verdict_sentence(evaluation).split("\n"))
        found = [Badge("Evaluation", evaluation["status"], _TONES[evaluation["status"]], reasons)]
    found.append(
        Badge(
            "Trust in lambda*",
            trust.verdict,
            _TONES[trust.verdict],
            tuple(f"{_capitalised(text)}." for text in trust.reasons),
            # Files of older versions may begin with the second half of an alternative.
            _capitalised(", ".join(trust.advice).removeprefix("or ")) + "." if trust.advice else "",
        )
    )
    if training is not None:
        found.append(
            Badge(
                "Training",
                training.verdict,
                _TONES[training.verdict],
                tuple(f"{_capitalised(text)}." for text in training.reasons),
                f"{_capitalised(', '.join(training.advice))}." if training.advice else "",
            )
        )
    if any(badge.tone in {"doubtful", "bad"} for badge in found):
        found = [replace(badge, tone="neutral") if badge.tone == "good" else badge for badge in found]
    return tuple(found)


def badge_lines(badge: Badge) -> list[str]:
    """A badge as lines of text: the verdict with its reasons, then the advice."""
    lines = [f"{badge.label}: {badge.verdict.upper()}", *badge.reasons]
    head = ". ".join(lines[:2]) + ("" if badge.reasons else ".")
    return [head, *lines[2:], *([f"Advice: {badge.advice}"] if badge.advice else [])]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def stage1_view(dual: Mapping[str, Any], training: TrainingVerdict | None = None) -> TableView:
    """The tilted optimum: what was demanded, the multipliers, and what is predicted.

    Args:
        dual: the content of ``dual/dual.json``.
        training: whether training paid, where a policy is trained and not evaluated yet.
    """
    solved = ReportedSolution.from_document(dual)
    reward = solved.reward
    digits = _reward_decimals(reward)
    predicted, ends = _prediction(solved, reward)
    rows = [
        Row(
            (
                Cell(reward.name, "reward"),
                Cell("maximise"),
                Cell(number(reward.reference, digits)),
                Cell(),
                Cell(number(predicted, digits), interval(ends, digits)),
                Cell(number(reward.heldout, digits)),
            )
        )
    ]
    answers = []
    for bound in solved.constraints:
        digits = decimals(bound.reference, bound.threshold, bound.predicted, bound.predicted_ci95)
        verdict = binding_verdict(bound)
        show = signed if bound.margin is not None else number
        predicted, ends = _predicted_against_demand(solved, bound)
        heldout = _heldout_against_demand(bound)
        rows.append(
            Row(
                (
                    Cell(bound.name, verdict),
                    _demand_cell(bound.direction, bound.demanded.threshold, bound.demanded.margin, digits),
                    Cell(number(bound.reference, digits)),
                    _multiplier_cell(bound),
                    Cell(show(predicted, digits), interval(ends, digits)),
                    Cell("-" if heldout is None else show(heldout, digits), _heldout_slack(bound, digits)),
                ),
                _TONES[verdict],
            )
        )
        tail = "" if heldout is None else f", on held-out prompts {show(heldout, digits)}"
        asked = demand_in_words(bound.direction, bound.demanded.threshold, bound.demanded.margin, digits)
        answers.append(
            f"{subject(bound.name, bound.stated)}: {asked} demanded; predicted "
            f"{_with_interval(show(predicted, digits), ends, digits)}{tail}."
        )
    return TableView(
        title=f"Stage 1: the tilted optimum, from {solved.n_samples:,} samples of {solved.n_prompts:,} prompts",
        header=(
            Cell("score", "verdict"),
            Cell("demanded", "threshold"),
            Cell("reference"),
            Cell("lambda*", "95% interval"),
            Cell("predicted", "95% interval"),
            Cell("held-out", "slack"),
        ),
        rows=tuple(rows),
        facts=(
            ("reward", _predicted_reward(solved)),
            *_bridge(solved, None),
            ("KL", _predicted_kl(solved)),
            ("ESS", _effective_sample_size(solved)),
            ("ladder", _ladder(solved)),
            *_corrections(solved),
            *_safeguards(solved),
            (
                "solution",
                (
                    f"{solved.status}: KKT residual {solved.kkt_residual:.0e}, "
                    f"duality gap {solved.duality_gap:.0e}, beta {solved.beta:g}{_budget(solved)}"
                ),
            ),
            *_certified_tails(solved),
        ),
        warnings=_other_warnings(solved),
        badges=badges(solved.trust, None, training),
        answers=tuple(answers),
    )


def stage2_view(
    evaluation: Mapping[str, Any], dual: Mapping[str, Any], training: TrainingVerdict | None = None
) -> TableView:
    """The trained policy: what was demanded, what the dual predicted for these prompts, and what came out.

    Constraints that are margins are shown as such throughout, over the reference on the same prompts: their absolute
    thresholds differ between train and test prompts, what was demanded does not.

    Args:
        evaluation: the content of ``evaluation/evaluation.json``.
        dual: the content of ``dual/dual.json`` it was trained from.
        training: whether training paid, or None where that was not judged.
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
    answers = list(_reward_answer(stage1.reward.name, reward))
    for bound in evaluation["constraints"]:
        solved = solved_bounds[bound["name"]]
        digits = _realised_decimals(bound)
        found = _Realised.of(bound, solved)
        rows.append(
            Row(
                (
                    Cell(bound["name"], bound["status"]),
                    _demand_cell(bound["direction"], bound["threshold"], found.margin, digits),
                    _multiplier_cell(solved, has_interval=False),
                    Cell(number(bound["reference"], digits)),
                    Cell(found.show(found.predicted, digits)),
                    Cell(found.show(found.realised, digits), interval(found.ci95, digits)),
                ),
                _TONES[bound["status"]],
            )
        )
        asked = demand_in_words(bound["direction"], bound["threshold"], found.margin, digits)
        answers.append(
            f"{subject(bound['name'], solved.stated)}: {asked} demanded; realised "
            f"{_with_interval(found.show(found.realised, digits), found.ci95, digits)}."
        )
    verdicts = badges(stage1.trust, evaluation, training)
    if all(badge.tone != "good" for badge in verdicts):
        rows = [replace(row, tone="neutral") if row.tone == "good" else row for row in rows]
    return TableView(
        title=(
            f"Stage 2: the trained policy, on {evaluation['n_samples']:,} samples of "
            f"{evaluation['n_prompts']:,} test prompts"
        ),
        header=(
            Cell("score", "verdict"),
            Cell("demanded", "threshold"),
            Cell("lambda*"),
            Cell("reference"),
            Cell("predicted"),
            Cell("realised", "95% interval"),
        ),
        rows=tuple(rows),
        facts=(
            ("reward", _realised_reward(stage1.reward.name, evaluation["reward"])),
            *_bridge(stage1, evaluation),
            ("KL", _realised_kl(evaluation["kl"])),
            ("closed fraction", _closed_fraction(evaluation["lagrangian"])),
            ("ESS", _effective_sample_size(stage1)),
        ),
        warnings=(*_other_warnings(stage1), *evaluation.get("warnings", ())),
        badges=verdicts,
        answers=tuple(answers),
    )


@dataclass(frozen=True)
class _Realised:
    """What an evaluation found of a constraint, as its demand was made: a margin, or an absolute value.

    Attributes:
        margin: that was demanded, or None for an absolute threshold.
        predicted: by the dual for these prompts.
        realised: by the policy.
        ci95: its interval.
    """

    margin: float | None
    predicted: float
    realised: float
    ci95: Sequence[float | None]

    @classmethod
    def of(cls, bound: Mapping[str, Any], solved: SolvedConstraint | None = None) -> _Realised:
        """Of an entry of ``evaluation.json``; those of older versions have no margin, the solution has."""
        margin = bound.get("margin", None if solved is None else solved.demanded.margin)
        # The interval of a margin is the paired difference's, moved by the reference mean.
        origin = 0.0 if margin is None else bound["reference"]
        return cls(
            margin=margin,
            predicted=bound["predicted"] - origin,
            realised=bound["realised"] - origin,
            ci95=[end - origin for end in bound["ci95"]],
        )

    def show(self, value: float, digits: int) -> str:
        """A value of its kind: with its sign where it is a difference."""
        return number(value, digits) if self.margin is None else signed(value, digits)


def verdict_sentence(evaluation: Mapping[str, Any]) -> str:
    """Why the verdict on the trained policy is what it is, one line per constraint that is not satisfied."""
    bounds = evaluation["constraints"]
    status = evaluation["status"]
    if status == "satisfied":
        those = "the constraint" if len(bounds) == 1 else f"each of the {len(bounds)} constraints"
        those += "" if evaluation.get("kl", {}).get("budget") is None else " and the KL budget"
        side = "within the tolerance of" if all(one["direction"] == "=" for one in bounds) else "on the right side of"
        return f"For {those} the whole 95% interval is {side} what was demanded."
    lines = []
    for bound in sorted(bounds, key=lambda bound: bound["status"] != status):  # the one that decides comes first
        if bound["status"] == "satisfied":
            continue
        digits, found = _realised_decimals(bound), _Realised.of(bound)
        asked = bound["threshold"] if found.margin is None else found.margin
        ends = interval(found.ci95, digits)
        tolerance = bound.get("tolerance")
        if tolerance is not None:
            near = f"{found.show(asked, digits)} +- {number(tolerance, digits)}"
            lines.append(
                f"{bound['name']} cannot be told from its demand: {ends} lies partly outside {near}."
                if bound["status"] == "undecided"
                else f"{bound['name']} misses its demand of {near}: all of {ends} is outside."
            )
        elif bound["status"] == "undecided":
            lines.append(
                f"{bound['name']} cannot be told from its demand: {found.show(asked, digits)} lies inside {ends}."
            )
        else:
            miss = number(abs(found.realised - asked), digits)
            lines.append(
                f"{bound['name']} misses its demand of {found.show(asked, digits)} by {miss}: all of {ends} is on the "
                "wrong side."
            )
    kl = evaluation.get("kl", {})
    if kl.get("status") not in (None, "satisfied"):
        lines.append(
            f"The KL to the reference is {kl['status']}: {interval(kl['realised_ci95'], 3)} nats, and the budget is "
            f"{kl['budget']:g}."
        )
    return "\n".join(lines)


def binding_verdict(bound: SolvedConstraint) -> str:
    """Whether a constraint costs reward: ``binding`` where its multiplier is not 0."""
    return "binding" if bound.multiplier else "inactive"


def demanded(direction: Direction, threshold: float, digits: int) -> str:
    """``>= 0.400``: what the user asked for, without the safeguards of the dual."""
    return f"{direction} {number(threshold, digits)}"


def as_given(margin: float | None, digits: int) -> str:
    """``ref + 0.800`` where the threshold was given as a margin, else empty."""
    if margin is None:
        return ""
    return f"ref {'-' if margin < 0 else '+'} {number(abs(margin), digits)}"


def in_words(statistic: Statistic) -> str:
    """``share of responses with harmless >= 0``: what a constraint bounds, as people say it."""
    score = statistic.score
    if statistic.kind == "share":
        bound = f">= {statistic.at_least:g}" if statistic.at_least is not None else f"<= {statistic.at_most:g}"
        text = f"share of responses with {score} {bound}"
    elif statistic.kind == "shortfall":
        text = f"mean of what {score} lacks to {statistic.below:g}"
    elif statistic.kind == "cvar":
        assert statistic.level is not None  # a cvar has one
        ends = "lowest" if statistic.tail == "lower" else "highest"
        text = f"mean of the {ends} {100 * statistic.level:g}% of {score}"
    else:
        text = score if statistic.per is None else f"{score} per {statistic.per}"
    where = " and ".join(f"{column} {' or '.join(values)}" for column, values in statistic.where)
    return f"{text}, {where}" if where else text


def subject(name: str, statistic: Statistic) -> str:
    """A constraint by its name, and what it bounds where the name alone does not say so."""
    if statistic == Statistic(name):
        return name
    words = in_words(statistic)
    return words if name == statistic.text() else f"{name} ({words})"


def demand_in_words(direction: Direction, threshold: float, margin: float | None, digits: int) -> str:
    """``at least 0.800 above the reference``: a constraint as people say it."""
    if margin is None:
        return f"{_HOW_MUCH[direction]} {number(threshold, digits)}"
    if margin == 0:
        return (
            "as the reference"
            if direction == "="
            else f"not {'below' if direction == '>=' else 'above'} the reference"
        )
    side = "below" if margin < 0 else "above"
    if direction == "=":
        return f"{_HOW_MUCH[direction]} {number(abs(margin), digits)} {side} the reference"
    # At least -0.1 over the reference is at most 0.1 below it.
    bound = "at least" if (direction == ">=") == (margin > 0) else "at most"
    return f"{bound} {number(abs(margin), digits)} {side} the reference"


@dataclass(frozen=True)
class CategoryRow:
    """One category: how many prompts it has, and for each score a cell and how its verdict is to be coloured."""

    category: str
    n_prompts: int
    cells: tuple[Cell, ...]
    tones: tuple[Tone, ...]


@dataclass(frozen=True)
class CategoryTable:
    """Scores by category of prompt.

    Attributes:
        heads: for each score its name, and what is shown of it.
        rows: the categories; of very many those with the most prompts.
        n_categories: how many there are.
        is_judged: whether verdicts are by an interval of what was realised there; else they are by the point alone.
    """

    heads: tuple[Cell, ...]
    rows: tuple[CategoryRow, ...]
    n_categories: int
    is_judged: bool


def category_table(artifact: Mapping[str, Any], solved: ReportedSolution) -> CategoryTable | None:
    """What was gained, and whether each demand is met, by category; None where prompts have no categories.

    Args:
        artifact: the content of ``evaluation.json``, or of ``dual.json`` before there is one.
        solved: the solution, for the demands.
    """
    entries = artifact.get("by_category")
    if not entries:
        return None
    after = "realised" if "realised" in entries[0]["scores"][0] else "predicted"
    bounds: tuple[ReportedConstraint | None, ...] = (None, *solved.constraints)
    scores = [score for entry in entries for score in entry["scores"]]
    names = (solved.reward.name, *solved.names)
    digits = {
        name: decimals([score[kind] for score in scores if score["name"] == name for kind in ("reference", after)])
        for name in names
    }
    shown = entries
    if len(entries) > (most := max(_FEWEST_CATEGORIES, _MOST_CATEGORY_CELLS // len(names))):
        places = sorted(range(len(entries)), key=lambda place: -entries[place]["n_prompts"])[:most]
        shown = [entries[place] for place in sorted(places)]
    rows = []
    for entry in shown:
        found = [
            _category_cell(score, after, bound, digits[score["name"]])
            for score, bound in zip(entry["scores"], bounds, strict=True)
        ]
        cells, tones = zip(*found, strict=True)
        category = brief(entry["category"], most=_CATEGORY_LENGTH) or "(none)"
        rows.append(CategoryRow(category, entry["n_prompts"], cells, tones))
    heads = [Cell(solved.reward.name, f"{after} gain")]
    for bound in solved.constraints:
        margin = bound.demanded.margin
        asked = bound.demanded.threshold if margin is None else margin
        words = (
            demanded(bound.direction, asked, digits[bound.name])
            if margin is None
            else (f"{bound.direction} {as_given(margin, digits[bound.name])}")
        )
        heads.append(Cell(bound.name, f"{after}{'' if margin is None else ' gain'}, {words} demanded"))
    is_judged = any(score.get("status") is not None for score in scores)
    return CategoryTable(tuple(heads), tuple(rows), len(entries), is_judged)


def brief(text: str, *, most: int) -> str:
    """A text of at most so many characters, and how many more there are."""
    return text if len(text) <= most else f"{text[:most]}… [{len(text) - most:,} more characters]"


def _category_cell(
    score: Mapping[str, Any], after: str, bound: ReportedConstraint | None, digits: int
) -> tuple[Cell, Tone]:
    """What a score came to in a category: over the reference where the demand is, with interval and verdict."""
    value, reference = score[after], score["reference"]
    if value is None or reference is None:
        return Cell("-"), "neutral"
    margin = None if bound is None else bound.demanded.margin
    if bound is None or margin is not None:
        ends = score.get("improvement_ci95")
        text = signed(value - reference, digits)
    else:
        ends = score.get("ci95")
        text = number(value, digits)
    lines = [interval(ends, digits)] if ends is not None else []
    tone: Tone = "neutral"
    if bound is not None:
        status = score.get("status")
        if status is not None:
            tone = _TONES[status]
            lines.append(status)
        elif bound.direction != "=":
            asked = bound.demanded.threshold if margin is None else reference + margin
            is_met = sign_of(bound.direction) * (value - asked) >= 0
            lines.append("met" if is_met else "not met")
    return Cell(text, "\n".join(lines)), tone


_LONGEST = 1e12
"""Numbers beyond it are written as powers of ten: nobody counts a hundred digits."""


def number(value: float | None, digits: int) -> str:
    """A number with a fixed count of decimals; a dash where there is none."""
    if value is None:
        return "-"
    if abs(value) >= _LONGEST:
        return f"{value:.3g}"
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


def _prediction(
    solved: ReportedSolution, found: ReportedReward | ReportedConstraint
) -> tuple[float, Sequence[float | None] | None]:
    """A predicted mean with the interval that belongs to it: both corrected for finitely many responses, or neither.

    Older files have the corrected interval without its point; the point is then shown alone.
    """
    if found.predicted_corrected is not None:
        return found.predicted_corrected, found.predicted_ci95
    return found.predicted, None if solved.diagnostics.intervals_corrected else found.predicted_ci95


def _predicted_against_demand(
    solved: ReportedSolution, bound: ReportedConstraint
) -> tuple[float, Sequence[float | None] | None]:
    """:func:`_prediction` as the demand was made: over the reference where it is a margin."""
    predicted, ends = _prediction(solved, bound)
    if bound.margin is None:
        return predicted, ends
    gained = None
    if bound.slack_ci95 is not None:  # paired with the reference, as the slack of a margin is
        sign, (low, high) = sign_of(bound.direction), bound.slack_ci95
        ends_in_order = (low, high) if sign > 0 else (high, low)
        gained = [None if end is None else bound.margin + sign * end for end in ends_in_order]
    return predicted - bound.reference, gained


def _heldout_against_demand(bound: ReportedConstraint) -> float | None:
    if bound.heldout is None or bound.margin is None:
        return bound.heldout
    if bound.heldout_reference is not None:
        return bound.heldout - bound.heldout_reference
    return None


def _demand_cell(direction: Direction, threshold: float, margin: float | None, digits: int) -> Cell:
    """What was demanded, as it was given; below a margin the threshold that it is on these prompts."""
    absolute = demanded(direction, threshold, digits)
    return Cell(absolute) if margin is None else Cell(f"{direction} {as_given(margin, digits)}", absolute)


def _multiplier_cell(bound: ReportedConstraint, *, has_interval: bool = True) -> Cell:
    """Lambda*; where its interval is corrected for finitely many responses, with the point that belongs to it."""
    digits = decimals(0.0, bound.multiplier, bound.multiplier_ci95)
    star, ends = number(bound.multiplier, digits), interval(bound.multiplier_ci95, digits)
    if not has_interval:
        return Cell(star)
    corrected = bound.multiplier_corrected
    apart = corrected is not None and number(corrected, digits) != star
    return Cell(star, f"corrected {number(corrected, digits)}\n{ends}" if apart else ends)


def _with_interval(text: str, ends: Sequence[float | None] | None, digits: int) -> str:
    return f"{text} {interval(ends, digits)}".rstrip()


def _reward_answer(name: str, reward: Mapping[str, Any]) -> Iterable[str]:
    """Change of the reward against the reference, paired by prompt, where the evaluation has it."""
    if "improvement" in reward:
        ends = reward.get("improvement_ci95")
        digits = decimals(0.0, reward["improvement"], ends)
        gained = _with_interval(signed(reward["improvement"], digits), ends, digits)
        yield f"{name}: realised {gained} against the reference."


def _bridge(solved: ReportedSolution, evaluation: Mapping[str, Any] | None) -> Iterable[tuple[str, str]]:
    """For margins: how the demand, what the dual was asked for and the thresholds of each split hang together."""
    evaluated = {} if evaluation is None else {bound["name"]: bound for bound in evaluation["constraints"]}
    parts = []
    for bound in solved.constraints:
        margin = bound.demanded.margin
        if margin is None or bound.margin is None:
            continue
        digits = decimals(bound.reference, bound.threshold, bound.predicted, bound.predicted_ci95)
        text = (
            f"{bound.name} {bound.direction} {as_given(margin, digits)}: "
            f"{demanded(bound.direction, bound.demanded.threshold, digits)} on the train prompts "
            f"(ref {number(bound.reference, digits)})"
        )
        if bound.name in evaluated:
            on_test = evaluated[bound.name]
            text += (
                f", {demanded(bound.direction, on_test['threshold'], digits)} on the test prompts "
                f"(ref {number(on_test['reference'], digits)})"
            )
        if bound.margin != margin:
            text += (
                f"; asked of the dual, with safeguards: {bound.direction} {as_given(bound.margin, digits)}, "
                f"{demanded(bound.direction, bound.threshold, digits)} on the train prompts"
            )
        parts.append(text)
    if parts:
        yield "thresholds", "; ".join(parts)


def _corrections(solved: ReportedSolution) -> Iterable[tuple[str, str]]:
    """What the predictions are on the samples themselves, where those shown are corrected."""
    if solved.reward.predicted_corrected is not None:
        plain = [f"{solved.reward.name} {number(solved.reward.predicted, _reward_decimals(solved.reward))}"]
        for bound in solved.constraints:
            digits = decimals(bound.reference, bound.threshold, bound.predicted, bound.predicted_ci95)
            margin = bound.margin is not None
            plain.append(
                f"{bound.name} "
                + (signed(bound.predicted - bound.reference, digits) if margin else number(bound.predicted, digits))
            )
        yield (
            "corrected",
            "predictions and their intervals, for finitely many responses; on the samples as they are "
            + ", ".join(plain),
        )
    elif solved.diagnostics.intervals_corrected:
        yield "corrected", "the intervals of the predictions are for other points than these, and left out here"


def _other_warnings(solved: ReportedSolution) -> tuple[str, ...]:
    """Those that do not stand beneath the badge of trust."""
    return tuple(text for text in solved.warnings if text not in solved.trust.reasons)


def _predicted_reward(solved: ReportedSolution) -> str:
    reward = solved.reward
    digits = _reward_decimals(reward)
    tail = "" if reward.heldout is None else f" (held-out {number(reward.heldout, digits)})"
    return (
        f"{reward.name} {number(reward.reference, digits)} reference -> "
        f"{number(_prediction(solved, reward)[0], digits)} predicted{tail}"
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


def _predicted_kl(solved: ReportedSolution) -> str:
    kl = solved.kl
    return f"{kl.predicted:.3f} nats a prompt from the reference (at most {kl.log_samples:.2f} can show)"


def _budget(solved: ReportedSolution) -> str:
    """Where beta comes from, if it was not given."""
    if solved.kl_budget is None:
        return ""
    ends = "" if solved.beta_ci95 is None else f" {interval(solved.beta_ci95, decimals(0.0, solved.beta_ci95))}"
    return f"{ends}, found for a KL budget of {solved.kl_budget:g} nats"


def _certified_tails(solved: ReportedSolution) -> Iterable[tuple[str, str]]:
    """Where the tails begin that the solution is certified for."""
    for bound in solved.constraints:
        if bound.certified_at is not None:
            digits = decimals(bound.reference, bound.threshold)
            yield "tail", f"{bound.name} is certified at t = {number(bound.certified_at, digits)} of {bound.score}"


def _realised_kl(kl: Mapping[str, Any]) -> str:
    ends = interval(kl.get("realised_ci95"), 3)
    text = f"{kl['predicted']:.3f} predicted -> {kl['realised']:.3f} realised {ends}".rstrip() + " nats a prompt"
    return text if kl.get("budget") is None else f"{text}; {kl['status']}: at most {kl['budget']:g} demanded"


def _closed_fraction(lagrangian: Mapping[str, Any]) -> str:
    fraction = lagrangian["closed_fraction"]
    if fraction is None:
        return "undefined: the reference is already the optimum"
    ends = interval(lagrangian.get("closed_fraction_ci95"), 2)
    return f"{fraction:.2f} {ends}".rstrip() + "  (0: the reference, 1: the tilted optimum)"


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


def safeguard_parts(bound: ReportedConstraint, names: Sequence[str]) -> list[str]:
    """What some parts of a safeguard add to a demand, each with its amount; those that add nothing left out."""
    amounts = {name: getattr(bound.safeguard, name) for name in names}
    return [f"{name.replace('_', ' ')} {amount:.3g}" for name, amount in amounts.items() if amount]


def _safeguards(solved: ReportedSolution) -> Iterable[tuple[str, str]]:
    parts = [
        f"{bound.name} {' + '.join(added)} beyond the demand"
        for bound in solved.constraints
        if (added := safeguard_parts(bound, _GUARDS))
    ]
    if parts:
        yield "safeguards", f"{'; '.join(parts)}, for {solved.reward.price_of_safeguards:.3g} of reward"


def _effective_sample_size(solved: ReportedSolution) -> str:
    diagnostics = solved.diagnostics
    typical = math.exp(solved.kl.log_samples)  # geometric mean of the responses a prompt has
    return (
        f"median {diagnostics.ess_median:.1f} of {typical:.0f} responses; "
        f"below 2 on {100 * diagnostics.ess_fraction_below_2:.1f}% of prompts"
    )
