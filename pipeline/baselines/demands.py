"""Is the demand met? Realised against demanded margins of one constraint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.baselines import figures, policies
from pipeline.baselines.costs import seconds_to_result
from pipeline.baselines.outcomes import read_outcome
from pipeline.baselines.results import Result, Rows
from pipeline.baselines.study import Arm, Study
from pipeline.run.run import Run


def constraint_satisfaction(study: Study) -> Result:
    """Realised against demanded margin: one-shot over margins and seeds, multi-shot over some of the first."""
    rows: Rows = []
    first = study.seeds[0]
    iterated = {(first, margin) for margin in study.some_margins}
    for seed in study.seeds:
        base = study.base(seed)
        for margin in study.margins:
            arm = policies.one_shot(margin)
            rows.append(_satisfaction_row(base, study.train(base, arm), arm, seed, margin, policies.ONE_SHOT))
            if (seed, margin) in iterated:
                rows.append(_satisfaction_row(base, study.iterate(base, arm), arm, seed, margin, policies.MULTI_SHOT))
    table = pa.Table.from_pylist(rows)
    one_shot, multi_shot = ([r for r in rows if r["method"] == m] for m in (policies.ONE_SHOT, policies.MULTI_SHOT))
    beside = [row for row in one_shot if (row["seed"], row["demanded"]) in iterated]
    one, multi, same = (
        _satisfaction_summary(method, some)
        for method, some in (
            (policies.ONE_SHOT, one_shot),
            (policies.MULTI_SHOT, multi_shot),
            (policies.ONE_SHOT, beside),
        )
    )
    summary = [one, multi, {**same, "method": f"{policies.ONE_SHOT}, where there is multi-shot"}]
    findings = [
        (
            f"{row['method']}: mean absolute error {row['mean absolute error (sd)']:.3f} standard deviations of the "
            f"constraint under the reference, bias {row['bias (sd)']:+.3f}; not violated by "
            f"{row['not violated']:.0%} of {row['policies']} policies. {row['noise (sd)']:.3f} would be the error of "
            "a policy that meets its demand exactly, from evaluating finitely many prompts and responses"
        )
        for row in summary
    ]
    findings += [
        (
            f"of the one-shot bias {one['dual (sd)']:+.3f} comes from the dual (predicted on test prompts less "
            f"demanded) and {one['training (sd)']:+.3f} from training (realised less predicted), mean over policies. "
            f"Lambda* is corrected for finitely many responses, which took off {one['responses (sd)']:.3f}. By the "
            f"gold score the improvement is {one['gold / proxy']:.2f} times that by the score model"
        ),
        (
            f"where there is multi-shot a policy takes {same['seconds']:.0f} s by one-shot, {multi['seconds']:.0f} s "
            f"by multi-shot, a ratio of {same['seconds'] / multi['seconds']:.2f}; sampling and scoring the reference "
            "are not counted, nor its log-probabilities, which the policies of a seed share"
        ),
    ]
    return Result(
        "constraint_satisfaction",
        "Constraint satisfaction: realised against demanded margin",
        table,
        figures.satisfaction_figure(table),
        findings,
        pa.Table.from_pylist(summary),
    )


def _satisfaction_row(base: Run, run: Run, arm: Arm, seed: int, margin: float, method: str) -> dict[str, Any]:
    outcome = read_outcome(base, run)
    bound = outcome.evaluation["constraints"][0]
    proxy, gold = outcome.score("harmless"), outcome.score("gold_harmless")
    reward = outcome.evaluation["reward"]
    return {
        "method": method,
        "seed": seed,
        "demanded": margin,
        "lambda": outcome.multipliers["harmless"],
        "predicted": bound["predicted"] - bound["reference"] + outcome.understated("harmless"),
        "response_bias": outcome.solution.constraints[0].safeguard.response_bias,
        "realised": proxy.improvement,
        "ci95_low": proxy.ci95[0],
        "ci95_high": proxy.ci95[1],
        "status": bound["status"],
        "sd": proxy.sd,
        "error_sd": (proxy.improvement - margin) / proxy.sd,
        "gold_realised": gold.improvement,
        "reward_predicted": reward["predicted"] - reward["reference"],
        "reward_realised": reward["improvement"],
        "kl": outcome.evaluation["kl"]["realised"],
        "closed_fraction": outcome.evaluation["lagrangian"]["closed_fraction"],
        "seconds": seconds_to_result(base, arm, method),
        "run": run.name,
    }


def _satisfaction_summary(method: str, rows: Rows) -> dict[str, Any]:
    column = {
        name: np.array([row[name] for row in rows]) for name in rows[0] if name not in ("method", "status", "run")
    }
    one_shot = method == policies.ONE_SHOT
    sd = column["sd"]
    half = (column["ci95_high"] - column["ci95_low"]) / 2
    return {
        "method": method,
        "policies": len(rows),
        "mean absolute error (sd)": float(np.mean(np.abs(column["error_sd"]))),
        "bias (sd)": float(np.mean(column["error_sd"])),
        # Of a normal error with the standard error of the evaluation, the mean absolute value is sqrt(2 / pi) of it.
        "noise (sd)": float(np.mean(np.sqrt(2 / np.pi) * half / 1.96 / sd)),
        "satisfied": float(np.mean([row["status"] == "satisfied" for row in rows])),
        "not violated": float(np.mean([row["status"] != "violated" for row in rows])),
        # The dual of a later iterate is asked for other thresholds than are demanded.
        "dual (sd)": float(np.mean((column["predicted"] - column["demanded"]) / sd)) if one_shot else None,
        "responses (sd)": float(np.mean(-column["response_bias"] / sd)) if one_shot else None,
        "training (sd)": float(np.mean((column["realised"] - column["predicted"]) / sd)),
        "gold / proxy": float(column["gold_realised"].sum() / column["realised"].sum()),
        "closed fraction": float(np.mean(column["closed_fraction"])),
        "seconds": float(np.mean(column["seconds"])),
    }
