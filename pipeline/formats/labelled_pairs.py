"""Pairs of responses with a drawn label, for every format that trains on preferences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.formats.export_format import ExportSettings, Row, sigmoid
from pipeline.formats.prompt_rows import PromptRows
from pipeline.formats.row_checks import check_close, check_probability

LABEL_FIELDS = [
    *(
        pa.field(name, pa.float64(), nullable=False)
        for name in ("label_probability", "chosen_score", "rejected_score")
    ),
    pa.field("prompt_id", pa.string(), nullable=False),
    *(pa.field(name, pa.int32(), nullable=False) for name in ("chosen_index", "rejected_index")),
]
"""What is known of a pair, in columns that trainers do not read."""

DPO_OPTIMUM = (
    "Of each pair, `chosen` was drawn with the Bradley-Terry probability of the scores in nats. DPO with the sigmoid "
    "loss and **beta 1.0** has the tilted policy as its optimum, whatever beta the dual was solved with: that one is "
    "in the scores already. Another beta gives the tilt divided by it."
)


@dataclass(frozen=True)
class LabelledPair:
    """Two responses to a prompt, and which one was drawn to be the better.

    Attributes:
        chosen: place of the one that was chosen.
        rejected: place of the other one.
        label: of the pair, by column of :data:`LABEL_FIELDS`.
    """

    chosen: int
    rejected: int
    label: dict[str, Any]


def label_pairs(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[LabelledPair]:
    """Pairs of responses with a drawn label: i is chosen over j with probability sigmoid(s_i - s_j).

    No pair comes twice, and responses come as evenly as their texts differ: a pair of equal texts says nothing and is
    not drawn. The minimiser of the logistic loss of beta_dpo (log rho_i - log rho_j) to labels of that probability is
    log rho = s / beta_dpo + constant: the tilted policy at beta_dpo = 1, whatever the dual's beta, since s is in nats.
    """
    texts = rows.completion
    pairs = (pair for pair in draw_pairs(len(texts), rng) if texts[pair[0]] != texts[pair[1]])
    for first, second in islice(pairs, settings.pairs_per_prompt):
        probability = sigmoid(rows.score[first] - rows.score[second])
        wins = rng.random() < probability
        chosen, rejected = (first, second) if wins else (second, first)
        label = {
            "label_probability": float(probability if wins else 1.0 - probability),
            "chosen_score": float(rows.score[chosen]),
            "rejected_score": float(rows.score[rejected]),
            "prompt_id": rows.prompt_id,
            "chosen_index": int(rows.sample_index[chosen]),
            "rejected_index": int(rows.sample_index[rejected]),
        }
        yield LabelledPair(chosen, rejected, label)


def draw_pairs(n_responses: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """All pairs of different responses, each once, in the order of a drawn tournament.

    In each round every response meets one other (one rests where their number is odd), so that any first pairs hold
    all responses equally often, to two.

    Args:
        n_responses: how many responses there are.
        rng: of the draw.
    """
    order = rng.permutation(n_responses)
    places = n_responses + n_responses % 2
    for turn in range(places - 1):
        meetings = [
            (places - 1, turn),
            *(((turn + step) % (places - 1), (turn - step) % (places - 1)) for step in range(1, places // 2)),
        ]
        for first, second in meetings:
            if max(first, second) < n_responses:
                yield int(order[first]), int(order[second])


def check_label(row: Row) -> Iterator[str]:
    """The probability of a label against the two scores that it was drawn by, and two different responses."""
    yield from check_probability(row, "label_probability")
    expected = float(sigmoid(row["chosen_score"] - row["rejected_score"]))
    yield from check_close(row, "label_probability", expected, of="chosen_score - rejected_score")
    if row["chosen_index"] == row["rejected_index"]:
        yield "compares a response with itself"
