"""``dualign plan``: how many prompts and responses a demand needs, from a pilot, before they are paid for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.artifacts import is_complete, require_writable, write_json
from pipeline.contracts.errors import InputError, NoPlanError, PlanNotTrustedError
from pipeline.dual.from_table import TableRequest, read_splits
from pipeline.dual.piloting import measure_pilot, pose_pilot, require_plannable
from pipeline.dual.posing import PosedProblem
from pipeline.planning.pilot_rates import PilotRates, rates_of_run
from pipeline.report.views import Badge, Cell, Row, TableView
from pipeline.run.run import Run
from stage1_dual.dual import (
    FEWEST_PROMPTS,
    LARGEST_CONFIDENCE,
    Pilot,
    SamplePlan,
    SizeRequest,
    plan_sizes,
    reward_cost,
    why_not_so_many,
)

_ALTERNATIVES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Numbers of responses that are shown beside the plan's own, in units of it."""


_FEW_PROMPTS = ", the fewest that a plan has: what it says holds for means over many prompts"
_LEAST = {
    "responses": (2, ""),
    "most_responses": (2, ""),
    "prompts": (FEWEST_PROMPTS, _FEW_PROMPTS),
    "most_prompts": (FEWEST_PROMPTS, _FEW_PROMPTS),
    "evaluation_responses": (1, ""),
}

_FIGURE = "sample_sizes"


@dataclass(frozen=True)
class PlanQuestion:
    """What is asked of a plan.

    Attributes:
        within: how far the slack of a constraint may be from its demand, units of its statistic: by name, and under
            the name "" for all that are not named.
        confidence: with which probability all slacks are within.
        evaluation_responses: responses a prompt of the final evaluation, or None for as many as the plan has.
        responses: fixed number of responses a prompt, or None.
        prompts: fixed number of prompts, or None.
        most_prompts: prompts there are, or None.
        most_responses: responses a prompt at most, or None.
    """

    within: Mapping[str, float]
    confidence: float = 0.95
    evaluation_responses: int | None = None
    responses: int | None = None
    prompts: int | None = None
    most_prompts: int | None = None
    most_responses: int | None = None

    def __post_init__(self) -> None:
        if not self.within:
            raise InputError("`--within` is not given; it says how far a slack may be from its demand")
        for name, value in self.within.items():
            if not (math.isfinite(value) and value > 0):
                of = f" of {name}" if name else ""
                raise InputError(f"`--within`{of} is {value:g}; it must be a positive, finite number")
        if not 0.5 <= self.confidence <= LARGEST_CONFIDENCE:
            raise InputError(
                f"`--confidence` is {self.confidence!r}; it must be at least 0.5 and at most {LARGEST_CONFIDENCE}: "
                "beyond that the draws that predict it cannot tell"
            )
        for name, (lowest, why) in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InputError(f"`--{name.replace('_', '-')}` is {value}; it must be at least {lowest}{why}")
        for fixed, most in (("prompts", "most_prompts"), ("responses", "most_responses")):
            if getattr(self, fixed) is not None and getattr(self, most) is not None:
                raise InputError(f"`--{fixed}` and `--{most.replace('_', '-')}` are both given; give one of them")

    def of(self, names: Sequence[str]) -> FloatArray:
        """What is allowed of each constraint, shape (m,).

        Raises:
            InputError: a constraint that is named is not there, or one that is there has no number.
        """
        unknown = sorted(set(self.within) - {"", *names})
        if unknown:
            raise InputError(f"`--within` names {unknown[0]!r}; the constraints are {', '.join(names)}")
        missing = [name for name in names if name not in self.within and "" not in self.within]
        if missing:
            raise InputError(f"`--within` has no number for {missing[0]!r}; give NAME=NUMBER for it, or one for all")
        return np.array([self.within.get(name, self.within.get("", math.nan)) for name in names])


@dataclass(frozen=True, eq=False)
class FoundPlan:
    """A plan with what it was made from.

    Attributes:
        pilot: what was measured.
        request: what was asked for.
        plan: what was found.
        content: what ``--json`` prints (docs/sample_sizes.md).
    """

    pilot: Pilot
    request: SizeRequest
    plan: SamplePlan
    content: dict[str, Any]


