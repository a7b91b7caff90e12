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

from collections.abc import Iterable

import numpy as np
import torch
from peft import PeftModel
from scipy.optimize import brentq
from transformers import PreTrainedModel

from stage2_policy.data import TrainingResponses, less_means, segment_softmax
from stage2_policy.expectations import corrected_means

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

    The policy's expectation is that of the reference's responses weighted by softmax(alpha log rho) within a prompt,
    both means corrected for finitely many responses (:func:`stage2_policy.expectations.corrected_means`).

    Args:
        responses: held-out responses drawn from the reference.
        log_ratio: log pi_theta - log pi_ref of them, nats, shape (n,).
        value_n: of each response, shape (n,).

    Returns:
        alpha, within 1 / WIDEST and WIDEST; 1 where no value varies.
    """

    def mean(weight_n: np.ndarray) -> float:
        return float(corrected_means(weight_n, responses.prompt_p, value_n[:, None]).sum())

    wanted = mean(responses.weight)

    def excess(alpha: float) -> float:
        return mean(segment_softmax(alpha * log_ratio, responses.prompt_p)) - wanted

    low, high = excess(1 / WIDEST), excess(WIDEST)
    if low * high < 0:
        return float(brentq(excess, 1 / WIDEST, WIDEST, xtol=1e-4))
    rises = float(less_means(log_ratio, responses.prompt_p) @ value_n)
    if low == high or rises == 0:
        return 1.0
    return 1 / WIDEST if (low > 0) == (rises > 0) else WIDEST


class Change:
    """What training changed of the reference, whole or in part longer or shorter, in place.

    Args:
        model: the policy.
        reference: where it comes from; not needed with an adapter, which is the change.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, reference: PreTrainedModel | None) -> None:
        self._origin = None if reference is None else dict(reference.named_parameters())
        self._weights = {
            name: weight
            for name, weight in model.named_parameters()
            if reference is not None or "lora_B" in name or "lora_embedding_B" in name
        }

    @property
    def names(self) -> list[str]:
        """The weights that are moved; of an adapter B, in which the update is linear."""
        return list(self._weights)

    @torch.no_grad()
    def stretch(self, alpha: float, names: Iterable[str] | None = None) -> None:
        """Move weights to theta_ref + alpha (theta - theta_ref).

        Args:
            alpha: the factor.
            names: of the weights; all where not given.
        """
        for name in self.names if names is None else names:
            weight = self._weights[name]
            if self._origin is None:
                weight.mul_(alpha)
            else:
                start = self._origin[name].to(weight)
                weight.copy_(start + alpha * (weight - start))
