"""Which responses each optimisation step reads, and how many steps there are. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np

from pipeline.contracts.errors import InputError

GroupedRow = tuple[int, int]
"""Number of a row, and of the group it is read in."""


def count_groups(n_responses: int, *, responses_per_group: int) -> int:
    """Groups that the responses of one prompt are dealt to: as many as come nearest to the size asked for."""
    return max(1, round(n_responses / responses_per_group))


def count_steps(n_tokens: float, n_groups: int, *, tokens_per_step: int) -> int:
    """Optimisation steps of an epoch, each of about as many tokens as asked for and of at least one group.

    Args:
        n_tokens: of all responses, with their prompts.
        n_groups: of all prompts.
        tokens_per_step: as asked for.
    """
    return min(max(1, round(n_tokens / tokens_per_step)), n_groups)


def count_all_steps(steps_of_epoch: int, *, epochs: float) -> int:
    """Optimisation steps of a whole training run that is not stopped early; a begun step is taken whole."""
    return math.ceil(epochs * steps_of_epoch)


class StepSampler:
    """Rows of each microbatch: every response once an epoch, in an order that depends on seed and epoch only.

    The responses of a prompt are dealt to groups at random, groups are dealt to the optimisation steps, and a step is
    cut into microbatches between groups, by length to save padding. The order of the steps is uniformly random, so
    that the sum over a step's groups, times the number of steps, is an unbiased estimate of the sum over all groups;
    how a step is cut changes nothing but speed and memory.

    Args:
        length_n: tokens of each row that is trained on, prompt and completion, shape (n,).
        prompt_n: place of each row's prompt, ascending without gaps, shape (n,).
        tokens_per_step: about how many tokens an optimisation step reads.
        tokens_per_microbatch: about how many tokens are in memory at once; a group is never cut, however long it is.
        responses_per_group: how many responses of one prompt are compared with each other: those of a prompt are
            dealt evenly to as many groups as come nearest to this size, so that none has a group of its own.
        seed: of the order.
        process: number of this process among those that train together.
        n_processes: how many they are. Each gets every so-manieth microbatch of a step, as many as all others.

    Raises:
        InputError: a step has fewer groups than there are processes.
    """

    def __init__(
        self,
        length_n: np.ndarray,
        prompt_n: np.ndarray,
        *,
        tokens_per_step: int,
        tokens_per_microbatch: int,
        responses_per_group: int,
        seed: int,
        process: int = 0,
        n_processes: int = 1,
    ) -> None:
        self._length = length_n
        self._first_of_prompt = np.flatnonzero(np.diff(prompt_n, prepend=-1))
        size_p = np.diff(self._first_of_prompt, append=len(length_n))
        groups_of_size = {
            size: count_groups(size, responses_per_group=responses_per_group) for size in np.unique(size_p).tolist()
        }
        self._first_of_group = np.concatenate(
            [
                first + np.append(0, np.cumsum(_even_sizes(size, groups_of_size[size]))[:-1])
                for first, size in zip(self._first_of_prompt.tolist(), size_p.tolist(), strict=True)
            ]
        )
        self._seed = seed
        self._epoch = 0
        tokens = int(self._length.sum())
        n_groups = len(self._first_of_group)
        self.n_steps = count_steps(tokens, n_groups, tokens_per_step=tokens_per_step)
        fewest_groups = n_groups // self.n_steps
        if fewest_groups < n_processes:
            raise InputError(
                f"a step has {fewest_groups} groups of responses for {n_processes} processes; each needs at least "
                f"one: raise `tokens_per_step`, which is {tokens_per_step}"
            )
        # A quarter more room: for padding, and for steps longer than the average one.
        rounds = math.ceil(1.25 * tokens / self.n_steps / tokens_per_microbatch / n_processes)
        self.microbatches_per_step = n_processes * min(rounds, fewest_groups // n_processes)
        self._process = process
        self._n_processes = n_processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Microbatches of this process in an epoch."""
        return self.n_steps * self.microbatches_per_step // self._n_processes

    def __iter__(self) -> Iterator[list[GroupedRow]]:
        """Rows of each microbatch of this process with the groups they are in, as many microbatches for each step."""
        rng = np.random.default_rng([self._seed, self._epoch])
        rows_of_prompt = np.split(np.arange(len(self._length)), self._first_of_prompt[1:])
        row_n = np.concatenate([rng.permutation(rows) for rows in rows_of_prompt])
        longest = np.maximum.reduceat(self._length[row_n], self._first_of_group)
        tokens = np.add.reduceat(self._length[row_n], self._first_of_group)
        ends = np.append(self._first_of_group[1:], len(row_n))
        steps = np.array_split(rng.permutation(len(self._first_of_group)), self.n_steps)
        for place in rng.permutation(self.n_steps):
            groups = steps[place][np.argsort(longest[steps[place]], kind="stable")]
            microbatches = self._cut(groups, tokens[groups])
            for part in islice(microbatches, self._process, None, self._n_processes):
                yield [
                    (row, number)
                    for number, group in enumerate(part)
                    for row in row_n[self._first_of_group[group] : ends[group]].tolist()
                ]

    def _cut(self, groups: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
        """The groups of a step, by length, as so many microbatches of about as many tokens."""
        total = np.cumsum(tokens)
        shares = np.arange(1, self.microbatches_per_step) / self.microbatches_per_step
        # At least one group each: an empty microbatch would have nothing to back-propagate.
        cuts = np.clip(
            np.searchsorted(total, shares * total[-1]),
            np.arange(1, self.microbatches_per_step),
            len(groups) - np.arange(self.microbatches_per_step - 1, 0, -1),
        )
        return np.split(groups, cuts)


def _even_sizes(n_rows: int, n_groups: int) -> np.ndarray:
    """Sizes of the groups that rows are dealt to, the larger ones first: those of :func:`numpy.array_split`."""
    return np.full(n_groups, n_rows // n_groups) + (np.arange(n_groups) < n_rows % n_groups)
