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
from pipeline.contracts.errors import InputError
from pipeline.dual.from_table import TableRequest, read_splits
from pipeline.dual.piloting import measure_pilot, pose_pilot, require_plannable
from pipeline.dual.posing import PosedProblem
from pipeline.planning.pilot_rates import PilotRates, rates_of_run
from pipeline.report.views import Badge, Cell, Row, TableView
from pipeline.run.run import Run
from stage1_dual.dual import LARGEST_CONFIDENCE, Pilot, SamplePlan, SizeRequest, plan_sizes, reward_cost

_ALTERNATIVES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Numbers of responses that are shown beside the plan's own, in units of it."""


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
        least = {"responses": 2, "most_responses": 2, "prompts": 2, "most_prompts": 2, "evaluation_responses": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InputError(f"`--{name.replace('_', '-')}` is {value}; it must be at least {lowest}")
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
    splits, _ = read_splits(request.open_table(), request, scratch=scratch)
    return make_plan(splits["train"].posed.within(request.kl), question, rates)


def make_plan(posed: PosedProblem, question: PlanQuestion, rates: PilotRates) -> FoundPlan:
    """Measure the pilot and plan.

    Args:
        posed: the pilot's rows under the demand.
        question: what is asked.
        rates: what a response cost.

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
    return FoundPlan(pilot, request, plan, _describe(posed, pilot, request, plan, rates))


def _describe(
    posed: PosedProblem, pilot: Pilot, request: SizeRequest, plan: SamplePlan, rates: PilotRates
) -> dict[str, Any]:
    evaluation_responses = request.evaluation_responses or plan.n_responses
    costs = None
    if plan.n_prompts is not None:
        evaluated = plan.evaluation_prompts or 0
        costs = rates.costs(
            responses=(plan.n_prompts + evaluated) * plan.n_responses, drawn_only=evaluated * evaluation_responses
        )
    signs_m = [one.sign for one in posed.constraints]
    return {
        "prompts": plan.n_prompts,
        "responses": plan.n_responses,
        "evaluation_prompts": plan.evaluation_prompts,
        "evaluation_responses": evaluation_responses,
        "within": _one_or_all(posed, request.within_m),
        "confidence": request.confidence,
        "trusted": not plan.reasons,
        "reasons": list(plan.reasons),
        "miss_probability": plan.miss,
        "reward_cost": plan.reward_cost,
        "costs": costs,
        "constraints": [
            {
                "name": one.name,
                "demand": one.statistic.text(),
                "within": float(request.within_m[j]),
                "binds": bool(pilot.is_active_m[j]),
                "multiplier": float(pilot.multipliers_m[j]),
                "multiplier_error": float(pilot.multiplier_errors_m[j]),
                "expected_slack": float(plan.offset_m[j]),
                "standard_error": None if plan.n_prompts is None else float(plan.errors_m[j]),
                "room": float(plan.room_m[j]),
                "sign": signs_m[j],
            }
            for j, one in enumerate(posed.constraints)
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
    }


def _one_or_all(posed: PosedProblem, within_m: FloatArray) -> float | dict[str, float]:
    if len(set(within_m.tolist())) == 1:
        return float(within_m[0])
    return {one.name: float(value) for one, value in zip(posed.constraints, within_m, strict=True)}


def _alternatives(pilot: Pilot, request: SizeRequest, plan: SamplePlan) -> list[dict[str, Any]]:
    """The same with fewer and with more responses, and what each gives away of the reward."""
    counts = sorted({max(2, round(plan.n_responses * factor)) for factor in _ALTERNATIVES})
    found = []
    for count in counts:
        needed = pilot.predict(count).prompts(request.within_m, confidence=request.confidence)
        found.append(
            {
                "responses": count,
                "prompts": needed,
                "responses_in_all": None if needed is None else needed * count,
                "reward_cost": reward_cost(pilot, count),
                "carries_the_kl": count >= pilot.fewest_responses(),
            }
        )
    return found


def write_plan(found: FoundPlan, folder: Path) -> list[Path]:
    """Write ``plan.json`` and, where there is a plan to draw, ``sample_sizes.png`` and ``.svg`` into a folder.

    Returns:
        What was written.

    Raises:
        InputError: the folder cannot be written.
    """
    paths = [folder / "plan.json"]
    require_writable(folder)
    if found.plan.n_prompts is not None:
        from pipeline.planning.plan_figure import write_plan_figure  # brings matplotlib along

        paths += write_plan_figure(found.pilot, found.request, found.plan, folder / "sample_sizes")
    write_json(paths[0], found.content)
    return paths


def plan_view(content: Mapping[str, Any]) -> TableView:
    """What a person reads of a plan.

    Args:
        content: what ``--json`` prints.
    """
    trusted, costs = content["trusted"], content["costs"]
    verdict = Badge(
        "Trust in the plan", "ok" if trusted else "none", "good" if trusted else "bad", tuple(content["reasons"])
    )
    if content["prompts"] is None:
        answer = "No number of prompts will do with so few responses a prompt."
    else:
        answer = (
            f"{content['prompts']:,} train prompts with {content['responses']:,} responses each: every slack is then "
            f"within what is allowed of its demand with probability {1 - content['miss_probability']:.3f} "
            f"({content['confidence']:g} asked for)."
        )
    answers = [answer, _evaluation_answer(content)]
    pilot = content["pilot"]
    drawn = f"{pilot['prompts']:,} prompts x {pilot['responses']:g} responses, KL {pilot['kl']:.2f} nats"
    facts = [
        (
            "reward given up",
            f"{content['reward_cost']:.3g}, by the number of responses being {content['responses']:,}",
        ),
        *_cost_facts(costs),
        *_alternative_facts(content),
        ("pilot", drawn),
    ]
    return TableView(
        title="How many prompts, how many responses",
        header=(
            Cell("constraint"),
            Cell("allowed"),
            Cell("lambda*", "of the pilot"),
            Cell("expected slack"),
            Cell("standard error"),
        ),
        rows=tuple(
            Row(
                (
                    Cell(one["name"], "" if one["binds"] else "does not bind"),
                    Cell(f"+-{one['within']:g}" if one["binds"] else f">= -{one['within']:g}"),
                    Cell(f"{one['multiplier']:.3g}", f"+-{one['multiplier_error']:.2g}"),
                    Cell(f"{one['expected_slack']:+.3g}"),
                    Cell("-" if one["standard_error"] is None else f"{one['standard_error']:.3g}"),
                )
            )
            for one in content["constraints"]
        ),
        facts=tuple(facts),
        badges=(verdict,),
        answers=tuple(answers),
    )


def _evaluation_answer(content: Mapping[str, Any]) -> str:
    rooms = ", ".join(f"{one['name']} {one['room']:g}" for one in content["constraints"] if one["binds"])
    if content["evaluation_prompts"] is None:
        return "No number of test prompts makes the evaluation say satisfied with that confidence."
    return (
        f"{content['evaluation_prompts']:,} test prompts with {content['evaluation_responses']:,} responses each: "
        f"with `assurance: {content['confidence']:g}` the evaluation of the tilted optimum says satisfied, for at "
        f"most so much asked beyond the demand: {rooms or 'nothing'}."
    )


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
    found = []
    for one in content["alternatives"]:
        needed = "no number of prompts" if one["prompts"] is None else f"{one['prompts']:,} prompts"
        few = "" if one["carries_the_kl"] else "; too few for the KL"
        found.append((f"{one['responses']:,} responses", f"{needed}, reward given up {one['reward_cost']:.3g}{few}"))
    return found
