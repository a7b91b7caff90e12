"""What the page's script reads: the problem and its certified frontier, scores and texts, within a page's size.

Keys are those of the scripts in ``assets/``: ``demand.js`` says what it needs of a constraint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.problem import sign_of
from pipeline.contracts.tables import CONSTRAINT_PREFIX
from pipeline.report.populations import (
    Population,
    PromptTexts,
    judged_split,
    read_texts,
    score_columns,
    solved_rows,
)
from pipeline.report.shell import visible
from pipeline.report.solved import ReportedConstraint, ReportedSolution
from pipeline.report.views import safeguard_parts, subject
from stage1_dual.dual import DualProblem

_MOST_SCORE_BYTES: Mapping[str, int] = MappingProxyType({"train": 1_000_000, "test": 300_000, "policy": 300_000})
"""Of scores in a page, 32 bits each, by population."""

_MOVING = ("assurance", "score_error", "score_noise", "response_bias")
"""Parts of a safeguard that depend on the tilt; a reserve is what it is."""

_MOST_SLIDERS = 12
"""Constraints whose demand can be moved, those of the largest price first; ``frontier.parquet`` has all."""


@dataclass(frozen=True)
class Command:
    """What asks for another demand on a constraint: a command with ``{}`` for its number, and what it does."""

    text: str
    note: str


def page_data(
    run_dir: Path,
    solved: ReportedSolution,
    problem: DualProblem,
    frontier: pa.Table,
    populations: Mapping[str, Population],
    commands: Mapping[str, Command] = MappingProxyType({}),
) -> dict[str, Any]:
    """The data of the page of a run.

    Args:
        run_dir: folder of the run.
        solved: its solution.
        problem: what was solved.
        frontier: the content of ``frontier.parquet``.
        populations: as :func:`pipeline.report.populations.read_populations` has them.
        commands: by constraint.

    Raises:
        CorruptArtifactError: a table of texts is damaged or lacks a column.
    """
    populations = _holdable(populations)
    held = {name: population.within(_MOST_SCORE_BYTES[name]) for name, population in populations.items()}
    judged = judged_split(held)
    if judged in held and "policy" in held:
        # The same prompts of both policies, so that they can stand side by side.
        both = set(held[judged].prompt_ids) & set(populations["policy"].prompt_ids)
        held["policy"] = populations["policy"].of_prompts(both).within(_MOST_SCORE_BYTES["policy"])
        if len(held["policy"].prompt_ids) < len(both):
            held[judged] = held[judged].of_prompts(set(held["policy"].prompt_ids))
    return {
        **_demand_data(solved, problem, frontier, held, commands),
        "judged": judged,
        "scores": _scores(solved, held.get(judged)),
        "browser": _browser(run_dir, judged, held),
    }


def table_data(
    solved: ReportedSolution,
    problem: DualProblem,
    frontier: pa.Table,
    commands: Mapping[str, Command] = MappingProxyType({}),
) -> dict[str, Any]:
    """The data of the page of a table of scores, which has demands to move and no texts.

    Args:
        solved: its solution.
        problem: what was solved.
        frontier: the content of ``frontier.parquet``.
        commands: by constraint.
    """
    most = _MOST_SCORE_BYTES["train"]
    held = _holdable({"train": solved_rows(problem, solved, most_bytes=most).within(most)})
    return {
        **_demand_data(solved, problem, frontier, held, commands),
        "judged": "train",
        "scores": [],
        "browser": None,
    }


def _holdable(populations: Mapping[str, Population]) -> Mapping[str, Population]:
    """The populations, or none of them where a page, whose numbers have 32 bits, cannot hold the scores of one."""
    return populations if all(one.fits_single for one in populations.values()) else {}


def _demand_data(
    solved: ReportedSolution,
    problem: DualProblem,
    frontier: pa.Table,
    held: Mapping[str, Population],
    commands: Mapping[str, Command],
) -> dict[str, Any]:
    """What ``demand.js`` and ``explore.js`` read."""
    why = _why_not_live(solved, held.get("train"))
    return {
        **_problem_data(solved, problem, frontier, commands),
        "live": not why,
        "whyNotLive": why,
        "follows": all(one.stated.per is None for one in solved.constraints),
        "populations": {name: population.to_document() for name, population in held.items()},
    }


def _problem_data(
    solved: ReportedSolution, problem: DualProblem, frontier: pa.Table, commands: Mapping[str, Command]
) -> dict[str, Any]:
    """What is known of the problem without its rows."""
    by_price = sorted(
        solved.constraints,
        key=lambda one: -abs(one.multiplier) * float(problem.score_scale_m[solved.names.index(one.name)]),
    )
    movable = {one.name for one in by_price[:_MOST_SLIDERS]}
    reward = solved.reward
    return {
        "reward": {"name": visible(reward.name), "reference": reward.reference},
        "beta": solved.beta,
        "trust": solved.trust.verdict,
        "nSamples": solved.n_samples,
        "responses": round(math.exp(solved.kl.log_samples)),
        "kept": _kept_safeguards(solved),
        "own": {"multipliers": solved.multipliers_m.tolist(), "gain": reward.predicted - reward.reference},
        "constraints": [
            _constraint(
                one,
                scale=float(problem.score_scale_m[place]) or 1.0,
                frontier=_frontier(frontier, one, solved) if one.name in movable else None,
                command=commands.get(one.name),
            )
            for place, one in enumerate(solved.constraints)
        ],
    }


def _kept_safeguards(solved: ReportedSolution) -> str:
    """What was asked beyond the demands that another demand would change, as a sentence; empty where nothing was."""
    parts = [
        f"{visible(one.name)}: {', '.join(added)}"
        for one in solved.constraints
        if (added := safeguard_parts(one, _MOVING))
    ]
    if not parts:
        return ""
    return (
        f"Beyond the demands the dual was asked for what this solution's safeguards add ({'; '.join(parts)}). That "
        "depends on the demand: while the slider moves it is kept as it is, and whoever solves for another demand "
        "finds it anew, with a λ* that may differ from the one shown here."
    )


def _constraint(
    one: ReportedConstraint, *, scale: float, frontier: dict[str, Any] | None, command: Command | None
) -> dict[str, Any]:
    margin = one.margin is not None
    asked = one.threshold if one.margin is None else one.margin
    demanded = one.demanded.threshold if one.demanded.margin is None else one.demanded.margin
    words = visible(subject(one.name, one.stated))
    return {
        "name": visible(one.name),
        "subject": words,
        "scoreLabel": words,
        "column": CONSTRAINT_PREFIX + one.name,
        "direction": one.direction,
        "sign": sign_of(one.direction),
        "unit": "margin" if margin else "threshold",
        "origin": one.reference if margin else 0.0,
        "columnThreshold": one.column_threshold,
        "demanded": demanded,
        "added": asked - demanded,
        "scale": scale,
        "frontier": frontier,
        "command": command and command.text,
        "commandNote": command and command.note,
    }


def _frontier(frontier: pa.Table, one: ReportedConstraint, solved: ReportedSolution) -> dict[str, Any] | None:
    """The certified points of a sweep, by rising demand; None of fewer than two, or of an older file's columns."""
    at = "threshold" if one.margin is None else "margin"
    if not {at, "kl", "ess_median"} <= set(frontier.column_names):
        return None
    rows = frontier.filter(pc.and_(frontier["feasible"], pc.equal(frontier["constraint"], one.name))).sort_by(at)
    if rows.num_rows < 2:
        return None

    def numbers(name: str) -> list[float]:
        # Twice the digits that the page vouches for: all of them would be half of a page with many constraints.
        return [float(f"{value:.8g}") for value in rows[name].to_numpy()]

    def together(prefix: str) -> list[list[float]]:
        return [list(point) for point in zip(*(numbers(f"{prefix}_{name}") for name in solved.names), strict=True)]

    return {
        "asked": rows[at].to_pylist(),  # in full: the run's own demand is one of them
        "multipliers": together("multiplier"),
        "predicted": together("predicted"),
        "reward": numbers("reward"),
        "kl": numbers("kl"),
        "ess": numbers("ess_median"),
        "beta": numbers("beta") if "beta" in rows.column_names else [solved.beta] * rows.num_rows,
    }


