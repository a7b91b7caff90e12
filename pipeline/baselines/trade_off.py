"""All methods in the plane of the two scores, and the implicit rewards of the preference-based one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.baselines import figures, policies
from pipeline.baselines.outcomes import read_outcome
from pipeline.baselines.results import Result, Rows, methods
from pipeline.baselines.study import Study
from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import InfeasibleError
from pipeline.run import Run
from pipeline.run_scores import reference_scores
from pipeline.solving import build_problem
from stage1_dual.dual import tilt


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
            if margin == study.middle_margin:
                run = study.iterate(implicit, policies.preference_based(margin))
                rows.append(_trade_off_row(implicit, run, policies.PREFERENCE_MULTI_SHOT, margin))
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
            # Of the methods whose policies the tilted ones of some lambda could be, within the curve's range.
            for method in methods(rows)
            if method not in (policies.REWARD_ONLY, policies.CONSTRAINT_ONLY)
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
