"""All methods in the plane of the two scores, and the implicit rewards of the preference-based one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.baselines import figures, policies
from pipeline.baselines.outcomes import read_outcome
from pipeline.baselines.results import Result, Rows, methods
from pipeline.baselines.study import Study
from pipeline.contracts.artifacts import read_manifest
from pipeline.run.run import Run
from pipeline.scoring.joined import reference_scores
from pipeline.steps.solve import reference_problem
from stage1_dual.dual import InfeasibleError, tilt


def trade_off(study: Study) -> Result:
    """Helpfulness against harmlessness: all methods and reference points, by the score models and by gold."""
    base = study.base(study.seeds[0])
    rows: Rows = []
    for margin in study.margins:
        arm = policies.one_shot(margin)
        rows.append(_trade_off_row(base, study.train(base, arm), policies.ONE_SHOT, margin))
        if margin in study.some_margins:
            rows.append(_trade_off_row(base, study.iterate(base, arm), policies.MULTI_SHOT, margin))
    for margin in study.some_margins:
        rows.append(
            _trade_off_row(base, study.train(base, policies.paper_dpo(study, margin)), policies.PAPER_DPO, margin)
        )
    points = (policies.reward_only(), policies.constraint_only(), policies.equal_weights(base))
    rows += [_trade_off_row(base, study.train(base, arm), arm.method, None) for arm in points]
    rows += [
        _trade_off_row(base, policies.soup(study, base, share), policies.SOUP, None) for share in (0.25, 0.5, 0.75)
    ]
    implicit = policies.preference_base(study, base)
    infeasible = []
    for margin in study.some_margins:
        try:
            run = study.train(implicit, policies.preference_based(study, margin))
        except InfeasibleError:
            infeasible.append(margin)
        else:
            rows.append(_trade_off_row(implicit, run, policies.PREFERENCE_BASED, margin))
            if margin == study.middle_margin:
                run = study.iterate(implicit, policies.preference_based(study, margin))
                rows.append(_trade_off_row(implicit, run, policies.PREFERENCE_MULTI_SHOT, margin))
    frontier = _predicted_frontiers(base)
    table = pa.Table.from_pylist(rows)
    lagrangian = {
        method: {row["demanded"]: row["lagrangian"] for row in rows if row["method"] == method}
        for method in (policies.ONE_SHOT, policies.PAPER_DPO)
    }
    above = [
        (lagrangian[policies.ONE_SHOT][margin] - theirs, margin)
        for margin, theirs in lagrangian[policies.PAPER_DPO].items()
    ]
    findings = [
        (
            f"at the lambda* of its demand the one-shot policy's Lagrangian less that of the DPO variant is "
            f"{np.mean([gain for gain, _ in above]):+.3f} reward units in the mean and {min(above)[0]:+.3f} at worst "
            f"(margin {min(above)[1]:g})"
        ),
        *_distances(rows, frontier[""], beta=base.config.given_beta),
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


def _predicted_frontiers(base: Run) -> dict[str, pa.Table]:
    """Improvements that the dual predicts over a range of lambda, on the test prompts, by the prefix of the scores.

    By gold: the same policies, tilted by the score models and judged by the ground truth. Column ``kl``: theirs, nats.
    """
    prefixes, sides = ("", "gold_"), ("helpful", "harmless")
    problem = reference_problem(base, "test")
    rows = reference_scores(base, "test", names=[prefix + side for prefix in prefixes for side in sides])
    judged_ns = np.column_stack([rows.reward_n, rows.scores_ns])

    def mean_s(weight_n: np.ndarray) -> np.ndarray:
        return np.asarray((judged_ns * weight_n[:, None]).sum(axis=0) / len(rows.prompt_ids))

    reference_s = mean_s(1 / np.bincount(rows.prompt_n)[rows.prompt_n])
    lams = [0.0, *np.geomspace(0.05, 6.0, 40)]
    gained = np.array([mean_s(problem.tilted_weights([lam])) - reference_s for lam in lams])
    kl = [float(tilt(problem, np.array([lam])).kl_p.mean()) for lam in lams]
    return {
        prefix: pa.table({side: gained[:, place * len(sides) + k] for k, side in enumerate(sides)} | {"kl": kl})
        for place, prefix in enumerate(prefixes)
    }


def _distances(rows: Rows, frontier: pa.Table, *, beta: float) -> list[str]:
    """A sentence a method: how far its policies are from the predicted ones in what those maximise, r - beta KL.

    In the reward alone a policy further from the reference could lie above them. Policies outside of the curve's range
    of harmlessness are left out: no lambda >= 0 asks for them.
    """
    harmless, helpful, kl = (frontier[name].to_numpy() for name in ("harmless", "helpful", "kl"))
    order = np.argsort(harmless)
    sentences = []
    for method in methods(rows):
        mine = [row for row in rows if row["method"] == method]
        within = [row for row in mine if harmless.min() <= row["harmless"] <= harmless.max()]
        best = np.interp([row["harmless"] for row in within], harmless[order], (helpful - beta * kl)[order])
        gap = best - [row["helpful"] - beta * row["kl"] for row in within]
        sentences.append(
            f"{method}: {np.mean(gap):.3f} reward units below the best r - beta KL at its harmlessness, mean of "
            f"{len(within)} of {len(mine)} policies; KL {np.mean([row['kl'] for row in mine]):.2f} nats"
            if within
            else f"{method}: outside of the range of harmlessness of the predicted policies"
        )
    return sentences


def _mean_score(run: Run, name: str) -> float:
    """Mean of a score over the reference's train responses."""
    return float(reference_scores(run, "train", names=[name]).reward_n.mean())


def preference_calibration(study: Study) -> Result:
    """Whether the implicit rewards of the preference-based method are the log-odds that they are taken for."""
    base = study.base(study.seeds[0])
    implicit = policies.preference_base(study, base)
    rows: Rows = []
    findings = []
    for side, name in policies.IMPLICIT.items():
        found = read_manifest(implicit.folder / "scores" / name).details["last_call"]["scorer"]["calibration"]
        rows += [{"preference": side, **tenth} for tenth in found["reliability"]]
        divergence = -_mean_score(implicit, name) / implicit.config.given_beta
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
