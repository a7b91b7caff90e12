"""Several runs beside each other: what was demanded of each, what was predicted, what came out, and what it cost.

Rewards are gains over each run's own reference policy on the same prompts, so that runs on other prompts compare. So
are the scores of a constraint given as a margin; those of an absolute threshold are means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.contracts.problem import Direction
from pipeline.report.evaluated import Evaluation
from pipeline.report.solved import ReportedConstraint, ReportedSolution
from pipeline.report.views import Cell, Row, TableView, Tone, decimals, interval, number, signed, subject

State = Literal["unsolved", "solved", "trained", "evaluated"]

_TONES: Mapping[str, Tone] = {
    "satisfied": "good",
    "undecided": "doubtful",
    "violated": "bad",
    "weak": "doubtful",
    "unreliable": "bad",
}

Ends = tuple[float | None, float | None]


@dataclass(frozen=True)
class ComparedScore:
    """The reward of a run, or what one of its constraints bounds.

    Attributes:
        name: of the score, or of the constraint.
        quantity: what it is; scores of one quantity share an axis.
        is_gain: whether the values are over the reference's.
        predicted: by the dual, on the test prompts where there are any.
        realised: by the trained policy, or None.
        ci95: 95% interval of the realised value, or None.
        direction: of the constraint; None for the reward.
        demanded: margin or threshold as the user gave it; None for the reward.
        multiplier: lambda*, or None for the reward.
        multiplier_ci95: its 95% interval, or None.
        status: verdict of the evaluation, or None.
    """

    name: str
    quantity: str
    is_gain: bool
    predicted: float
    realised: float | None
    ci95: Ends | None
    direction: Direction | None = None
    demanded: float | None = None
    multiplier: float | None = None
    multiplier_ci95: Ends | None = None
    status: str | None = None


@dataclass(frozen=True)
class ComparedRun:
    """One run, as far as it has come.

    Attributes:
        name: of the run.
        folder: where it is.
        state: how far it is.
        missing: why there are no numbers; None where there are.
        seconds: wall time of the calls that finished its steps, by step.
        prompts_sha256: which prompts it is of, or None where that is not known.
        trust: verdict on lambda*.
        evaluation: verdict on the trained policy, or None.
        beta: KL strength, reward per nat.
        kl_predicted: nats per prompt.
        kl_realised: nats per prompt, or None.
        kl_ci95: its 95% interval, or None.
        closed_fraction: or None.
        closed_fraction_ci95: its 95% interval, or None.
        reward: what was maximised.
        constraints: what was demanded.
    """

    name: str
    folder: str
    state: State
    missing: str | None
    seconds: Mapping[str, float]
    prompts_sha256: str | None = None
    trust: str | None = None
    evaluation: str | None = None
    beta: float | None = None
    kl_predicted: float | None = None
    kl_realised: float | None = None
    kl_ci95: Ends | None = None
    closed_fraction: float | None = None
    closed_fraction_ci95: Ends | None = None
    reward: ComparedScore | None = None
    constraints: tuple[ComparedScore, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        """The run as an object of JSON."""
        return {
            "run": self.name,
            "folder": self.folder,
            "state": self.state,
            "missing": self.missing,
            "trust": self.trust,
            "evaluation": self.evaluation,
            "beta": self.beta,
            "kl": {"predicted": self.kl_predicted, "realised": self.kl_realised, "realised_ci95": self.kl_ci95},
            "closed_fraction": self.closed_fraction,
            "closed_fraction_ci95": self.closed_fraction_ci95,
            "seconds": dict(self.seconds),
            "total_seconds": sum(self.seconds.values()),
            "reward": None if self.reward is None else _score_document(self.reward),
            "constraints": [_score_document(one) for one in self.constraints],
        }


def _score_document(score: ComparedScore) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": score.name,
        "is_gain": score.is_gain,
        "predicted": score.predicted,
        "realised": score.realised,
        "ci95": score.ci95,
    }
    if score.direction is not None:
        found |= {
            "quantity": score.quantity,
            "direction": score.direction,
            "demanded": score.demanded,
            "multiplier": score.multiplier,
            "multiplier_ci95": score.multiplier_ci95,
            "status": score.status,
        }
    return found


def compared_scores(
    dual: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> tuple[ComparedScore, tuple[ComparedScore, ...]]:
    """The reward and the constraints of a run.

    Args:
        dual: the content of ``dual.json``.
        evaluation: the content of ``evaluation.json``, or None.
    """
    solved = ReportedSolution.from_document(dual)
    name = solved.reward.name
    if evaluation is None:
        reward = ComparedScore(name, name, True, _predicted_gain(dual["reward"]), None, None)
        return reward, tuple(_constraint(bound, None) for bound in solved.constraints)
    found = Evaluation.from_document(evaluation)
    realised = found.reward.realised - found.reward.reference
    reward = ComparedScore(
        name, name, True, found.reward.predicted - found.reward.reference, realised, found.reward.improvement_ci95
    )
    by_name = {bound["name"]: bound for bound in evaluation["constraints"]}
    return reward, tuple(_constraint(bound, by_name[bound.name]) for bound in solved.constraints)


def _predicted_gain(reward: Mapping[str, Any]) -> float:
    """On held-out prompts where there are any."""
    if reward.get("heldout") is not None and reward.get("heldout_reference") is not None:
        return float(reward["heldout"] - reward["heldout_reference"])
    predicted = reward["predicted"] if reward.get("predicted_corrected") is None else reward["predicted_corrected"]
    return float(predicted - reward["reference"])


def _constraint(bound: ReportedConstraint, evaluated: Mapping[str, Any] | None) -> ComparedScore:
    margin = bound.demanded.margin
    realised, ci95, status = None, None, None
    if evaluated is not None:
        origin = 0.0 if margin is None else evaluated["reference"]
        predicted, realised = evaluated["predicted"] - origin, evaluated["realised"] - origin
        # The interval of a margin is the paired difference's, moved by the reference mean.
        low, high = (None if end is None else end - origin for end in evaluated["ci95"])
        ci95, status = (low, high), evaluated["status"]
    elif bound.heldout is not None and (margin is None or bound.heldout_reference is not None):
        predicted = bound.heldout - (0.0 if margin is None else bound.heldout_reference or 0.0)
    else:
        predicted = bound.predicted if bound.predicted_corrected is None else bound.predicted_corrected
        predicted -= 0.0 if margin is None else bound.reference
    return ComparedScore(
        name=bound.name,
        quantity=subject(bound.name, bound.stated),
        is_gain=margin is not None,
        predicted=predicted,
        realised=realised,
        ci95=ci95,
        direction=bound.direction,
        demanded=bound.demanded.threshold if margin is None else margin,
        multiplier=bound.multiplier,
        multiplier_ci95=bound.multiplier_ci95,
        status=status,
    )


@dataclass(frozen=True)
class PlanePoint:
    """A run in the plane of a constraint and the reward."""

    run: str
    constraint: ComparedScore
    reward: ComparedScore


@dataclass(frozen=True)
class Plane:
    """The runs that have one reward and one constraint in common.

    Attributes:
        reward: name of the reward.
        quantity: what the constraint bounds.
        is_gain: whether it is over the reference's.
        points: the runs.
    """

    reward: str
    quantity: str
    is_gain: bool
    points: tuple[PlanePoint, ...]


def planes(runs: Sequence[ComparedRun]) -> list[Plane]:
    """The planes of some runs, in the order in which they first come; one quantity, one plane."""
    found: dict[tuple[str, str, bool], list[PlanePoint]] = {}
    for run in runs:
        for bound in run.constraints:
            assert run.reward is not None  # a run with constraints is solved
            key = (run.reward.name, bound.quantity, bound.is_gain)
            found.setdefault(key, []).append(PlanePoint(run.name, bound, run.reward))
    return [Plane(*key, tuple(points)) for key, points in found.items()]


def comparison_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """What keeps runs from being compared number by number, in sentences."""
    solved = [run for run in runs if run.reward is not None]
    notes = [f"{run.name}: {run.missing}" for run in runs if run.missing is not None]
    rewards = list(dict.fromkeys(run.reward.name for run in solved if run.reward is not None))
    if len(rewards) > 1:
        notes.append(f"the runs maximise different rewards ({', '.join(rewards)}): their gains do not compare")
    everywhere = [{(one.quantity, one.is_gain) for one in run.constraints} for run in solved]
    if everywhere and any(one != everywhere[0] for one in everywhere):
        notes.append("the runs have different constraints: each plane shows the runs that have its own")
    if len({run.prompts_sha256 for run in solved}) > 1:
        notes.append("the runs are of different prompts: gains are over each run's own reference on its own prompts")
    waiting = [run.name for run in solved if run.state != "evaluated"]
    if waiting:
        notes.append(f"not evaluated, predictions alone: {', '.join(waiting)}")
    return notes


def runs_view(runs: Sequence[ComparedRun]) -> TableView:
    """A row a run: verdicts, KL, closed fraction and cost."""
    rows = []
    for run in runs:
        verdict = run.evaluation or run.state
        kl = Cell("-") if run.kl_predicted is None else Cell(number(run.kl_predicted, 3))
        realised = Cell("-") if run.kl_realised is None else Cell(number(run.kl_realised, 3), interval(run.kl_ci95, 3))
        closed = (
            Cell("-")
            if run.closed_fraction is None
            else Cell(number(run.closed_fraction, 2), interval(run.closed_fraction_ci95, 2))
        )
        beta = Cell("-" if run.beta is None else f"{run.beta:.4g}")
        cost = Cell(duration(sum(run.seconds.values())) if run.seconds else "-")
        rows.append(
            Row((Cell(run.name, verdict), Cell(run.trust or "-"), beta, kl, realised, closed, cost), _tone(run))
        )
    return TableView(
        title=f"{len(runs)} run{'s' if len(runs) != 1 else ''}",
        header=(
            Cell("run", "verdict"),
            Cell("trust", "in lambda*"),
            Cell("beta"),
            Cell("KL", "predicted"),
            Cell("KL realised", "95% interval"),
            Cell("closed", "95% interval"),
            Cell("time"),
        ),
        rows=tuple(rows),
    )


def _tone(run: ComparedRun) -> Tone:
    """Of the evaluation; a good one has no colour beside trust that is not."""
    tone = _TONES.get(run.evaluation or "", "neutral")
    return "neutral" if tone == "good" and run.trust != "ok" else tone


def scores_view(runs: Sequence[ComparedRun], notes: Iterable[str] = ()) -> TableView:
    """A row for the reward of each run and for each of its constraints.

    Args:
        runs: in the order of the rows; those that are not solved have none.
        notes: what keeps them from being compared.
    """
    rows = []
    for run in runs:
        if run.reward is None:
            continue
        rows += [_score_row(run.name, score) for score in (run.reward, *run.constraints)]
    return TableView(
        title="Gains over the reference; means where the demand is absolute",
        header=(
            Cell("run", "verdict"),
            Cell("score"),
            Cell("demanded"),
            Cell("lambda*"),
            Cell("predicted"),
            Cell("realised", "95% interval"),
        ),
        rows=tuple(rows),
        warnings=tuple(notes),
    )


def _score_row(run: str, score: ComparedScore) -> Row:
    digits = decimals(0.0 if score.is_gain else score.demanded, score.predicted, score.realised, score.demanded)
    show = signed if score.is_gain else number
    asked = "maximise"
    if score.direction is not None and score.demanded is not None:
        side = f"ref {'-' if score.demanded < 0 else '+'} " if score.is_gain else ""
        asked = f"{score.direction} {side}{number(abs(score.demanded) if score.is_gain else score.demanded, digits)}"
    star = "" if score.multiplier is None else number(score.multiplier, decimals(0.0, score.multiplier))
    realised = (
        Cell("-") if score.realised is None else Cell(show(score.realised, digits), interval(score.ci95, digits))
    )
    verdict = score.status or ("reward" if score.direction is None else "")
    return Row(
        (Cell(run, verdict), Cell(score.name), Cell(asked), Cell(star), Cell(show(score.predicted, digits)), realised),
        _TONES.get(score.status or "", "neutral"),
    )


def duration(seconds: float) -> str:
    """``8 min 05 s``: a time as people say it."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min"
