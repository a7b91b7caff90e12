"""Predicted against realised: does the trained policy keep what the dual promised?

Everything is on the test prompts, clustered by prompt: the responses to one prompt are not independent of each other,
the prompts are. Inside, scores are turned (:mod:`pipeline.contracts.problem`); what is returned is in the user's own
direction.

A margin is a statement about the policy *and* the reference on the same prompts, so its interval is that of the paired
difference, which the variation between prompts does not widen. An absolute threshold is compared with the plain mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint, Direction, constraint_signs, sign_of

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
        constraints: mean constraint scores, shape (m,), user's direction.
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
    signs_m, lam_star, beta = solution.signs_m, solution.multipliers_m, solution.beta
    b_m = thresholds_m * signs_m
    reward_p, kl_p, optimum_p, constraints_pm = [], [], [], []
    _, rewards, scores = reference.by_prompt()
    for r_k, g_km in zip(rewards, scores, strict=True):
        logit_k = (r_k + (g_km * signs_m - b_m) @ lam_star) / beta
        shift = logit_k.max()
        log_z = shift + np.log(np.mean(np.exp(logit_k - shift)))
        w_k = np.exp(logit_k - log_z) / len(r_k)
        reward_p.append(w_k @ r_k)
        constraints_pm.append(w_k @ g_km)
        kl_p.append(w_k @ (logit_k - log_z))
        optimum_p.append(beta * _log_mean_exp(logit_k))
    return TiltPrediction(
        reward=float(np.mean(reward_p)),
        constraints=np.mean(constraints_pm, axis=0),
        kl=float(np.mean(kl_p)),
        optimum_p=np.array(optimum_p),
    )


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
    ref_r_p, ref_g_pm = _prompt_means(reference)
    pol_r_p, pol_g_pm = _prompt_means(policy)
    thresholds = np.array(
        [bound.absolute_threshold(float(mean)) for bound, mean in zip(constraints, ref_g_pm.mean(axis=0), strict=True)]
    )
    predicted = predict_tilt(reference, solution=solution, thresholds_m=thresholds)
    kl_p = np.array([ratio_k.mean() for ratio_k in np.split(log_ratio_n, policy.starts[1:])])

    entries = [
        _constraint_entry(constraint, thresholds[j], predicted.constraints[j], ref_g_pm[:, j], pol_g_pm[:, j])
        for j, constraint in enumerate(constraints)
    ]
    slack_weight_m = constraint_signs(constraints) * solution.multipliers_m  # <lambda, g - b> in the user's units
    ref_lagrangian_p = ref_r_p + (ref_g_pm - thresholds) @ slack_weight_m
    pol_lagrangian_p = pol_r_p + (pol_g_pm - thresholds) @ slack_weight_m - beta * kl_p
    return {
        "status": max((entry["status"] for entry in entries), key=_WORST_LAST.index),
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
        "kl": {"predicted": predicted.kl, "realised": float(kl_p.mean()), "realised_ci95": mean_interval(kl_p)},
        "lagrangian": _lagrangian_entry(ref_lagrangian_p, pol_lagrangian_p, predicted.optimum_p, n_replicates, rng),
    }


def mean_interval(value_p: FloatArray) -> list[float]:
    """95% interval of the mean over prompts (Student's t, one observation a prompt, shape (p,))."""
    # Imported where it is used: SciPy takes longer to import than everything else here, and reading is more common.
    from scipy.special import stdtrit

    mean = float(value_p.mean())
    if len(value_p) < 2:
        # One cluster carries no information on the spread between clusters.
        raise InputError("an interval needs at least 2 test prompts, 1 given")
    half = float(stdtrit(len(value_p) - 1, 0.975) * value_p.std(ddof=1) / np.sqrt(len(value_p)))
    return [mean - half, mean + half]


def judge(interval: Sequence[float], threshold: float, direction: Direction) -> Status:
    """Whether an interval lies on the right side of a threshold, contains it, or lies on the wrong side."""
    sign = sign_of(direction)
    low, high = sorted(sign * bound for bound in interval)
    if low >= sign * threshold:
        return "satisfied"
    return "violated" if high < sign * threshold else "undecided"


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


def _prompt_means(rows: JoinedScores) -> tuple[FloatArray, FloatArray]:
    """Mean reward of each prompt, shape (p,), and its mean constraint scores, shape (p, m)."""
    _, rewards, scores = rows.by_prompt()
    return np.array([r_k.mean() for r_k in rewards]), np.array([g_km.mean(axis=0) for g_km in scores])


def _constraint_entry(
    constraint: Constraint, threshold: float, predicted: float, ref_g_p: FloatArray, pol_g_p: FloatArray
) -> dict[str, Any]:
    realised = float(pol_g_p.mean())
    difference_p = pol_g_p - ref_g_p
    if constraint.margin is not None:
        reference = float(ref_g_p.mean())
        interval = [reference + bound for bound in mean_interval(difference_p)]
    else:
        interval = mean_interval(pol_g_p)
    return {
        "name": constraint.name,
        "direction": constraint.direction,
        "threshold": float(threshold),
        "margin": constraint.margin,
        "reference": float(ref_g_p.mean()),
        "predicted": float(predicted),
        "realised": realised,
        "ci95": interval,
        "slack": constraint.sign * (realised - float(threshold)),
        "status": judge(interval, float(threshold), constraint.direction),
        "improvement": float(difference_p.mean()),
        "improvement_ci95": mean_interval(difference_p),
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