def plan_from_run(run: Run, question: PlanQuestion) -> FoundPlan:
    """Plan from a run's own samples and scores, for the demand of its recipe.

    Raises:
        InputError: the run has no samples or scores, or a statistic or a number cannot be planned for.
        InfeasibleError: no reweighting of the pilot's responses meets the demand.
    """
    require_plannable([one for one, _ in run.config.stated_constraints()])
    for folder, step in (
        (run.prompts, "prepare"),
        (run.samples, "sample"),
        *((run.scores / name, "score") for name in run.config.needed_scores()),
    ):
        if not is_complete(folder):
            raise InputError(
                f"a plan needs the samples and scores of a pilot, and run `{run.name}` has no finished {folder}; "
                f"`dualign {step}` makes it: some 64 prompts (`--limit 64`) of 32 responses "
                "(`--sampling.samples_per_prompt 32`) are enough"
            )
    return make_plan(pose_pilot(run), question, rates_of_run(run))


def plan_from_table(request: TableRequest, question: PlanQuestion, *, rates: PilotRates, scratch: Path) -> FoundPlan:
    """Plan from a table of scores, of which the rows of the split ``train`` are the pilot where it has splits.

    Raises:
        InputError: as :func:`pipeline.dual.from_table.solve_table`, or a statistic or a number cannot be planned for.
        InfeasibleError: no reweighting of the pilot's responses meets the demand.
    """
    require_plannable(request.constraints)
    splits, notes = read_splits(request.open_table(), request, scratch=scratch)
    return make_plan(splits["train"].posed.within(request.kl), question, rates, notes=notes)


def make_plan(
    posed: PosedProblem, question: PlanQuestion, rates: PilotRates, *, notes: Sequence[str] = ()
) -> FoundPlan:
    """Measure the pilot and plan.

    Args:
        posed: the pilot's rows under the demand.
        question: what is asked.
        rates: what a response cost.
        notes: what was left out of the rows, or could not be told of them.

    Raises:
        InputError: a statistic or a number cannot be planned for, or the pilot is too small to measure anything.
        InfeasibleError: no reweighting of the pilot's responses meets the demand.
    """
    names = [one.name for one in posed.constraints]
    within_m = question.of(names)
    pilot = measure_pilot(posed)
    tolerance_m = np.array([one.tolerance or np.nan for one in posed.constraints])
    request = SizeRequest(
        within_m=within_m,
        confidence=question.confidence,
        evaluation_responses=question.evaluation_responses,
        room_m=np.where(np.isnan(tolerance_m), 2 * within_m, tolerance_m),
        n_responses=question.responses,
        n_prompts=question.prompts,
        most_prompts=question.most_prompts,
        most_responses=question.most_responses,
    )
    plan = plan_sizes(pilot, request)
    return FoundPlan(pilot, request, plan, _describe(posed, pilot, request, plan, rates, notes))


