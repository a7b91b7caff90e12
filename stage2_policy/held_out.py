"""How good a policy is on held-out prompts, estimated from the reference's scored responses: no sampling."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from stage2_policy.data import TrainingResponses, segment_softmax


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
        ratio: E_ref[pi_theta / pi_ref], plain mean; 1 for any policy up to sampling error, so a value that drifts away
            shows probability leaking from the responses, or onto them.
        ess_fraction: mean effective sample size of v over K; the estimates mean little once it is a few per cent.
    """

    loss: float
    tilt: float
    kl: float
    lagrangian: float
    closed_fraction: float
    ratio: float
    ess_fraction: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """The estimates under prefixed names."""
        return {f"{prefix}_{name}": value for name, value in asdict(self).items()}


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
        ratio=float(np.sum(np.exp(logp - ref_logp) * uniform)) / n_prompts,
        ess_fraction=float(np.mean(ess_p / np.bincount(prompt_p))),
    )
