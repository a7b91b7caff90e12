"""Is each kind of constraint met? A trained policy for each, with the demand, the prediction and what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.baselines import figures
from pipeline.baselines.outcomes import Outcome, read_outcome
from pipeline.baselines.policies import ONE_SHOT, SURE
from pipeline.baselines.results import Result, Rows
from pipeline.baselines.study import Arm, Changes, Study
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import sign_of
from pipeline.contracts.statistics import Statistic
from pipeline.run.run import Run
from pipeline.scoring.joined import reference_scores
from pipeline.scoring.statistic_estimates import estimate
from stage1_dual.dual import InfeasibleError, KlBudgetError


def demands(study: Study, base: Run) -> Mapping[str, Changes]:
    """The demands by kind, as a recipe has them, each far enough from the reference to cost reward.

    All but that of the equality, which has no safe side, are assured. All but that of the KL budget, which it would
    exceed, are moved to the prediction. What a policy learns least of are a kink and, least of all, a step in the
    score: the tail trains twice and the share eight times as long as the others.

    Args:
        study: whose middle margin says how far to go.
        base: for what the reference's means are, and how long a policy is trained.
    """
    rows = reference_scores(base, "train", names=(study.config.reward, "harmless", "humour"))
    harmless, humour = (estimate(Statistic(name), rows).value for name in ("harmless", "humour"))

    def step(factor: float) -> float:
        return round(factor * study.middle_margin, 9)

    above: Mapping[str, Any] = {"score": "harmless", "direction": ">=", **SURE}
    low, high = round(harmless + step(0.6), 3), round(harmless + step(1.1), 3)
    share = {**above, "statistic": "share", "at_least": 0.0, "margin": step(0.2)}
    tail = {**above, "statistic": "cvar", "level": 0.2, "margin": step(0.75)}
    matched = {"training.match_prediction": True}

    def longer(times: int) -> Changes:
        return {**matched, "training.epochs": times * base.config.training.epochs}

    return {
        "share": {"constraints": {"safe": share}, **longer(8)},
        "each category": {"constraints": {"tone": {**above, "each": "category", "margin": step(0.625)}}, **matched},
        "band": {"constraints": {"harmless": {"between": [low, high], **SURE}}, **matched},
        "KL budget": {
            "beta": {"kl": step(0.625)},
            "constraints": {"harmless": {"direction": ">=", "margin": step(0.875), **SURE}},
        },
        "CVaR": {"constraints": {"tail": tail}, **longer(2)},
        "equality": {"constraints": {"humour": {"equals": round(humour - step(1 / 3), 3)}}, **matched},
    }


def constraint_kinds(study: Study) -> Result:
    """One policy for each kind of constraint and seed: demanded, predicted, realised, judged."""
    return judge_demands(
        study,
        demands,
        "constraint_kinds",
        "Kinds of constraint: share, each category, band, KL budget, tail, equality",
    )


def judge_demands(
    study: Study, demands_of: Callable[[Study, Run], Mapping[str, Changes]], name: str, title: str
) -> Result:
    """A trained policy for each set of demands and seed: every demand with its prediction and what came out.

    Args:
        study: the study.
        demands_of: changes of the recipe by what the set of demands is called, for a base run.
        name: of the experiment.
        title: of its page.
    """
    rows: Rows = []
    refused: list[str] = []
    for seed in study.seeds:
        base = study.wider_base(seed)
        for kind, changes in demands_of(study, base).items():
            arm = Arm(f"kind-{kind.lower().replace(' ', '-')}", ONE_SHOT, changes)
            try:
                rows.extend(_rows(read_outcome(base, study.train(base, arm)), kind, seed))
            except (InfeasibleError, KlBudgetError, InputError) as error:  # a small world may not have room for it
                refused.append(
                    f"{kind}, seed {seed}: {' '.join(line.strip() for line in str(error).splitlines()[:2])}"
                )
    if not rows:
        raise InputError(f"experiment {name}: none of its demands can be met; {'; '.join(refused)}")
    table = pa.Table.from_pylist(rows)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    summary = [_summary(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
    findings = [
        (
            f"{sum(row['status'] != 'violated' for row in rows)} of {len(rows)} demands of "
            f"{len({row['run'] for row in rows})} policies are not violated, "
            f"{sum(row['status'] == 'satisfied' for row in rows)} are satisfied"
        ),
        *refused,
        *(
            f"{one['kind']}: realised less predicted is {one['|realised less predicted| (sd)']:.3f} standard "
            f"deviations of the column in the mean, realised less demanded {one['realised less demanded (sd)']:+.3f}, "
            f"the assurance included, over the {one['binding']} of {one['demands']} demands that bind"
            for one in summary
            if one["binding"]
        ),
    ]
    return Result(name, title, table, figures.kinds_figure(table), findings, pa.Table.from_pylist(summary))


def _rows(outcome: Outcome, kind: str, seed: int) -> Rows:
    found: Rows = []
    evaluated = {entry["name"]: entry for entry in outcome.evaluation["constraints"]}
    for one, entry in zip(outcome.solution.constraints, outcome.dual["constraints"], strict=True):
        realised = evaluated[one.name]
        margin = one.demanded.margin
        origin = 0.0 if margin is None else realised["reference"]
        demanded = one.demanded.threshold if margin is None else margin
        error = (realised["realised"] - origin - demanded) / realised["column_sd"]
        predicted, ends = _predicted(entry, margin=one.margin, sign=sign_of(one.direction))
        found.append(
            {
                "kind": kind,
                "constraint": one.name,
                "seed": seed,
                "demand": one.demand.text(),
                "demanded": demanded,
                "multiplier": one.multiplier,
                "predicted": predicted,
                "predicted_low": ends[0],
                "predicted_high": ends[1],
                "realised": realised["realised"] - origin,
                "ci95_low": realised["ci95"][0] - origin,
                "ci95_high": realised["ci95"][1] - origin,
                "status": realised["status"],
                "unit_size": realised["column_sd"],
                "sign": sign_of(one.direction),
                "error": sign_of(one.direction) * error,
                "prediction_error": (
                    (realised["realised"] - realised["predicted"] - outcome.understated(one.name))
                    / realised["column_sd"]
                ),
                "unit": "sd",
                "run": outcome.run.name,
            }
        )
    kl = outcome.evaluation["kl"]
    if "budget" in kl:
        solved = outcome.dual["kl"]
        bias, ends = solved["response_bias"] or 0.0, solved["predicted_ci95"]  # the interval is of what is corrected
        found.append(
            {
                "kind": kind,
                "constraint": "KL",
                "seed": seed,
                "demand": f"KL <= {kl['budget']:g}",
                "demanded": kl["budget"],
                "multiplier": outcome.solution.beta,
                "predicted": solved["predicted"] - bias,
                "predicted_low": ends[0],
                "predicted_high": ends[1],
                "realised": kl["realised"],
                "ci95_low": kl["realised_ci95"][0],
                "ci95_high": kl["realised_ci95"][1],
                "status": kl["status"],
                "unit_size": 1.0,
                "sign": -1.0,
                "error": kl["budget"] - kl["realised"],
                "prediction_error": kl["realised"] - (kl["predicted"] - bias),
                "unit": "nats",
                "run": outcome.run.name,
            }
        )
    return found


def _predicted(entry: Mapping[str, Any], *, margin: float | None, sign: float) -> tuple[float, list[float]]:
    """The prediction of the dual with its interval, over the reference where the demand is a margin."""
    value = entry["predicted"] if entry["predicted_corrected"] is None else entry["predicted_corrected"]
    if margin is None:
        return value, entry["predicted_ci95"]
    return value - entry["reference"], sorted(margin + sign * end for end in entry["slack_ci95"])


def _summary(kind: str, rows: Rows) -> dict[str, Any]:
    # A demand that another one overfulfils is met with room to spare; only missing it is an error then.
    binding = [row for row in rows if row["multiplier"] != 0 and row["unit"] == "sd"]
    errors, surprises = (np.array([row[key] for row in binding]) for key in ("error", "prediction_error"))
    return {
        "kind": kind,
        "demands": len(rows),
        "not violated": sum(row["status"] != "violated" for row in rows),
        "satisfied": sum(row["status"] == "satisfied" for row in rows),
        "binding": len(binding),
        "realised less demanded (sd)": float(np.mean(errors)) if binding else None,
        "|realised less demanded| (sd)": float(np.mean(np.abs(errors))) if binding else None,
        "realised less predicted (sd)": float(np.mean(surprises)) if binding else None,
        "|realised less predicted| (sd)": float(np.mean(np.abs(surprises))) if binding else None,
    }
