"""Predicted against realised: does the trained policy keep what the dual promised?

Everything is on the test prompts, clustered by prompt: the responses to one prompt are not independent of each other,
the prompts are. What is judged of a constraint is its own statistic, a share as a share and a tail as a tail, in the
user's own direction and units.

A margin is a statement about the policy *and* the reference on the same prompts, so its interval is that of the paired
difference, which the variation between prompts does not widen. An absolute threshold is compared with the statistic
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint, Direction
from pipeline.evaluation.intervals import margin_interval, mean_interval, statistic_interval
from pipeline.scoring.estimates import Estimate, column_values, estimate

if TYPE_CHECKING:  # they are handed in, and bring Arrow along
    from pipeline.contracts.solution import Solution
    from pipeline.scoring.joined import JoinedScores

Status = Literal["satisfied", "undecided", "violated"]
_WORST_LAST: tuple[Status, ...] = ("satisfied", "undecided", "violated")


@dataclass(frozen=True)
class TiltPrediction:
    """What the tilt at lambda* promises on the same prompts, from the reference policy's samples.

    Attributes:
        reward: mean reward under the tilted policy.
        constraints: the statistics that are bounded, shape (m,), each in its own units.
        kl: KL(tilted || reference), nats per prompt.
        optimum_p: beta * log E_ref exp((r + <lambda*, g - b>) / beta) of each prompt, shape (p,), reward units; its
            mean is D(lambda*).
    """

    reward: float
    constraints: FloatArray
    kl: float
    optimum_p: FloatArray


def predict_tilt(reference: JoinedScores, *, solution: Solution, thresholds_m: FloatArray) -> TiltPrediction:
    """Self-normalised importance estimate of the tilted policy from reference samples.

    Not by :func:`stage1_dual.dual.tilt`, whose prediction it equals but for rounding: what a policy is held to is
    worked out again from the formula, without the kernels that found lambda*, and ``optimum_p`` has a correction for
    finitely many responses that the dual does not make.

    Args:
        reference: the reference policy's samples.
        solution: lambda* and beta.
        thresholds_m: b on these prompts, in the user's own direction, shape (m,).
    """
    beta = solution.beta
    tilt_n = reference.reward_n + _weighted_slack(reference, solution, thresholds_m)
    weight_n = np.empty(reference.n_samples)
    kl_p, optimum_p = [], []
    for rows in _rows_by_prompt(reference):
        logit_k = tilt_n[rows] / beta
        shift = logit_k.max()
        log_z = shift + np.log(np.mean(np.exp(logit_k - shift)))
        weight_n[rows] = w_k = np.exp(logit_k - log_z) / len(logit_k)
        kl_p.append(w_k @ (logit_k - log_z))
        optimum_p.append(beta * _log_mean_exp(logit_k))
    return TiltPrediction(
        reward=float(_prompt_means(reference, reference.reward_n, weight_n).mean()),
        constraints=np.array([estimate(one.stated, reference, weight_n).value for one in solution.constraints]),
        kl=float(np.mean(kl_p)),
        optimum_p=np.array(optimum_p),
    )


def _weighted_slack(rows: JoinedScores, solution: Solution, thresholds_m: FloatArray) -> FloatArray:
    """<lambda*, g - b> of each row, reward units, shape (n,), g the columns that lambda* multiplies.

    Where a column has its threshold inside it, that of a ratio, nothing is left to subtract.
    """
    slack_n = np.zeros(rows.n_samples)
    for one, sign, threshold in zip(solution.constraints, solution.signs_m, thresholds_m, strict=True):
        column_n = one.column(rows.statistic_columns(one.stated, at=one.certified_at))
        slack_n += one.multiplier * sign * (column_n - (threshold if one.column_ratio is None else 0.0))
    return slack_n


def _rows_by_prompt(rows: JoinedScores) -> list[slice]:
    ends = [*rows.starts[1:], rows.n_samples]
    return [slice(int(start), int(end)) for start, end in zip(rows.starts, ends, strict=True)]


def _log_mean_exp(logit_k: FloatArray) -> float:
    """Log of the mean of exp over the population the values were drawn from, estimated from k draws, shape (k,).

    The log of the sample mean is too low by about Var / (2 k mean^2) (Jensen), and a closed fraction measured against
    it too high: at 64 responses and a KL of 0.9 nats by a tenth. With self-normalised weights w that bias is
    (sum w^2 - 1/k) / 2 to first order (delta method), at most half a nat however the weights collapse.
    """
    n = len(logit_k)
    shift = logit_k.max()
    weight_k = np.exp(logit_k - shift)
    total = weight_k.sum()
    if n == 1:
        return float(shift)
    bias = 0.5 * (np.sum((weight_k / total) ** 2) - 1 / n) * n / (n - 1)
    return float(shift + np.log(total / n) + bias)


def evaluate_policy(
    *,
    reference: JoinedScores,
    policy: JoinedScores,
    log_ratio_n: FloatArray,
    solution: Solution,
    constraints: Sequence[Constraint],
    n_replicates: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Compare the trained policy with the reference and with the promise of the dual, on the same test prompts.

    Args:
        reference: scores of the reference policy's samples on the test prompts.
        policy: scores of the trained policy's samples on the same prompts.
        log_ratio_n: log pi_theta(y|x) - log pi_ref(y|x) of the policy's samples, nats, shape (n,).
        solution: whose promise is compared.
        constraints: the m constraints as demanded; a margin is taken over the reference mean on these prompts.
        n_replicates: bootstrap replicates over prompts for the closed fraction.
        rng: source of the bootstrap.

    Returns:
        The content of ``evaluation.json`` (docs/artifacts.md), without provenance.

    Raises:
        InputError: the two policies do not have samples of the same prompts, the policy's samples are not those of the
            log-ratios, or the constraints are not those of the solution.
    """
    _require_same(reference, policy, log_ratio_n, solution, constraints)
    n_prompts, beta = len(reference.prompt_ids), solution.beta
    ref_r_p, pol_r_p = (_prompt_means(rows, rows.reward_n) for rows in (reference, policy))
    statistics = [constraint.statistic for constraint in constraints]
    ref_m, pol_m = ([estimate(one, rows) for one in statistics] for rows in (reference, policy))
    thresholds_m = np.array(
        [bound.absolute_threshold(found.value) for bound, found in zip(constraints, ref_m, strict=True)]
    )
    predicted = predict_tilt(reference, solution=solution, thresholds_m=thresholds_m)
    kl_p = np.array([ratio_k.mean() for ratio_k in np.split(log_ratio_n, policy.starts[1:])])
    entries = [
        _constraint_entry(constraint, float(threshold), float(promised), ref, pol, spread)
        for constraint, threshold, promised, ref, pol, spread in zip(
            constraints,
            thresholds_m,
            predicted.constraints,
            ref_m,
            pol_m,
            [float(np.std(value_n)) for value_n in column_values(statistics, reference)],
            strict=True,
        )
    ]
    ref_lagrangian_p, pol_lagrangian_p = (
        _prompt_means(rows, rows.reward_n + _weighted_slack(rows, solution, thresholds_m))
        for rows in (reference, policy)
    )
    pol_lagrangian_p = pol_lagrangian_p - beta * kl_p
    kl: dict[str, Any] = {
        "predicted": predicted.kl,
        "realised": float(kl_p.mean()),
        "realised_ci95": mean_interval(kl_p),
    }
    statuses: list[Status] = [entry["status"] for entry in entries]
    if solution.kl_budget is not None:
        statuses.append(judge(kl["realised_ci95"], solution.kl_budget, "<="))
        kl |= {"budget": solution.kl_budget, "status": statuses[-1]}
    return {
        "status": max(statuses, key=_WORST_LAST.index),
        "n_prompts": n_prompts,
        "n_samples": policy.n_samples,
        "reward": {
            "name": solution.reward.name,
            "reference": float(ref_r_p.mean()),
            "predicted": predicted.reward,
            "realised": float(pol_r_p.mean()),
            "ci95": mean_interval(pol_r_p),
            "improvement": float((pol_r_p - ref_r_p).mean()),
            "improvement_ci95": mean_interval(pol_r_p - ref_r_p),
        },
        "constraints": entries,
        "kl": kl,
        "lagrangian": _lagrangian_entry(ref_lagrangian_p, pol_lagrangian_p, predicted.optimum_p, n_replicates, rng),
    }


