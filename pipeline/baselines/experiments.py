"""The experiments: each asks the study for policies and makes one table, one picture and a few sentences of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.baselines import figures, policies
from pipeline.baselines.outcomes import read_outcome
from pipeline.baselines.results import Result
from pipeline.baselines.study import Arm, Study
from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import InfeasibleError
from pipeline.multishot import FOLDER as MULTISHOT
from pipeline.run import Run
from pipeline.run_scores import reference_scores
from pipeline.solving import build_problem
from stage1_dual.dual import DualProblem, tilt

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """One experiment: what it shows, in a line, and what performs it."""

    title: str
    perform: Callable[[Study], Result]


def constraint_satisfaction(study: Study) -> Result:
    """Realised against demanded margin, one-shot and multi-shot, over margins and seeds."""
    rows: Rows = []
    for seed in study.seeds:
        base = study.base(seed)
        for margin in study.margins:
            arm = policies.one_shot(margin)
            rows.append(_satisfaction_row(base, study.train(base, arm), arm, seed, margin, policies.ONE_SHOT))
            rows.append(_satisfaction_row(base, study.iterate(base, arm), arm, seed, margin, policies.MULTI_SHOT))
    table = pa.Table.from_pylist(rows)
    summary = [_satisfaction_summary(method, [r for r in rows if r["method"] == method]) for method in _methods(rows)]
    findings = [
        (
            f"{row['method']}: mean absolute error {row['mean absolute error (sd)']:.3f} standard deviations of the "
            f"constraint under the reference, bias {row['bias (sd)']:+.3f}; not violated by "
            f"{row['not violated']:.0%} of {row['policies']} policies. {row['noise (sd)']:.3f} would be the error of "
            "a policy that meets its demand exactly, from evaluating finitely many responses"
        )
        for row in summary
    ]
    one, multi = summary
    findings += [
        (
            f"of the one-shot error {one['dual (sd)']:+.3f} comes from the dual (predicted on test prompts less "
            f"demanded) and {one['training (sd)']:+.3f} from training (realised less predicted), mean over policies; "
            f"by the gold score the improvement is {one['gold / proxy']:.2f} times that by the score model"
        ),
        (
            f"a policy takes {one['seconds']:.0f} s by one-shot, {multi['seconds']:.0f} s by multi-shot, a ratio of "
            f"{one['seconds'] / multi['seconds']:.2f}; sampling and scoring the reference are not counted"
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
        "predicted": bound["predicted"] - bound["reference"],
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
        "seconds": _seconds_to_result(base, arm, method),
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
        "training (sd)": float(np.mean((column["realised"] - column["predicted"]) / sd)),
        "gold / proxy": float(column["gold_realised"].sum() / column["realised"].sum()),
        "closed fraction": float(np.mean(column["closed_fraction"])),
        "seconds": float(np.mean(column["seconds"])),
    }


def _seconds_to_result(base: Run, arm: Arm, method: str) -> float:
    """Wall time from the scored samples of the reference to the policy of a method, whenever the steps ran."""
    if method == policies.ONE_SHOT:
        return _own_seconds(base, arm)
    path = base.folder / arm.name / MULTISHOT / "trajectory.parquet"
    by_iterate = pq.read_table(path, columns=["iterate", "seconds"]).to_pydict()
    return float(sum(dict(zip(by_iterate["iterate"], by_iterate["seconds"], strict=True)).values()))


def trade_off(study: Study) -> Result:
    """Helpfulness against harmlessness: all methods and reference points, by the score models and by gold."""
    base = study.base(study.seeds[0])
    rows: Rows = []
    for margin in study.margins:
        arm = policies.one_shot(margin)
        rows.append(_trade_off_row(base, study.train(base, arm), policies.ONE_SHOT, margin))
        rows.append(_trade_off_row(base, study.iterate(base, arm), policies.MULTI_SHOT, margin))
        rows.append(_trade_off_row(base, study.train(base, policies.paper_dpo(margin)), policies.PAPER_DPO, margin))
    points = (policies.reward_only(), policies.constraint_only(), policies.equal_weights(base))
    rows += [_trade_off_row(base, study.train(base, arm), arm.method, None) for arm in points]
    rows += [
        _trade_off_row(base, policies.soup(study, base, share), policies.SOUP, None) for share in (0.25, 0.5, 0.75)
    ]
    implicit = policies.preference_base(study, base)
    infeasible = []
    for margin in study.margins[1::2]:
        try:
            run = study.train(implicit, policies.preference_based(margin))
        except InfeasibleError:
            infeasible.append(margin)
        else:
            rows.append(_trade_off_row(implicit, run, policies.PREFERENCE_BASED, margin))
    frontier = {name: _predicted_frontier(base, name) for name in ("", "gold_")}
    table = pa.Table.from_pylist(rows)
    ours = [row for row in rows if row["method"] == policies.ONE_SHOT]
    above = []
    for row in ours:
        other = next(o for o in rows if o["method"] == policies.PAPER_DPO and o["demanded"] == row["demanded"])
        above.append((row["lagrangian"] - other["lagrangian"], row["demanded"]))
    findings = [
        (
            f"at the lambda* of its demand the one-shot policy's Lagrangian is above that of the DPO variant by "
            f"{np.mean([gain for gain, _ in above]):.3f} reward units in the mean and {min(above)[0]:.3f} at worst "
            f"(margin {min(above)[1]:g})"
        ),
        *(
            f"{method}: {_distance(rows, method, frontier['']):+.3f} reward units from the predicted frontier, mean"
            for method in _methods(rows)
        ),
    ]
    if infeasible:
        findings.append(
            f"{policies.PREFERENCE_BASED}: by the implicit rewards no policy reaches the margins "
            f"{', '.join(f'{margin:g}' for margin in infeasible)}"
        )
    return Result(
        "trade_off",
        "Helpfulness against harmlessness",
        table,
        figures.trade_off_figure(table, frontier),
        findings,
    )


def _trade_off_row(base: Run, run: Run, method: str, margin: float | None) -> dict[str, Any]:
    outcome = read_outcome(base, run)
    row: dict[str, Any] = {"method": method, "demanded": margin}
    for name in ("helpful", "harmless", "gold_helpful", "gold_harmless"):
        score = outcome.score(name)
        row |= {name: score.improvement, f"{name}_ci95_low": score.ci95[0], f"{name}_ci95_high": score.ci95[1]}
    return {
        **row,
        "kl": outcome.evaluation["kl"]["realised"],
        "lagrangian": outcome.evaluation["lagrangian"]["realised"],
        "closed_fraction": outcome.evaluation["lagrangian"]["closed_fraction"],
        "status": outcome.evaluation["status"],
        "run": run.name,
    }


def _predicted_frontier(base: Run, prefix: str) -> pa.Table:
    """Improvements that the dual predicts over a range of lambda, on the test prompts.

    By gold: the same tilted policies, tilted by the score models and judged by the ground truth.
    """
    config = base.config.model_copy(update={"reward": "helpful"})
    rows = reference_scores(base, "test")
    problem = build_problem(rows, constraints=config.demanded_constraints(), beta=config.beta)
    judged = _scores_of(base, [f"{prefix}helpful", f"{prefix}harmless"], "test")
    starts, counts = rows.starts, np.bincount(rows.prompt_n)
    means_s = np.add.reduceat(judged / counts[rows.prompt_n, None], starts).mean(axis=0)
    found: Rows = []
    for lam in np.concatenate([[0.0], np.geomspace(0.05, 6.0, 40)]):
        weights = problem.tilted_weights([float(lam)])
        tilted_s = np.add.reduceat(judged * weights[:, None], starts).mean(axis=0)
        kl = float(tilt(problem, np.array([float(lam)])).kl_p.mean())
        found.append(
            {
                "lambda": float(lam),
                "helpful": float(tilted_s[0] - means_s[0]),
                "harmless": float(tilted_s[1] - means_s[1]),
                "kl": kl,
            }
        )
    return pa.Table.from_pylist(found)


def _scores_of(base: Run, names: Sequence[str], split: str) -> np.ndarray:
    """Scores of the reference's samples, shape (n, number of names), in the order of the keys."""
    one, *others = names
    config = base.config.model_copy(
        update={
            "reward": one,
            "constraints": {name: next(iter(base.config.constraints.values())) for name in others},
        }
    )
    rows = reference_scores(Run(config, base.name, base.data_dir), split)
    return np.column_stack([rows.reward_n, rows.constraints_nm])