def _why_not_live(solved: ReportedSolution, train: Population | None) -> str:
    """Why the page cannot solve the dual itself; empty where it can."""
    if solved.kl_budget is not None:
        return "under a KL budget β moves with the demand"
    if any(one.column_ratio is not None for one in solved.constraints):
        return "the column of a ratio changes with its demand"
    if train is None:
        return "the scores are not in this page, or beyond the range of its numbers"
    if not train.is_whole:
        held = f"{len(train.prompt_ids):,} of {train.n_prompts_in_all:,} prompts"
        return f"this page holds the scores of {held}, evenly taken"
    return ""


def _scores(solved: ReportedSolution, population: Population | None) -> list[dict[str, Any]]:
    """The reward and the raw scores, each with a cut that means something where the demands give one."""
    found = [_score(solved.reward.name, "reward", ">=", None)]
    for score, column in score_columns(solved).items():
        if population is not None and column in population.columns:
            direction = next(one.direction for one in solved.constraints if score in one.stated.scores)
            found.append(_score(score, column, "<=" if direction == "<=" else ">=", cut_of(solved, score)))
    return found


def cut_of(solved: ReportedSolution, score: str) -> float | None:
    """Where the demands cut a score: at what they say of single responses, else at the mean they demand."""
    bounds = [one for one in solved.constraints if one.stated.score == score]
    for one in bounds:
        for value in (one.stated.at_least, one.stated.at_most, one.stated.below):
            if value is not None:
                return value
    means = [one.demanded.threshold for one in bounds if one.stated.kind == "mean" and one.stated.per is None]
    return means[0] if means else None


