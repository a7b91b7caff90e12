"""Whether a score that claims to be a log-odds of preference is one, on pairs of which the preferred is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.contracts.errors import InputError

_WIDEST_SCALE = 1e3


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of similar predicted probability.

    Attributes:
        predicted: mean predicted probability that the first is preferred.
        observed: share of pairs in which it is.
        n_pairs: number of pairs, each counted in both orders.
    """

    predicted: float
    observed: float
    n_pairs: int


@dataclass(frozen=True)
class Calibration:
    """How well scores predict preferences by the Bradley-Terry model, P(a over b) = sigmoid(s_a - s_b).

    Attributes:
        n_pairs: number of pairs.
        accuracy: share of pairs whose preferred response has the higher score; a tie counts one half.
        accuracy_standard_error: of that share.
        auc: chance that the score of any preferred response is above that of any rejected one, across prompts.
        log_loss: mean of -log P(preferred over rejected), nats; log 2 = 0.693 for a coin.
        calibration_error: mean over the pairs of the distance between predicted and observed share of their bin.
        best_factor: the factor on the scores that minimises the log loss; 1 where they are calibrated, below 1 where
            they are too sure. At its bounds (0.001 and 1000) they predict nothing, or everything.
        reliability: predicted against observed, by tenths of the predicted probability; every pair in both orders, so
            that the curve is symmetric about one half.
    """

    n_pairs: int
    accuracy: float
    accuracy_standard_error: float
    auc: float
    log_loss: float
    calibration_error: float
    best_factor: float
    reliability: tuple[ReliabilityBin, ...]


def calibrate(chosen: np.ndarray, rejected: np.ndarray) -> Calibration:
    """Compare the scores of the preferred and of the rejected response of each pair, both shape (n,).

    Raises:
        InputError: no pairs, or a score that is not finite.
    """
    # Imported where they are used: they take longer to import than a small table to solve, and every command that
    # knows the kinds of scorers imports this module.
    from scipy.optimize import minimize_scalar
    from scipy.special import expit, log_expit

    if len(chosen) == 0 or not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise InputError("a calibration needs pairs of responses with finite scores")
    gap = chosen - rejected
    accuracy = float(np.mean((gap > 0) + 0.5 * (gap == 0)))
    # Mann and Whitney's U: how many rejected responses lie below each chosen one, a tie counting one half.
    below = sum(np.searchsorted(np.sort(rejected), chosen, side=side) for side in ("left", "right"))
    auc = float(np.mean(below) / (2 * len(gap)))
    predicted = expit(np.concatenate([gap, -gap]))
    preferred = np.concatenate([np.ones(len(gap)), np.zeros(len(gap))])
    tenth = np.minimum((predicted * 10).astype(int), 9)
    reliability = tuple(
        ReliabilityBin(float(predicted[in_bin].mean()), float(preferred[in_bin].mean()), int(in_bin.sum()))
        for in_bin in (tenth == number for number in range(10))
        if in_bin.any()
    )
    fit = minimize_scalar(
        lambda log_factor: -np.mean(log_expit(np.exp(log_factor) * gap)),
        bounds=(-np.log(_WIDEST_SCALE), np.log(_WIDEST_SCALE)),
        method="bounded",
    )
    return Calibration(
        n_pairs=len(gap),
        accuracy=accuracy,
        accuracy_standard_error=float(np.sqrt(accuracy * (1 - accuracy) / len(gap))),
        auc=auc,
        log_loss=float(-np.mean(log_expit(gap))),
        calibration_error=sum(part.n_pairs * abs(part.predicted - part.observed) for part in reliability)
        / (2 * len(gap)),
        best_factor=float(np.exp(fit.x)),
        reliability=reliability,
    )