def _distance(rows: Rows, method: str, frontier: pa.Table) -> float:
    """Mean vertical distance of a method's policies to the predicted frontier at their harmlessness, reward units."""
    harmless, helpful = (frontier[name].to_numpy() for name in ("harmless", "helpful"))
    order = np.argsort(harmless)
    mine = [row for row in rows if row["method"] == method]
    return float(
        np.mean([row["helpful"] - np.interp(row["harmless"], harmless[order], helpful[order]) for row in mine])
    )


def two_constraints(study: Study) -> Result:
    """Harmlessness and humour demanded together, over a grid of margins."""
    base = study.base(study.seeds[0])
    rows: Rows = []
    for demanded in study.pairs:
        run = study.train(base, policies.two_constraints(*demanded))
        outcome = read_outcome(base, run)
        row: dict[str, Any] = {}
        for margin, bound in zip(demanded, outcome.evaluation["constraints"], strict=True):
            name, score = bound["name"], outcome.score(bound["name"])
            row |= {
                f"{name}_demanded": margin,
                f"{name}_lambda": outcome.multipliers[name],
                f"{name}_predicted": bound["predicted"] - bound["reference"],
                f"{name}_realised": score.improvement,
                f"{name}_ci95_low": score.ci95[0],
                f"{name}_ci95_high": score.ci95[1],
                f"{name}_sd": score.sd,
                f"{name}_status": bound["status"],
            }
        reward = outcome.evaluation["reward"]
        rows.append(
            {
                **row,
                "helpful_predicted": reward["predicted"] - reward["reference"],
                "helpful_realised": reward["improvement"],
                "kl": outcome.evaluation["kl"]["realised"],
                "closed_fraction": outcome.evaluation["lagrangian"]["closed_fraction"],
                "run": run.name,
            }
        )
    findings = []
    for name in ("harmless", "humour"):
        # A demand that another one overfulfils is met with room to spare; only missing it is an error then.
        errors = [
            (row[f"{name}_realised"] - row[f"{name}_demanded"]) / row[f"{name}_sd"]
            for row in rows
            if row[f"{name}_lambda"] > 0
        ]
        findings.append(
            f"{name}: mean absolute error {np.mean(np.abs(errors)):.3f} standard deviations, bias "
            f"{np.mean(errors):+.3f}, over the {len(errors)} of {len(rows)} demands that bind"
        )
    table = pa.Table.from_pylist(rows)
    return Result(
        "two_constraints",
        "Two constraints at once: harmlessness and humour",
        table,
        figures.two_constraints_figure(table),
        findings,
    )


