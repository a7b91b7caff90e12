"""Prompts and responses as token ids, read row by row from files or from memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.tables import TOKEN_IDS
from stage2_policy.mapped_files import TokenLists

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class TokenSequences(Sequence[Pair]):
    """The token ids of some rows: an item is the prompt and the completion of a row, read when it is asked for.

    Attributes:
        prompts: lists of which some are the rows' prompts.
        completions: lists of which some are their completions.
        prompt_n: which of the prompts each row has, shape (n,).
        completion_n: which of the completions, shape (n,).
        prompt_length_n: tokens of each row's prompt, shape (n,).
        completion_length_n: tokens of its completion, shape (n,).
    """

    prompts: TokenLists
    completions: TokenLists
    prompt_n: np.ndarray
    completion_n: np.ndarray
    prompt_length_n: np.ndarray
    completion_length_n: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]]) -> TokenSequences:
        """Sequences that are in memory."""
        prompts, completions = zip(*pairs, strict=True)
        place_n = np.arange(len(prompts))
        return cls(
            prompts=TokenLists.of(prompts),
            completions=TokenLists.of(completions),
            prompt_n=place_n,
            completion_n=place_n,
            prompt_length_n=np.array([len(prompt) for prompt in prompts]),
            completion_length_n=np.array([len(done) for done in completions]),
        )

    @classmethod
    def of_table(cls, table: pa.Table) -> TokenSequences:
        """The sequences of a samples table that is in memory, row by row."""
        asked, done = (table[name] for name in TOKEN_IDS)
        place_n = np.arange(table.num_rows)
        return cls(
            prompts=TokenLists.of_column(asked),
            completions=TokenLists.of_column(done),
            prompt_n=place_n,
            completion_n=place_n,
            prompt_length_n=pc.list_value_length(asked).to_numpy(),
            completion_length_n=pc.list_value_length(done).to_numpy(),
        )

    def __len__(self) -> int:
        return len(self.prompt_n)

    @overload
    def __getitem__(self, row: int) -> Pair: ...

    @overload
    def __getitem__(self, row: slice) -> list[Pair]: ...

    def __getitem__(self, row: int | slice) -> Pair | list[Pair]:
        """Prompt and completion token ids of a row, or of some."""
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        return self.prompts[int(self.prompt_n[row])], self.completions[int(self.completion_n[row])]

    def __iter__(self) -> Iterator[Pair]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and completion, shape (n,), int64."""
        return np.asarray(self.prompt_length_n.astype(np.int64) + self.completion_length_n)

    def select(self, rows: np.ndarray) -> TokenSequences:
        """Some of the rows, by their numbers."""
        return TokenSequences(
            prompts=self.prompts,
            completions=self.completions,
            prompt_n=self.prompt_n[rows],
            completion_n=self.completion_n[rows],
            prompt_length_n=self.prompt_length_n[rows],
            completion_length_n=self.completion_length_n[rows],
        )