def _describe(
    posed: PosedProblem,
    pilot: Pilot,
    request: SizeRequest,
    plan: SamplePlan,
    rates: PilotRates,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What ``--json`` prints. Where there is no plan its numbers are null, whatever the reason: none is copied."""
    planned, idle = plan.outcome == "planned", plan.outcome == "nothing binds"
    told = planned or idle
    return {
        "outcome": plan.outcome,
        "prompts": plan.n_prompts if planned else None,
        "responses": plan.n_responses if planned else None,
        "evaluation_prompts": plan.evaluation_prompts if told else None,
        "evaluation_responses": plan.evaluation_responses if told else None,
        "within": _one_or_all(posed, request.within_m),
        "confidence": request.confidence,
        "trusted": plan.outcome != "not trusted",
        "reasons": list(plan.reasons),
        "instead": None if plan.instead is None else dict(zip(("prompts", "responses"), plan.instead, strict=True)),
        "miss_probability": plan.miss if planned else None,
        "reward_cost": plan.reward_cost if planned else None,
        "costs": _costs(plan, rates) if told else None,
        "constraints": [
            {
                "name": one.name,
                "demand": one.text(),
                "score": one.statistic.scores[0],
                "statistic": one.statistic.to_document(),
                "direction": one.direction,
                "threshold": one.absolute_threshold(unit.reference),
                "margin": one.margin,
                "tolerance": one.tolerance,
                "reference": unit.reference,
                "within": float(request.within_m[j]),
                "binds": bool(pilot.is_active_m[j]),
                "multiplier": float(pilot.multipliers_m[j]),
                "multiplier_standard_error": float(pilot.multiplier_errors_m[j]),
                "expected_slack": float(plan.offset_m[j]) if told else None,
                "standard_error": float(plan.errors_m[j]) if told else None,
                "room": float(plan.room_m[j]),
            }
            for j, (one, unit) in enumerate(zip(posed.constraints, posed.units, strict=True))
        ],
        "alternatives": _alternatives(pilot, request, plan),
        "pilot": {
            "prompts": pilot.n_prompts,
            "responses": pilot.n_responses,
            "beta": posed.problem.beta if posed.problem.kl_budget is None else None,
            "kl": pilot.kl,
            "second_moment": pilot.second_moment,
            "fewest_responses": pilot.fewest_responses(),
            "tokens_per_response": rates.tokens,
            "tokens_per_second": rates.tokens_per_second,
            "scoring_seconds_per_response": rates.scoring_seconds,
            "bytes_per_response": rates.bytes_per_response,
        },
        "warnings": [*notes, *pilot.warnings],
    }


def _costs(plan: SamplePlan, rates: PilotRates) -> dict[str, Any]:
    """Of the run's responses, the reference's on test prompts, and the policy's."""
    evaluated = plan.evaluation_prompts or 0
    return rates.costs(
        responses=((plan.n_prompts or 0) + evaluated) * plan.n_responses,
        drawn_only=evaluated * plan.evaluation_responses,
    )


def _one_or_all(posed: PosedProblem, within_m: FloatArray) -> float | dict[str, float]:
    if len(set(within_m.tolist())) == 1:
        return float(within_m[0])
    return {one.name: float(value) for one, value in zip(posed.constraints, within_m, strict=True)}


def _alternatives(pilot: Pilot, request: SizeRequest, plan: SamplePlan) -> list[dict[str, Any]]:
    """The same with fewer and with more responses, and what each gives away of the reward; why not with some."""
    size = (plan.n_prompts, plan.n_responses) if plan.outcome == "planned" else plan.instead
    if size is None:
        return []
    found: list[dict[str, Any]] = []
    for count in sorted({max(2, round(size[1] * factor)) for factor in _ALTERNATIVES}):
        why_not, needed = why_not_so_many(pilot, request, count), None
        if why_not is None:
            needed = pilot.predict(count).prompts(request.within_m, confidence=request.confidence)
            why_not = "no number of prompts will do" if needed is None else None
        found.append(
            {
                "responses": count,
                "prompts": needed,
                "responses_in_all": None if needed is None else needed * count,
                "reward_cost": None if needed is None else reward_cost(pilot, count),
                "why_not": why_not,
            }
        )
    return found


def write_plan(found: FoundPlan, folder: Path) -> list[Path]:
    """Write ``plan.json`` into a folder and, where there is a plan to draw, ``sample_sizes.png``, ``.svg``, ``.pdf``.

    A figure of an earlier plan does not stay beside a plan that has none.

    Returns:
        What was written.

    Raises:
        InputError: the folder cannot be written.
    """
    paths = [folder / "plan.json"]
    require_writable(folder)
    for old in folder.glob(f"{_FIGURE}.*"):
        old.unlink()
    if found.plan.outcome == "planned":
        from pipeline.planning.plan_figure import write_plan_figure  # brings matplotlib along

        paths += write_plan_figure(found.pilot, found.request, found.plan, folder / _FIGURE)
    write_json(paths[0], found.content)
    return paths


def require_plan(content: Mapping[str, Any]) -> None:
    """Raise where there is no plan, once all that is known is printed and written.

    Args:
        content: what ``--json`` prints.

    Raises:
        NoPlanError: no numbers within the limits will do.
        PlanNotTrustedError: nothing that follows from the pilot is to be trusted.
    """
    if content["outcome"] == "not trusted":
        raise PlanNotTrustedError(
            "no numbers are given: nothing that follows from this pilot is to be trusted, for the reasons above"
        )
    if content["outcome"] == "out of reach":
        raise NoPlanError(f"no numbers of prompts and responses will do{_limits_note(content)}, for the reasons above")


def plan_view(content: Mapping[str, Any]) -> TableView:
    """What a person reads of a plan.

    Args:
        content: what ``--json`` prints.
    """
    pilot = content["pilot"]
    size = f"{pilot['prompts']:,} prompts x {pilot['responses']:g} responses"
    drawn = f"{size}, KL {pilot['kl']:.2f} nats, corrected for their number"
    facts = []
    if content["reward_cost"] is not None:
        facts.append(("reward", _reward_fact(content)))
    facts += [*_cost_facts(content["costs"]), *_alternative_facts(content), ("pilot", drawn)]
    return TableView(
        title="How many prompts, how many responses",
        header=(
            Cell("constraint", "demanded"),
            Cell("allowed"),
            Cell("lambda*", "of the pilot"),
            Cell("expected slack"),
            Cell("standard error"),
        ),
        rows=tuple(
            Row(
                (
                    Cell(one["name"], _demanded(one) + ("" if one["binds"] else "\ndoes not bind")),
                    Cell(f"+-{one['within']:g}" if one["binds"] else f">= -{one['within']:g}"),
                    Cell(f"{one['multiplier']:.3g}", f"+-{one['multiplier_standard_error']:.2g}"),
                    Cell("-" if one["expected_slack"] is None else f"{one['expected_slack']:+.3g}"),
                    Cell("-" if one["standard_error"] is None else f"{one['standard_error']:.3g}"),
                )
            )
            for one in content["constraints"]
        ),
        facts=tuple(facts),
        warnings=tuple(content["warnings"]),
        badges=(_badge(content),),
        answers=tuple(_answers(content)),
    )


def _demanded(one: Mapping[str, Any]) -> str:
    if one["margin"] is None:
        return f"{one['direction']} {one['threshold']:g}"
    return f"{one['direction']} ref {'-' if one['margin'] < 0 else '+'} {abs(one['margin']):g}"


def _badge(content: Mapping[str, Any]) -> Badge:
    reasons = tuple(f"{text}." for text in content["reasons"])
    if content["outcome"] == "not trusted":
        advice = "A larger pilot; no numbers are given from this one."
        return Badge("Trust in the plan", "none", "bad", reasons, advice)
    if content["outcome"] == "out of reach":
        return Badge("Plan", "none", "bad", reasons)
    return Badge("Trust in the plan", "ok", "good")


def _answers(content: Mapping[str, Any]) -> list[str]:
    if content["outcome"] == "not trusted":
        return []
    if content["outcome"] == "out of reach":
        return [_instead_answer(content)]
    test_prompts = f"{content['evaluation_prompts'] or 0:,} test prompts"
    evaluated = f"{test_prompts} with {content['evaluation_responses']:,} responses each"
    if content["outcome"] == "nothing binds":
        met = ", ".join(
            f"{one['name']} by {one['expected_slack']:.3g} +- {one['standard_error']:.2g}"
            for one in content["constraints"]
        )
        nothing = (
            "Nothing is to be planned: lambda* is 0, the policy of the reward alone already meets every demand: "
            f"{met} (standard error over prompts)."
        )
        proof = (
            f"{evaluated} would prove it: the evaluation of that policy then says satisfied with probability "
            f"{content['confidence']:g}."
        )
        return [nothing, proof]
    sizes = (
        f"{content['prompts']:,} train prompts with {content['responses']:,} responses each: every slack is then "
        f"within what is allowed of its demand with probability {1 - content['miss_probability']:.3f} "
        f"({content['confidence']:g} asked for)."
    )
    if content["evaluation_prompts"] is None:
        return [sizes, "No number of test prompts makes the evaluation say satisfied with that confidence."]
    rooms = ", ".join(f"{one['name']} {one['room']:g}" for one in content["constraints"] if one["binds"])
    evaluation = (
        f"{evaluated}: with `assurance: {content['confidence']:g}` the evaluation of the tilted optimum says "
        f"satisfied, for at most so much asked beyond the demand: {rooms}."
    )
    return [sizes, evaluation]


def _instead_answer(content: Mapping[str, Any]) -> str:
    if content["instead"] is None:
        return "No numbers of prompts and responses will do."
    prompts, responses = content["instead"]["prompts"], content["instead"]["responses"]
    return (
        f"No numbers will do within these limits. Without them {prompts:,} train prompts with {responses:,} responses "
        f"each would, {prompts * responses:,} responses in all."
    )


def _limits_note(content: Mapping[str, Any]) -> str:
    return "" if content["instead"] is None else " within these limits"


def _reward_fact(content: Mapping[str, Any]) -> str:
    """Few responses end beyond the demand and give reward away; where the demand gives a score up, short of it."""
    cost = content["reward_cost"]
    side = "given up" if cost >= 0 else "beyond the optimum's, at the cost of the demand"
    return f"{abs(cost):.3g} {side}, by the number of responses being {content['responses']:,}"


def _cost_facts(costs: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if costs is None:
        return []
    found = [("responses in all", f"{costs['responses']:,}, the evaluation's included")]
    if costs["tokens"] is not None:
        found.append(("tokens", f"{costs['tokens']:,}"))
    if costs["hours"] is not None:
        devices = "" if costs["devices"] == 1 else f", {costs['device_hours']:.3g} device hours"
        found.append(("hours", f"{costs['hours']:.3g} to draw and score at the pilot's rate{devices}"))
    if costs["bytes"] is not None:
        found.append(("disk", f"{costs['bytes'] / 1e9:.3g} GB"))
    return found


def _alternative_facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            f"{one['responses']:,} responses",
            one["why_not"] or f"{one['prompts']:,} prompts, {one['responses_in_all']:,} responses in all",
        )
        for one in content["alternatives"]
    ]