def judge(interval: Sequence[float], threshold: float, direction: Direction, *, tolerance: float = 0.0) -> Status:
    """Whether an interval lies among the values that a constraint allows, partly, or not at all.

    Args:
        interval: of the statistic, both ends, in its own units.
        threshold: absolute.
        direction: of the constraint.
        tolerance: of an equality: how far from the threshold is allowed.
    """
    low, high = sorted(interval)
    lowest = -np.inf if direction == "<=" else threshold - tolerance
    highest = np.inf if direction == ">=" else threshold + tolerance
    if lowest <= low and high <= highest:
        return "satisfied"
    return "violated" if high < lowest or low > highest else "undecided"


def _require_same(
    reference: JoinedScores,
    policy: JoinedScores,
    log_ratio_n: FloatArray,
    solution: Solution,
    constraints: Sequence[Constraint],
) -> None:
    if reference.prompt_ids != policy.prompt_ids:
        raise InputError(
            f"the {len(reference.prompt_ids)} test prompts of the reference are not the {len(policy.prompt_ids)} of "
            "the policy"
        )
    for whose, rows in (("reference", reference), ("policy", policy)):
        if len(np.unique(rows.prompt_n)) != len(rows.prompt_ids):
            raise InputError(f"a test prompt has no samples of the {whose}")
    if len(log_ratio_n) != policy.n_samples:
        raise InputError(f"{len(log_ratio_n)} log-ratios are given for {policy.n_samples} samples of the policy")
    names = tuple(constraint.name for constraint in constraints)
    if names != solution.names:
        raise InputError(
            f"the constraints {', '.join(names)} are judged; those of the solution are {', '.join(solution.names)}"
        )


