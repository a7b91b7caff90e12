"""From the artifacts of a run to what the figures and the page show, all recomputed from the files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.artifacts import read_json, shown
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.problem import sign_of
from pipeline.contracts.shards import read_parquet
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import CONSTRAINT_PREFIX, PROMPTS, SAMPLES, SCORE_PREFIX, tilted_schema
from pipeline.published import PublishedPoint
from pipeline.report.figures import (
    Bound,
    Comparison,
    DualCurve,
    FrontierCurve,
    GoldComparison,
    Interval,
    LadderCurve,
    Measured,
    Outcome,
    ScoreDistribution,
    TrainingCurve,
)
from pipeline.report.populations import (
    WEIGHT,
    Population,
    brief_messages,
    brief_text,
    judged_split,
    score_columns,
)
from pipeline.report.solved import ReportedConstraint, ReportedReward, ReportedSolution
from stage1_dual.dual import DualProblem, evaluate_dual

_SOLVED_SPLIT = "train"

_CURVES = {"step", "loss", "eval_loss", "eval_closed_fraction"}
_LARGEST = 1e300
_BINS = 48
_SHOWN_OF_A_FRONTIER = ("threshold", "margin", "beta", "kl", "ess_median")
"""Columns that files of older versions may lack."""

Message = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class HandoffRows:
    """The scored samples the dual was solved on, one row a response.

    Attributes:
        prompt_n: number of each row's prompt, shape (n,).
        reward_n: rewards, reward units, shape (n,).
        scores_nm: the columns that the multipliers multiply, in the user's own direction, shape (n, m).
        weight_n: tilted weights, summing to 1 within a prompt, shape (n,).
    """

    prompt_n: NDArray[np.int64]
    reward_n: FloatArray
    scores_nm: FloatArray
    weight_n: FloatArray


@dataclass(frozen=True)
class Example:
    """A completion, with its scores where it has any.

    Attributes:
        text: the completion.
        scores: name and mean score, in the table's order.
        weight: tilted weight times the number of responses: 1 is the weight under the reference policy.
    """

    text: str
    scores: Mapping[str, float]
    weight: float | None = None


@dataclass(frozen=True)
class PromptExamples:
    """What the reference policy answered to one prompt, from both ends of the tilted weights."""

    messages: Sequence[Message]
    raised: Sequence[Example]
    lowered: Sequence[Example]


@dataclass(frozen=True)
class PolicyExamples:
    """What the trained policy answered to one test prompt."""

    messages: Sequence[Message]
    texts: Sequence[str]


def read_tilted_scores(folder: Path, constraint_names: Sequence[str]) -> HandoffRows:
    """Read the rows the dual was solved on from the hand-off table.

    Args:
        folder: the folder ``tilted/`` of a run.
        constraint_names: names of the constraints, in the order of ``dual.json``.

    Raises:
        CorruptArtifactError: no such table, a damaged file, a column that is missing, or no rows of the train split.
    """
    columns = [CONSTRAINT_PREFIX + name for name in constraint_names]
    needed = ["prompt_id", "reward", *columns, "weight", "split"]
    schema = tilted_schema(constraint_names)
    table = pa.concat_tables([read_parquet(path, columns=needed, schema=schema) for path in _tilted_files(folder)])
    rows = table.filter(pc.equal(table["split"], _SOLVED_SPLIT))
    if rows.num_rows == 0:
        raise CorruptArtifactError(f"{folder} has no rows of the split {_SOLVED_SPLIT!r}; the dual is solved on those")
    codes = rows["prompt_id"].combine_chunks().dictionary_encode()
    return HandoffRows(
        prompt_n=np.asarray(codes.indices, dtype=np.int64),
        reward_n=_floats(rows["reward"]),
        scores_nm=np.column_stack([_floats(rows[name]) for name in columns]),
        weight_n=_floats(rows["weight"]),
    )


def sample_size_shares(scores: HandoffRows) -> FloatArray:
    """Effective sample size 1 / sum w^2 over the number of responses, per prompt, shape (p,)."""
    counts_p = np.bincount(scores.prompt_n)
    ess_p = 1.0 / np.bincount(scores.prompt_n, weights=scores.weight_n**2)
    return np.asarray(ess_p / counts_p, dtype=np.float64)


def build_problem(solution: Solution, scores: HandoffRows) -> DualProblem:
    """The problem of a solution on the samples it was solved on."""
    return DualProblem.from_rows(
        scores.prompt_n,
        scores.reward_n,
        scores.scores_nm * solution.signs_m,
        thresholds=solution.turned_thresholds_m,
        beta=solution.beta,
        constraint_names=solution.names,
    ).with_equalities(np.array([one.direction == "=" for one in solution.constraints], dtype=bool))


def build_dual_curves(solved: ReportedSolution, problem: DualProblem, *, n_points: int) -> list[DualCurve]:
    """The dual along each multiplier in turn, recomputed from the samples.

    Args:
        solved: the solution.
        problem: its problem.
        n_points: how many multipliers a curve has, the optimum not counted.
    """
    lam_star_m = solved.multipliers_m
    curves = []
    for place, bound in enumerate(solved.constraints):
        lam_star = _measured(bound.multiplier, bound.multiplier_ci95)
        scale = float(problem.score_scale_m[place])
        # beta / s tilts by one standard deviation of the score: the natural unit of a multiplier that is 0.
        unit = problem.beta / scale if scale > 0 else 1.0
        lower, upper = lam_star.ci95 if lam_star.ci95 is not None else (0.0, 0.0)
        end = max(0.0, 2.0 * lam_star.value, 1.25 * upper)
        start = min(0.0, 2.0 * lam_star.value, 1.25 * lower) if bound.direction == "=" else 0.0
        lam_k = np.union1d(np.linspace(start, end or (0.0 if start else unit), n_points), [lam_star.value])
        lam_km = np.tile(lam_star_m, (len(lam_k), 1))
        lam_km[:, place] = lam_k
        found = [evaluate_dual(problem, lam_m) for lam_m in lam_km]
        curves.append(
            DualCurve(
                name=bound.name,
                lam_k=lam_k,
                dual_value_k=np.array([one.value for one in found]),
                slack_k=np.array([one.slack_m[place] for one in found]),
                lam_star=lam_star,
            )
        )
    return curves


def read_frontier(path: Path, constraint_names: Sequence[str]) -> pa.Table:
    """The frontier of a run.

    Args:
        path: ``dual/frontier.parquet``.
        constraint_names: names of the constraints.

    Raises:
        CorruptArtifactError: the file is damaged or a column is missing.
    """
    needed = ["constraint", "feasible", "reward"]
    needed += [f"{prefix}_{name}" for name in constraint_names for prefix in ("multiplier", "predicted")]
    read_parquet(path, columns=needed)  # names what is missing
    table = read_parquet(path)
    needed += [name for name in _SHOWN_OF_A_FRONTIER if name in table.column_names]
    kinds = {"constraint": pa.string(), "feasible": pa.bool_()}
    for name in needed:
        wanted = kinds.get(name, pa.float64())
        if table[name].type != wanted:
            raise CorruptArtifactError(f"{path}: the column {name!r} is of {table[name].type}, expected {wanted}")
    certified = table.filter(table["feasible"])
    for name in needed:
        if name not in kinds and not np.isfinite(_floats(certified[name])).all():
            raise CorruptArtifactError(f"{path}: the column {name!r} has no number at a feasible point")
    return table


def build_frontier_curves(
    frontier: pa.Table,
    solved: ReportedSolution,
    evaluation: Mapping[str, Any] | None,
    published: Mapping[str, Sequence[PublishedPoint]] = MappingProxyType({}),
) -> list[FrontierCurve]:
    """The feasible part of each constraint's frontier, with the run's own outcomes.

    Args:
        frontier: the content of ``frontier.parquet``.
        solved: the solution.
        evaluation: the content of ``evaluation.json``, or None before stage 2.
        published: others' results by constraint; shown where the constraint is a margin, as they are gains.
    """
    table = frontier.filter(frontier["feasible"])
    evaluated = {bound["name"]: bound for bound in evaluation["constraints"]} if evaluation is not None else {}
    reward = solved.reward
    curves = []
    for bound in solved.constraints:
        name = bound.name
        rows = table.filter(pc.equal(table["constraint"], name))
        if rows.num_rows == 0:
            continue
        is_margin = bound.margin is not None
        origin = bound.reference if is_margin else 0.0
        score_k = _floats(rows[f"predicted_{name}"]) - origin
        order_k = np.argsort(score_k, kind="stable")
        predicted_test, realised = None, None
        if evaluation is not None and name in evaluated:
            predicted_test, realised = _test_outcomes(evaluated[name], evaluation["reward"], is_margin=is_margin)
        curves.append(
            FrontierCurve(
                bound=Bound(name, bound.direction, bound.demanded.threshold - origin),
                is_margin=is_margin,
                reward_name=reward.name,
                score_k=score_k[order_k],
                reward_k=_floats(rows["reward"])[order_k] - reward.reference,
                multiplier_k=_floats(rows[f"multiplier_{name}"])[order_k],
                reference=Outcome(Measured(bound.reference - origin), Measured(0.0)),
                predicted=Outcome(Measured(bound.predicted - origin), Measured(reward.predicted - reward.reference)),
                predicted_test=predicted_test,
                realised=realised,
                published=tuple(published.get(name, ())) if is_margin else (),
            )
        )
    return curves


def build_ladder_curves(solved: ReportedSolution) -> list[LadderCurve]:
    """The response ladder of every constraint that binds; none where prompts have too few responses for a second rung.

    Args:
        solved: the solution.
    """
    rungs = solved.ladder.rungs
    if len(rungs) < 2:
        return []
    return [
        LadderCurve(
            name=bound.name,
            responses_r=np.array([rung.n_responses for rung in rungs]),
            multiplier_r=np.array([rung.multipliers[bound.name] for rung in rungs], dtype=np.float64),
            lam_star=_measured(bound.multiplier, bound.multiplier_ci95),
            corrected=bound.multiplier_corrected,
        )
        for bound in solved.constraints
        if bound.multiplier
    ]


def build_comparisons(evaluation: Mapping[str, Any], solved: ReportedSolution) -> list[Comparison]:
    """Reference, predicted and realised means of the reward and of each constraint.

    The interval of a prediction is the dual's for the test prompts, where these are the prompts that were evaluated;
    where a margin is demanded that of the difference to the reference, as the realised one's is.
    """
    predicted: dict[str, ReportedReward | ReportedConstraint] = {solved.reward.name: solved.reward}
    predicted |= {one.name: one for one in solved.constraints}
    return [
        Comparison(
            name=name,
            bound=_bound(found) if "threshold" in found else None,
            reference=_measured(found["reference"]),
            predicted=_measured(found["predicted"], _heldout_ends(predicted[name], found["predicted"])),
            realised=_measured(found["realised"], found["ci95"]),
        )
        for name, found in _scores_of(evaluation, solved.reward.name)
    ]


def build_distributions(
    solved: ReportedSolution, populations: Mapping[str, Population], cuts: Mapping[str, float | None]
) -> list[ScoreDistribution]:
    """Each score under the reference, the tilted and the trained policy, as far as there are.

    Args:
        solved: the solution.
        populations: as :func:`pipeline.report.populations.read_populations` has them.
        cuts: where the demands cut a score.
    """
    reference = populations.get(judged_split(populations))
    if reference is None:
        return []
    found = []
    for name, column in {solved.reward.name: "reward", **score_columns(solved)}.items():
        if column not in reference.columns:
            continue
        values = [reference.columns[column], reference.columns[column]]
        weights = [reference.own_weight_n(), reference.columns[WEIGHT] / len(reference.counts_p)]
        if "policy" in populations:
            values.append(populations["policy"].columns[column])
            weights.append(populations["policy"].own_weight_n())
        low, high = np.quantile(np.concatenate(values), [0.001, 0.999])
        if not high > low:
            low, high = low - 0.5, low + 0.5
        edges_e = np.linspace(low, high, _BINS + 1)
        share_kb = np.stack(
            [
                np.histogram(np.clip(value_n, low, high), edges_e, weights=weight_n)[0]
                for value_n, weight_n in zip(values, weights, strict=True)
            ]
        )
        names = ("reference", "tilted", "trained")[: len(values)]
        found.append(ScoreDistribution(name, edges_e, share_kb, names, cuts.get(name)))
    return found


def build_gold_comparisons(evaluation: Mapping[str, Any], reward_name: str) -> list[GoldComparison]:
    """Movement by score model and by ground truth, for the scores that have a ground truth."""
    gold = evaluation.get("gold") or {}
    return [
        GoldComparison(
            name=name,
            proxy=(found["reference"], found["realised"]),
            gold=(gold[name]["reference"], gold[name]["realised"]),
        )
        for name, found in _scores_of(evaluation, reward_name)
        if name in gold
    ]


def read_training_curve(path: Path) -> TrainingCurve:
    """The training run from ``policy/training_log.json``: the Trainer's log history, with the reference at step 0.

    The checkpoint kept is the one of the lowest held-out gap; the reference itself is not a checkpoint.

    Raises:
        CorruptArtifactError: the file is not such a log, or holds no held-out evaluation of the policy.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "step" in entry for entry in entries):
        raise CorruptArtifactError(f"{path} is not a training log: it must be a list of objects with a `step`")
    for place, entry in enumerate(entries):
        for key in _CURVES & entry.keys():
            if type(entry[key]) not in (int, float) or not -_LARGEST <= entry[key] <= _LARGEST:
                value = shown(repr(entry[key]))
                raise CorruptArtifactError(
                    f"{path} is not a training log: `[{place}].{key}` is {value}; it must be a number"
                )
    trained = [entry for entry in entries if "loss" in entry]
    held_out = [entry for entry in entries if "eval_loss" in entry]
    checkpoints = [entry for entry in held_out if entry["step"] > 0]
    if not checkpoints:
        raise CorruptArtifactError(f"{path} has no held-out evaluation: no entry with `eval_loss` after step 0")
    has_fraction = all("eval_closed_fraction" in entry for entry in held_out)
    return TrainingCurve(
        step_t=_series(trained, "step"),
        loss_t=_series(trained, "loss"),
        heldout_step_e=_series(held_out, "step"),
        heldout_e=_series(held_out, "eval_loss"),
        chosen_step=min(checkpoints, key=lambda entry: float(entry["eval_loss"]))["step"],
        closed_fraction_e=_series(held_out, "eval_closed_fraction") if has_fraction else None,
    )


