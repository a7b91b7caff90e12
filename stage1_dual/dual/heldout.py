"""What the tilted policy does on prompts that were not used to find lam*.

Here are the means over such prompts and their intervals by Student's t. Intervals on the prompts that lam* was found
on, which know that it was, are in :mod:`stage1_dual.dual.inference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stage1_dual.dual.arguments import require_level, require_prompts, validate_multipliers, validate_relative
from stage1_dual.dual.dual_function import tilt
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray


@dataclass(frozen=True, eq=False)
class HeldoutPrediction:
    """The tilted policy on prompts that did not choose lam*. Intervals are (low, high), by Student's t over prompts.

    Attributes:
        level: nominal coverage.
        n_prompts: number of held-out prompts.
        reward: E[r], reward units; interval shape (2,).
        constraints: E[g], score units, shape (m,); interval shape (m, 2).
        kl: nats per prompt; interval shape (2,).
        slack: constraints minus the held-out problem's thresholds, score units, shape (m,); interval shape (m, 2).
        ess_median: median effective sample size, samples.
    """

    level: float
    n_prompts: int
    reward: float
    reward_interval: FloatArray
    constraints: FloatArray
    constraints_interval: FloatArray
    kl: float
    kl_interval: FloatArray
    slack: FloatArray
    slack_interval: FloatArray
    ess_median: float


def predict_heldout(
    heldout: DualProblem,
    lam: ArrayLike,
    *,
    level: float = 0.95,
    thresholds_are_relative_m: ArrayLike | None = None,
) -> HeldoutPrediction:
    """What the policy tilted by ``lam`` does on held-out prompts.

    Args:
        heldout: scores of prompts that were not used to find ``lam``, with the same beta and thresholds.
        lam: multipliers, reward per score unit, shape (m,), non-negative except of an equality.
        level: nominal coverage, between 0 and 1.
        thresholds_are_relative_m: as in :meth:`PromptSample.gather`: the slack of a margin is paired by prompt with
            the reference.

    Raises:
        InputError: fewer than two prompts, a level outside (0, 1), multipliers that are not m such numbers, or
            a mask of the wrong shape.
    """
    # Imported where it is used: it takes twice as long to import as all of this package, which solves without it.
    from scipy.special import stdtrit

    require_prompts(heldout.n_prompts)
    require_level(level)
    tilted = tilt(heldout, validate_multipliers("lam", lam, heldout.is_equality_m))
    relative_m = validate_relative(thresholds_are_relative_m, heldout.n_constraints)
    reference_error_mp = heldout.samples.reference_means_mp() - heldout.reference_means_m[:, np.newaxis]
    paired_slack_mp = tilted.slack_mp - np.where(relative_m[:, np.newaxis], reference_error_mp, 0.0)
    quantile = float(stdtrit(heldout.n_prompts - 1, 0.5 + level / 2))

    def interval(values_ip: FloatArray) -> FloatArray:
        half_i = quantile * _standard_error(values_ip.T)
        centre_i = np.mean(values_ip, axis=-1)
        return np.stack([centre_i - half_i, centre_i + half_i], axis=-1)

    return HeldoutPrediction(
        level=level,
        n_prompts=heldout.n_prompts,
        reward=float(np.mean(tilted.reward_p)),
        reward_interval=interval(tilted.reward_p),
        constraints=np.mean(tilted.scores_mp, axis=1),
        constraints_interval=interval(tilted.scores_mp),
        kl=float(np.mean(tilted.kl_p)),
        kl_interval=interval(tilted.kl_p),
        slack=np.mean(tilted.slack_mp, axis=1),
        slack_interval=interval(paired_slack_mp),
        ess_median=float(np.median(tilted.ess_p)),
    )


def _standard_error(values_p: FloatArray) -> FloatArray:
    """The standard error of the mean over prompts, the first axis; shape (p, ...) to (...)."""
    return np.asarray(np.std(values_p, axis=0, ddof=1) / np.sqrt(len(values_p)), dtype=np.float64)