def _score(name: str, column: str, side: str, cut: float | None) -> dict[str, Any]:
    return {"name": visible(name), "column": column, "policyColumn": column, "side": side, "cut": cut}


def _browser(run_dir: Path, judged: str, populations: Mapping[str, Population]) -> dict[str, Any] | None:
    reference, policy = populations.get(judged), populations.get("policy")
    if reference is None:
        return None
    texts = read_texts(run_dir, judged, reference, policy)
    return {
        "population": judged,
        "prompts": [_prompt(one) for one in texts],
        "note": _note(judged, texts, reference, policy),
    }


def _prompt(one: PromptTexts) -> dict[str, Any]:
    return {
        "messages": [[visible(message["role"]), visible(message["content"])] for message in one.messages],
        "category": visible(one.category),
        "place": one.place,
        "texts": [visible(text) for text in one.texts],
        "policyPlace": one.policy_place,
        "policyTexts": [visible(text) for text in one.policy_texts],
    }


def _note(split: str, texts: list[PromptTexts], reference: Population, policy: Population | None) -> str:
    """What of all responses is in the page."""
    n_held = sum(len(one.texts) for one in texts)
    n_answers = sum(len(one.policy_texts) for one in texts)
    are_all = len(texts) == reference.n_prompts_in_all and n_held == len(reference.sample_index_n)
    said = f"{n_held:,} responses of the reference to {len(texts):,} {split} prompts"
    if policy is not None:
        said += f" and {n_answers:,} of the trained policy"
    if are_all:
        return f"All {said}."
    longest = max((len(one.texts) for one in texts), default=0)
    return (
        f"{said}: to keep the page small, {len(texts):,} of {reference.n_prompts_in_all:,} prompts, evenly taken, and "
        f"the first {longest} responses to each; none is chosen by its score. All are in tilted/ and "
        "evaluation/samples/ of the run."
    )