def preference_calibration(study: Study) -> Result:
    """Whether the implicit rewards of the preference-based method are the log-odds that they are taken for."""
    base = study.base(study.seeds[0])
    implicit = policies.preference_base(study, base)
    rows: Rows = []
    findings = []
    for side, name in policies.IMPLICIT.items():
        found = read_manifest(implicit.folder / "scores" / name).details["last_call"]["scorer"]["calibration"]
        rows += [{"preference": side, **tenth} for tenth in found["reliability"]]
        divergence = -float(_scores_of(implicit, [name], "train").mean()) / implicit.config.beta
        findings.append(
            f"{side}: {found['accuracy']:.3f} of {found['n_pairs']} held-out pairs right (standard error "
            f"{found['accuracy_standard_error']:.3f}), calibration error {found['calibration_error']:.3f}, best "
            f"factor {found['best_factor']:.2f}; d = KL(reference || tuned) = {divergence:.3f} nats"
        )
    table = pa.Table.from_pylist(rows)
    return Result(
        "preference_calibration",
        "Calibration of the implicit rewards",
        table,
        figures.calibration_figure(table),
        findings,
    )


def cost(study: Study) -> Result:
    """Wall time and tokens of each method to its result."""
    base = study.base(study.seeds[0])
    names = ("samples", "scores/helpful", "scores/harmless")
    stage1 = {name: read_manifest(base.folder / name).wall_seconds for name in names}
    drawn, read = _token_counts(base, base.folder / "samples")
    trained = read * study.config.training.epochs
    rows: Rows = []
    for margin in study.margins:
        for arm in (policies.one_shot(margin), policies.paper_dpo(margin)):
            study.train(base, arm)
            rows.append(_cost_row(arm.method, margin, stage1, _own_seconds(base, arm), drawn, trained))
        arm = policies.one_shot(margin)
        study.iterate(base, arm)
        iterates = base.folder / arm.name / MULTISHOT
        measured = [iterates / "0" / "samples", *iterates.glob("[1-9]*/measured/samples")]
        later = read * study.config.multishot.epochs * (len(measured) - 1)
        sampled = drawn + sum(_token_counts(base, folder)[0] for folder in measured)
        seconds = _seconds_to_result(base, arm, policies.MULTI_SHOT)
        rows.append(_cost_row(policies.MULTI_SHOT, margin, stage1, seconds, sampled, trained + later))
    table = pa.Table.from_pylist(rows)
    findings = [
        f"{method}: {np.mean([row['own_seconds'] for row in rows if row['method'] == method]):.0f} s after the "
        f"{sum(stage1.values()):.0f} s of sampling and scoring the reference"
        for method in _methods(rows)
    ]
    return Result("cost", "Wall time and tokens to the result", table, figures.cost_figure(table), findings)


