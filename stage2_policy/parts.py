"""After training: which parts of a policy's change go how far, so that several constraints are met at once.

One factor along the ray from the reference (:mod:`stage2_policy.stretch`) moves all scores alike, and what is learnt
better goes further than it should where another score goes as far as it must. The parts of the change, of the
embeddings and of the lower, middle and upper layers, move the scores in unlike proportions: a factor for each of them
is as many directions. How far each constraint's gain is from that of the tilted weights, and how far a part moves it,
is measured on held-out responses. Both are estimates: the factors are those of a linear model with noise of the
measured covariance and a prior around 1, a Kalman update, so that what the held-out prompts cannot tell is left as it
was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stage2_policy.data import TrainingResponses, segment_softmax
from stage2_policy.expectations import corrected_means

OUTSIDE = "outside the layers"
LAYERS = ("in the lower layers", "in the middle layers", "in the upper layers")

SLOPE_STEP = 0.1
"""By how much a part is moved to see what it moves."""

SPREAD = 0.2
"""Standard deviation of a part's factor around 1, before the responses are seen."""

_LAYER = re.compile(r"\.(\d+)\.")


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The weights of each part of a network, by the number of the layer in their names.

    Args:
        names: of the weights that change, such as ``model.layers.3.mlp.up_proj.weight``.
    """
    layer = {name: None if (found := _LAYER.search(name)) is None else int(found[1]) for name in names}
    numbers = sorted({number for number in layer.values() if number is not None})
    named = LAYERS if len(numbers) >= len(LAYERS) else (LAYERS[0], LAYERS[-1])[: len(numbers)]
    place = {
        number: part
        for part, some in zip(named, np.array_split(numbers, max(1, len(named))), strict=False)
        for number in some.tolist()
    }
    parts: dict[str, list[str]] = {}
    for name, number in layer.items():
        parts.setdefault(OUTSIDE if number is None else place[number], []).append(name)
    return parts


@dataclass(frozen=True, eq=False)
class Gaps:
    """By how much the tilted weights gain more than a policy, on held-out prompts.

    Attributes:
        mean: of each column, over prompts, in the column's units, shape (m,).
        covariance: of the means, as prompts are drawn, shape (m, m).
    """

    mean: np.ndarray
    covariance: np.ndarray


def measure_gaps(responses: TrainingResponses, log_ratio: np.ndarray, column_n: np.ndarray) -> Gaps:
    """The gaps of a policy whose expectations are of the reference's responses, weighted within each prompt.

    Args:
        responses: held-out responses drawn from the reference.
        log_ratio: log pi_theta - log pi_ref of them, nats, shape (n,).
        column_n: of each response, shape (n, m).
    """
    prompt_n = responses.prompt_p
    tilted, policy = (
        corrected_means(weight, prompt_n, column_n)
        for weight in (responses.weight, segment_softmax(log_ratio, prompt_n))
    )
    gap_p = tilted - policy
    n_prompts, n_columns = gap_p.shape
    covariance = np.cov(gap_p, rowvar=False).reshape(n_columns, n_columns) / n_prompts
    return Gaps(gap_p.mean(axis=0), covariance)


def choose_part_factors(gaps: Gaps, slopes: np.ndarray) -> np.ndarray:
    """The factors whose policy is nearest to having no gaps, given how surely these are known; shape (parts,).

    The mean of 1 + d given gaps = slopes d + noise, d normal of standard deviation :data:`SPREAD`.

    Args:
        gaps: of the policy as it is.
        slopes: by how much a column's mean rises as a part's factor does, shape (m, parts).
    """
    prior = SPREAD**2 * slopes.T
    return np.asarray(1.0 + prior @ np.linalg.lstsq(slopes @ prior + gaps.covariance, gaps.mean, rcond=None)[0])