def _prompt_means(rows: JoinedScores, value_n: FloatArray, weight_n: FloatArray | None = None) -> FloatArray:
    """Mean of each prompt under weights that sum to 1 within it, equal ones where there are none; shape (p,)."""
    if weight_n is None:
        weight_n = 1.0 / np.bincount(rows.prompt_n)[rows.prompt_n]
    return np.asarray(np.bincount(rows.prompt_n, value_n * weight_n), dtype=np.float64)


_TOLERANCE = 0.1
"""Of an equality that gives none, in standard deviations of the statistic's column under the reference."""


def _constraint_entry(
    constraint: Constraint, threshold: float, predicted: float, ref: Estimate, pol: Estimate, spread: float
) -> dict[str, Any]:
    if len(ref.numerator_q) != len(pol.numerator_q):
        raise InputError(
            f"{constraint.statistic.text()} is of {len(ref.numerator_q)} test prompts under the reference and of "
            f"{len(pol.numerator_q)} under the policy; a comparison needs the same"
        )
    interval = statistic_interval(pol) if constraint.margin is None else margin_interval(pol, ref)
    tolerance = 0.0
    if constraint.is_equality:
        tolerance = _TOLERANCE * spread if constraint.tolerance is None else constraint.tolerance
    return {
        "name": constraint.name,
        "score": constraint.statistic.score,
        "statistic": constraint.statistic.to_document(),
        "direction": constraint.direction,
        "threshold": threshold,
        "margin": constraint.margin,
        "tolerance": tolerance if constraint.is_equality else None,
        "n_prompts": len(pol.numerator_q),
        "column_sd": spread,
        "reference": ref.value,
        "predicted": predicted,
        "realised": pol.value,
        "ci95": interval,
        "slack": constraint.sign * (pol.value - threshold),
        "status": judge(interval, threshold, constraint.direction, tolerance=tolerance),
        "improvement": pol.value - ref.value,
        "improvement_ci95": mean_interval(pol.observations_q - ref.observations_q),
    }


def _lagrangian_entry(
    ref_p: FloatArray, pol_p: FloatArray, optimum_p: FloatArray, n_replicates: int, rng: np.random.Generator
) -> dict[str, Any]:
    """The closed fraction: how much of the way from the reference to the tilted optimum the policy went.

    D(lambda) - L(pi, lambda) = beta E_x KL(pi || pi_lambda) for every policy, so the fraction is 1 exactly at the
    tilted optimum. It is a ratio of means over the same prompts; its interval is the bootstrap over prompts.
    """
    gained_p, attainable_p = pol_p - ref_p, optimum_p - ref_p
    attainable = float(attainable_p.mean())
    entry: dict[str, Any] = {
        "reference": float(ref_p.mean()),
        "realised": float(pol_p.mean()),
        "optimum": float(optimum_p.mean()),
        "closed_fraction": None,
        "closed_fraction_ci95": None,
    }
    # Where the tilt moves nothing there is nothing to close, and the ratio is noise over rounding error.
    if attainable > 1e-9 * max(1.0, abs(entry["optimum"])):
        draws = rng.integers(len(ref_p), size=(n_replicates, len(ref_p)))
        ratio = gained_p[draws].mean(axis=1) / attainable_p[draws].mean(axis=1)
        entry["closed_fraction"] = float(gained_p.mean() / attainable)
        entry["closed_fraction_ci95"] = [float(bound) for bound in np.quantile(ratio, [0.025, 0.975])]
    return entry
