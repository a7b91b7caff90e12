"""After training: how far to go along the ray from the reference through the trained weights.

A log-ratio objective fits log rho to the scores s of stage 1 as a regression does: what the policy cannot foresee of s
is left out of log rho, which therefore varies less than s does. The fitted policy is, to first order, the best of its
kind in the Lagrangian, and yet its mean scores fall short of the dual's prediction. A part of s that is hard to
foresee, such as a share, which is a step in its score, falls shortest, and the demand is on it. Along the ray the
log-ratios are nearly linear, alpha log rho at theta_ref + alpha (theta - theta_ref), so that one pass over held-out
responses says which alpha makes <lam*, g>, what the constraints add to s, in the mean what the dual predicts. The
Lagrangian is flat there: what it pays is of second order.
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


SMALLEST_PART = 0.25
"""Share of what the tilted weights gain in s that the constraints must have to be matched alone: the smaller it is the
further an error of theirs moves the policy, and what only holds a score where the reference has it gains nothing."""


def values_to_match(responses: TrainingResponses, column_n: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Whose mean the policy is moved to: what the constraints add to s, or all of s where they gain little.

    Args:
        responses: held-out responses drawn from the reference.
        column_n: the reward and each constraint's column of them, turned, shape (n, 1 + m).
        nats: of s a unit of each column, shape (1 + m,).

    Returns:
        The values in nats, up to a constant, shape (n,).
    """
    constraints: np.ndarray = column_n[:, 1:] @ nats[1:]
    whole: np.ndarray = column_n @ nats
    moved = responses.weight - 1.0 / responses.n_samples
    return constraints if moved @ constraints >= SMALLEST_PART * (moved @ whole) else whole


def matching_factor(responses: TrainingResponses, log_ratio: np.ndarray, value_n: np.ndarray) -> float:
    """The factor alpha at which the policy's mean value is that of the tilted weights.

    The policy's expectation is that of the reference's responses weighted by softmax(alpha log rho) within a prompt.

    Args:
        responses: held-out responses drawn from the reference.
        log_ratio: log pi_theta - log pi_ref of them, nats, shape (n,).
        value_n: of each response, shape (n,).

    Returns:
        alpha, within 1 / WIDEST and WIDEST; 1 where no value varies.
    """
    wanted = float(responses.weight @ value_n)

    def excess(alpha: float) -> float:
        return float(segment_softmax(alpha * log_ratio, responses.prompt_p) @ value_n) - wanted

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
