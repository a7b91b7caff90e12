"""After training: how far to go along the ray from the reference through the trained weights.

A log-ratio objective fits log rho to the scores s of stage 1 as a regression does: what the policy cannot foresee of s
is left out of log rho, which therefore varies less than s does. The fitted policy is, to first order, the best of its
kind in the Lagrangian, and yet its mean scores fall short of the dual's prediction, those of constraints included.
Along the ray its log-ratios are nearly linear, alpha log rho at theta_ref + alpha (theta - theta_ref), so that one
pass over held-out responses says which alpha makes the mean score what the dual predicts. The Lagrangian is flat
there: what it pays is of second order.
"""

from __future__ import annotations

import numpy as np
import torch
from peft import PeftModel
from scipy.optimize import brentq
from transformers import PreTrainedModel

from stage2_policy.data import TrainingResponses, segment_softmax

WIDEST = 1.5
"""The factor lies between 1 / WIDEST and WIDEST: a policy further off than that has not learnt its scores."""


def matching_factor(responses: TrainingResponses, log_ratio: np.ndarray) -> float:
    """The factor alpha at which the policy's mean score is that of the tilted weights.

    The policy's expectation is that of the reference's responses weighted by softmax(alpha log rho) within a prompt.

    Args:
        responses: held-out responses drawn from the reference.
        log_ratio: log pi_theta - log pi_ref of them, nats, shape (n,).

    Returns:
        alpha, within 1 / WIDEST and WIDEST; 1 where no score varies.
    """
    wanted = float(np.sum(responses.weight * responses.tilt))

    def excess(alpha: float) -> float:
        return float(np.sum(segment_softmax(alpha * log_ratio, responses.prompt_p) * responses.tilt)) - wanted

    low, high = excess(1 / WIDEST), excess(WIDEST)
    if low * high < 0:
        return float(brentq(excess, 1 / WIDEST, WIDEST, xtol=1e-4))
    if low == high:
        return 1.0
    return WIDEST if abs(high) < abs(low) else 1 / WIDEST


@torch.no_grad()
def stretch_weights(model: PreTrainedModel, reference: PreTrainedModel, alpha: float) -> None:
    """Move a policy to theta_ref + alpha (theta - theta_ref), in place.

    Args:
        model: the policy.
        reference: the reference policy.
        alpha: the factor.
    """
    origin = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        start = origin[name].to(weight)
        weight.copy_(start + alpha * (weight - start))


@torch.no_grad()
def stretch_adapter(model: PeftModel, alpha: float) -> None:
    """Scale the update of a policy with an adapter by ``alpha``, in place."""
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            weight.mul_(alpha)
