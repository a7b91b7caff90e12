"""The responses to one prompt, as every format reads them off the hand-off table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.contracts.shards import read_parquet
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import SAMPLE_KEY

Message = Mapping[str, str]


@dataclass(frozen=True)
class PromptRows:
    """The responses to one prompt.

    Attributes:
        prompt_id: of the prompt.
        prompt: its messages.
        sample_index: of each response, shape (k,).
        completion: text of each response, as it was sampled.
        weight: tilted weight, sums to 1, shape (k,).
        score: s, nats, shape (k,).
        prefill: what the chat template puts before an answer, for trainers that render whole conversations.
    """

    prompt_id: str
    prompt: Sequence[Message]
    sample_index: np.ndarray
    completion: Sequence[str]
    weight: np.ndarray
    score: np.ndarray
    prefill: str = ""

    def answer(self, place: int) -> dict[str, str]:
        """A response as the last message of a conversation that is rendered as a whole."""
        return {"role": "assistant", "content": self.prefill + self.completion[place]}

    def bare_answer(self, place: int) -> dict[str, str]:
        """A response for a trainer that renders the prompt apart, up to where the response was sampled after."""
        return {"role": "assistant", "content": self.completion[place]}


def read_tilted(tilted: Path, solution: Solution, *, split: str) -> pa.Table | None:
    """The rows of a split of the hand-off table by key; None where there are none.

    Args:
        tilted: folder of the hand-off table.
        solution: it was made with.
        split: ``train`` or ``test``.

    Raises:
        CorruptArtifactError: a file is damaged.
    """
    paths = sorted(tilted.glob(f"data/{split}-*.parquet"))
    if not paths:
        return None
    table = pa.concat_tables([read_parquet(path, schema=solution.tilted_schema) for path in paths])
    return table.sort_by([(name, "ascending") for name in SAMPLE_KEY]) if table.num_rows else None


def read_prompt_rows(tilted: Path, solution: Solution, *, split: str, prefill: str = "") -> Iterator[PromptRows]:
    """The prompts of a split of the hand-off table, in the order of their ids.

    Args:
        tilted: folder of the hand-off table.
        solution: it was made with.
        split: ``train`` or ``test``.
        prefill: what the chat template puts before an answer.

    Raises:
        CorruptArtifactError: a file is damaged.
    """
    table = read_tilted(tilted, solution, split=split)
    if table is None:
        return
    prompt_id = table["prompt_id"].to_numpy(zero_copy_only=False)
    score = solution.tilt(table) / solution.beta
    first = np.flatnonzero(np.append(True, prompt_id[1:] != prompt_id[:-1]))
    for start, end in zip(first, [*first[1:], len(prompt_id)], strict=True):
        rows = table.slice(start, end - start)
        yield PromptRows(
            prompt_id=str(prompt_id[start]),
            prompt=rows["prompt"][0].as_py(),
            sample_index=rows["sample_index"].to_numpy(),
            completion=rows["completion"].to_pylist(),
            weight=rows["weight"].to_numpy(),
            score=score[start:end],
            prefill=prefill,
        )