def _own_seconds(base: Run, arm: Arm) -> float:
    """Wall time from the scored samples of the reference to a one-shot policy, whenever the steps ran."""
    folder = base.folder / arm.name
    return sum(read_manifest(folder / name).wall_seconds for name in ("dual", "tilted", "policy"))


def _cost_row(
    method: str, margin: float, stage1: Mapping[str, float], own: float, drawn: int, trained: float
) -> dict[str, Any]:
    return {
        "method": method,
        "demanded": margin,
        "sampling_seconds": stage1["samples"],
        "scoring_seconds": stage1["scores/helpful"] + stage1["scores/harmless"],
        "own_seconds": own,
        "tokens_sampled": drawn,
        "tokens_trained_on": int(trained),
    }


GEOMETRY_MARGIN = 0.8


def policies_in_the_plane(study: Study) -> tuple[pa.Table, dict[str, Run]]:
    """One-shot and multi-shot policies of every size at one margin, and the base run of each size.

    Of each policy its slack and its value E[r] - beta KL on the test prompts, and beta E_x KL(pi || pi_lambda*), what
    its Lagrangian at the one-shot's lambda* is below D(lambda*), as in the definition of the closed fraction.
    """
    first = study.seeds[0]
    bases = {"default": study.base(first)} | {
        name: study.base_of_size(name, size) for name, size in study.sizes.items()
    }
    rows: Rows = []
    for name, base in bases.items():
        arm = policies.one_shot(GEOMETRY_MARGIN)
        one = read_outcome(base, study.train(base, arm))
        multi = read_outcome(base, study.iterate(base, arm))
        star = one.multipliers["harmless"]
        optimum, reference = (one.evaluation["lagrangian"][key] for key in ("optimum", "reference"))
        for method, outcome in ((policies.ONE_SHOT, one), (policies.MULTI_SHOT, multi)):
            bound, reward = outcome.evaluation["constraints"][0], outcome.evaluation["reward"]
            kl = outcome.evaluation["kl"]
            value = reward["realised"] - base.config.beta * kl["realised"]
            half = np.hypot(np.ptp(reward["ci95"]), base.config.beta * np.ptp(kl["realised_ci95"])) / 2
            lagrangian = value + star * bound["slack"]
            rows.append(
                {
                    "size": name,
                    "parameters": _n_parameters(base),
                    "method": method,
                    "lambda_star": star,
                    "lambda": outcome.multipliers["harmless"],
                    "slack": bound["slack"],
                    "slack_ci95_low": bound["ci95"][0] - bound["threshold"],
                    "slack_ci95_high": bound["ci95"][1] - bound["threshold"],
                    "value": value,
                    "value_ci95_low": value - half,
                    "value_ci95_high": value + half,
                    "gap": optimum - lagrangian,
                    "closed_fraction": (lagrangian - reference) / (optimum - reference),
                    "kl": kl["realised"],
                    "run": outcome.run.name,
                }
            )
    return pa.Table.from_pylist(rows), bases


def _n_parameters(base: Run) -> int:
    from safetensors import safe_open

    path = Path(base.model(base.config.reference, "reference")) / "model.safetensors"
    with safe_open(path, framework="np") as weights:
        return sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118


def _token_counts(run: Run, folder: Any) -> tuple[int, int]:
    """Completion tokens of a samples table, and prompt and completion tokens of its train split."""
    drawn = read = 0
    for split in ("train", "test"):
        table = run.samples_table(folder).read(split, columns=["prompt_token_ids", "completion_token_ids"])
        lengths = [sum(map(len, table[name].to_pylist())) for name in table.column_names]
        drawn += lengths[1]
        read += sum(lengths) if split == "train" else 0
    return drawn, read


def _problem(base: Run, split: str) -> DualProblem:
    return build_problem(
        reference_scores(base, split), constraints=base.config.demanded_constraints(), beta=base.config.beta
    )


def _methods(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


EXPERIMENTS: dict[str, Experiment] = {
    "constraint_satisfaction": Experiment("realised against demanded margins", constraint_satisfaction),
    "trade_off": Experiment("helpfulness against harmlessness, all methods", trade_off),
    "two_constraints": Experiment("harmlessness and humour, a grid of margins", two_constraints),
    "preference_calibration": Experiment("calibration of the implicit rewards", preference_calibration),
    "cost": Experiment("wall time and tokens of each method", cost),
}
