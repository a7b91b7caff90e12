"""How good a policy is on held-out prompts, estimated from the reference's scored responses: no sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stage2_policy.data import TrainingResponses, less_means, segment_softmax


@dataclass(frozen=True)
class HeldOutEstimate:
    """Estimates over held-out prompts, each prompt counting the same.

    ``lagrangian`` to ``ess_fraction`` replace the expectation over the policy by the reference's K responses weighted
    by v_k = softmax_k(log pi_theta - log pi_ref) (self-normalised importance sampling; biased by O(1/K)).

    Attributes:
        loss: KL(v || w) to the tilted weights w, nats per prompt: what is left of the gap, whatever is trained. The
            checkpoint with the least is kept.
        tilt: E_theta[r + <lam*, g - b>], reward units.
        kl: KL(pi_theta || pi_ref), nats per prompt.
        lagrangian: ``tilt - beta * kl``, reward units.
        closed_fraction: (lagrangian - that of pi_ref) / (that of the tilted weights - that of pi_ref); 0 for the
            reference, 1 only where v is the tilted weight of every response.
        closed_fraction_error: its standard error over prompts, by the delta method for a ratio of means; None where it
            is unknown, as with one prompt.
        ratio: E_ref[pi_theta / pi_ref], plain mean; 1 for any policy up to sampling error, so a value that drifts away
            shows probability leaking from the responses, or onto them.
        ess_fraction: mean effective sample size of v over K; the estimates mean little once it is a few per cent.
    """

    loss: float
    tilt: float
    kl: float
    lagrangian: float
    closed_fraction: float
    closed_fraction_error: float | None
    ratio: float
    ess_fraction: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """The estimates under prefixed names, but for what is unknown."""
        return {f"{prefix}_{name}": value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any], prefix: str) -> HeldOutEstimate:
        """The estimates of :meth:`metrics`; a log of an older version has no standard error."""
        values: dict[str, Any] = {name: metrics.get(f"{prefix}_{name}") for name in cls.__dataclass_fields__}
        return cls(**values)


def estimate_held_out(
    responses: TrainingResponses, *, logp: np.ndarray, ref_logp: np.ndarray, beta: float
) -> HeldOutEstimate:
    """Estimate how close a policy is to the tilted optimum.

    Args:
        responses: held-out responses drawn from the reference.
        logp: log pi_theta(y|x), nats, shape (n,).
        ref_logp: log pi_ref(y|x) by the same arithmetic, nats, shape (n,).
        beta: KL strength, reward per nat.
    """
    prompt_p, n_prompts = responses.prompt_p, len(responses.prompt_ids)
    n_samples = responses.n_samples
    uniform = 1.0 / n_samples
    policy_weight = segment_softmax(logp - ref_logp, prompt_p)

    def tilt_and_kl(weight: np.ndarray) -> tuple[float, float]:
        present = weight > 0
        kl = float(np.sum(weight[present] * np.log(weight[present] * n_samples[present]))) / n_prompts
        return float(np.sum(weight * responses.tilt)) / n_prompts, kl

    def lagrangian_p(weight: np.ndarray) -> np.ndarray:
        nats = np.where(weight > 0, weight * np.log(np.where(weight > 0, weight * n_samples, 1.0)), 0.0)
        return np.bincount(prompt_p, weights=weight * responses.tilt - beta * nats)

    tilt, kl = tilt_and_kl(policy_weight)
    ref_tilt, _ = tilt_and_kl(uniform)
    best_tilt, best_kl = tilt_and_kl(responses.weight)
    lagrangian, optimum = tilt - beta * kl, best_tilt - beta * best_kl
    ess_p = 1.0 / np.bincount(prompt_p, weights=policy_weight**2)
    return HeldOutEstimate(
        loss=(optimum - lagrangian) / beta,
        tilt=tilt,
        kl=kl,
        lagrangian=lagrangian,
        closed_fraction=(lagrangian - ref_tilt) / (optimum - ref_tilt),
        closed_fraction_error=ratio_error(
            lagrangian_p(policy_weight) - lagrangian_p(uniform), lagrangian_p(responses.weight) - lagrangian_p(uniform)
        ),
        ratio=float(np.sum(np.exp(logp - ref_logp) * uniform)) / n_prompts,
        ess_fraction=float(np.mean(ess_p / np.bincount(prompt_p))),
    )


def rounding_cost(responses: TrainingResponses, *, ref_logp: np.ndarray, beta: float) -> float:
    """About how much of the closed fraction the error of the arithmetic takes from whatever is judged with it.

    Two computations of log pi_ref, by training and by the sampler, differ by an error, and so does log pi_theta from
    log pi_ref once any weight has moved. Noise of standard deviation sigma in the log-ratios of a prompt gains nothing
    and costs a KL of sigma^2 / 2, to second order; over what could be gained at all it is a share of the way.

    Args:
        responses: held-out responses drawn from the reference.
        ref_logp: log pi_ref(y|x) by the arithmetic of training, nats, shape (n,).
        beta: KL strength, reward per nat.
    """
    error = less_means(ref_logp - responses.sampler_logp, responses.prompt_p)
    available = estimate_held_out(responses, logp=ref_logp, ref_logp=ref_logp, beta=beta).loss
    return float(np.mean(error**2)) / 2 / available


def ratio_error(numerator_p: np.ndarray, denominator_p: np.ndarray) -> float | None:
    """Standard error of a ratio of means over prompts, one observation a prompt, shape (p,)."""
    n_prompts = len(numerator_p)
    if n_prompts < 2:
        return None
    mean = float(denominator_p.mean())
    left_p = numerator_p - float(numerator_p.mean()) / mean * denominator_p
    return float(left_p.std(ddof=1) / np.sqrt(n_prompts) / mean)
