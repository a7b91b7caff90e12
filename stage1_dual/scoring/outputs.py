"""From what a scorer computes to the user's own direction and units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Activation = Literal["logit", "probability"]


@dataclass(frozen=True)
class Affine:
    """The value ``sign * raw + offset``, where raw is what the scorer computes.

    Attributes:
        sign: 1, or -1 to turn the direction round, as from a cost to a score.
        offset: score units, added after the sign.
    """

    sign: Literal[1, -1] = 1
    offset: float = 0.0

    def apply(self, raw: float) -> float:
        """What the raw score of a scorer is in the user's own direction and units."""
        return self.sign * raw + self.offset


@dataclass(frozen=True)
class HeadOutput:
    """One value read off the heads of a classifier.

    Attributes:
        head: index of the head, or its name among the model's labels.
        output: ``logit`` for the raw number, ``probability`` for the model's own probability of the label.
        affine: from that to the user's units.
    """

    head: int | str = 0
    output: Activation = "logit"
    affine: Affine = Affine()


def activate(logits: np.ndarray, activation: Activation, *, independent: bool) -> np.ndarray:
    """The outputs of all heads, float64, shape (n, heads), from their logits of the same shape.

    Args:
        logits: raw outputs.
        activation: which form of them.
        independent: whether each label is a question of its own (sigmoid), as opposed to one among all (softmax).
    """
    if activation == "logit":
        return logits
    if independent:
        return 0.5 * (1 + np.tanh(logits / 2))  # the sigmoid, without overflow
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def describe_outputs(outputs: Sequence[Any]) -> list[dict[str, object]]:
    """Outputs as plain values, for a scorer's description."""
    return [asdict(output) for output in outputs]