def read_examples(folder: Path, solution: Solution, *, n_prompts: int, n_each: int) -> list[PromptExamples]:
    """The completions whose weight the tilt raises and lowers most, for the first prompts of the hand-off table.

    Args:
        folder: the folder ``tilted/`` of a run.
        solution: for the names of the scores.
        n_prompts: how many prompts.
        n_each: how many distinct completions from either end.

    Raises:
        CorruptArtifactError: no such table, a damaged file, or a column that is missing.
    """
    path = _tilted_files(folder)[0]
    scores = tuple(dict.fromkeys(score for one in solution.constraints for score in one.stated.scores))
    # Tables of before there were statistics have the scores as what the multipliers multiply.
    prefix = SCORE_PREFIX if SCORE_PREFIX + scores[0] in pq.read_schema(path).names else CONSTRAINT_PREFIX
    names = {"reward": solution.reward.name, **{prefix + name: name for name in scores}}
    needed = ["prompt_id", "prompt", "completion", "weight", *names]
    table = read_parquet(path, columns=needed, schema=tilted_schema(solution.names, scores))
    ids = pc.unique(table["prompt_id"])[:n_prompts]
    found = []
    for prompt_id in ids:
        rows = table.filter(pc.equal(table["prompt_id"], prompt_id)).sort_by([("weight", "descending")]).to_pylist()
        distinct = list({row["completion"]: row for row in rows}.values())
        examples = [
            Example(
                text=brief_text(row["completion"]),
                scores={label: row[column] for column, label in names.items()},
                weight=row["weight"] * len(rows),
            )
            for row in distinct
        ]
        examples.sort(key=lambda example: -(example.weight or 0.0))
        half = min(n_each, max(1, len(examples) // 2))
        found.append(
            PromptExamples(
                messages=brief_messages(rows[0]["prompt"]), raised=examples[:half], lowered=examples[half:][-half:]
            )
        )
    return found


def read_policy_examples(run_dir: Path, *, n_prompts: int, n_each: int) -> list[PolicyExamples]:
    """The first responses of the trained policy to the first test prompts; empty where the run keeps none.

    Args:
        run_dir: folder of the run, with ``prompts/`` and ``evaluation/samples/``.
        n_prompts: how many prompts.
        n_each: how many responses to each.

    Raises:
        CorruptArtifactError: a damaged file, or a column that is missing.
    """
    sampled = sorted((run_dir / "evaluation" / "samples").glob("data/test-*.parquet"))
    asked = sorted((run_dir / "prompts").glob("data/test-*.parquet"))
    if not sampled or not asked:
        return []
    needed = ["prompt_id", "sample_index", "completion"]
    rows = read_parquet(sampled[0], columns=needed, schema=SAMPLES)
    needed = ["prompt_id", "prompt"]
    prompts = pa.concat_tables([read_parquet(path, columns=needed, schema=PROMPTS) for path in asked])
    messages = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
    ids = [one for one in pc.unique(rows["prompt_id"]).to_pylist() if one in messages]
    found = []
    for prompt_id in ids[:n_prompts]:
        drawn = rows.filter(pc.equal(rows["prompt_id"], prompt_id)).sort_by("sample_index")
        texts = drawn["completion"][:n_each].to_pylist()
        found.append(PolicyExamples(brief_messages(messages[prompt_id]), [brief_text(text) for text in texts]))
    return found


def _scores_of(evaluation: Mapping[str, Any], reward_name: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(reward_name, evaluation["reward"]), *((bound["name"], bound) for bound in evaluation["constraints"])]


def _heldout_ends(found: ReportedReward | ReportedConstraint, predicted: float) -> Sequence[float | None] | None:
    if found.heldout is None or not math.isclose(found.heldout, predicted, rel_tol=1e-9, abs_tol=1e-12):
        return None
    if isinstance(found, ReportedConstraint) and found.demanded.margin is not None and found.heldout_slack_ci95:
        slack, ends = found.heldout_slack, found.heldout_slack_ci95
        if slack is not None and ends[0] is not None and ends[1] is not None:
            # As of what was realised: of the difference to the reference on the same prompts.
            sign = sign_of(found.direction)
            return sorted((predicted + sign * (ends[0] - slack), predicted + sign * (ends[1] - slack)))
    return found.heldout_ci95


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> FloatArray:
    return np.array([entry[key] for entry in entries], dtype=np.float64)


def _bound(record: Mapping[str, Any]) -> Bound:
    return Bound(record["name"], record["direction"], record["threshold"])


def _measured(value: float, ends: Sequence[float | None] | None = None) -> Measured:
    ci95: Interval | None = None
    if ends is not None and all(end is not None and math.isfinite(end) for end in ends):
        ci95 = (float(ends[0] or 0.0), float(ends[1] or 0.0))
    return Measured(float(value), ci95)


def _test_outcomes(bound: Mapping[str, Any], reward: Mapping[str, Any], *, is_margin: bool) -> tuple[Outcome, Outcome]:
    """Predicted and realised on the test prompts, against the reference policy on those same prompts."""
    origin = bound["reference"] if is_margin else 0.0
    gain = _measured(reward["realised"] - reward["reference"], reward.get("improvement_ci95"))
    realised = (
        _measured(bound["realised"] - origin, bound.get("improvement_ci95"))
        if is_margin
        else _measured(bound["realised"], bound["ci95"])
    )
    predicted = Outcome(Measured(bound["predicted"] - origin), Measured(reward["predicted"] - reward["reference"]))
    return predicted, Outcome(realised, gain)


def _tilted_files(folder: Path) -> list[Path]:
    # The train split first: its prompts are the ones the dual was solved on.
    paths = [path for split in ("train", "test") for path in sorted(folder.glob(f"data/{split}-*.parquet"))]
    if not paths:
        raise CorruptArtifactError(f"{folder} has no table: there is no Parquet file in its folder `data`")
    return paths


def _floats(column: pa.ChunkedArray) -> FloatArray:
    return np.asarray(column.to_numpy(), dtype=np.float64)
