"""What can be checked of the rows of a hand-off with nothing but the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.contracts.artifacts import shown
from pipeline.contracts.tables import prompt_id

TOLERANCE = 1e-9
"""Of numbers that are computed again in float64; they are of the size of one."""


def each_row(check: Callable[[dict[str, Any]], Iterator[str]]) -> Callable[[Iterator[dict[str, Any]]], Iterator[str]]:
    """A check of all rows from one of a row: the first fault of a kind, with the number of rows that have it."""

    def check_all(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
        first: dict[str, tuple[int, str]] = {}
        count: dict[str, int] = {}
        for number, row in enumerate(rows):
            for fault in check(row):
                kind = fault.partition(":")[0]
                first.setdefault(kind, (number, fault))
                count[kind] = count.get(kind, 0) + 1
        for kind, (number, fault) in first.items():
            yield f"row {number} {fault}" + (f" (and {count[kind] - 1} more rows)" if count[kind] > 1 else "")

    return check_all


def check_prompt(row: Mapping[str, Any], prompt: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """That the messages of a prompt are those of its `prompt_id`."""
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    if not messages or prompt_id(messages) != row["prompt_id"]:
        yield f"is not of the prompt that it names: `prompt_id` is {shown(repr(row['prompt_id']))}"


def check_answer(*messages: Mapping[str, Any]) -> Iterator[str]:
    """That an answer is an assistant's."""
    for message in messages:
        if message["role"] != "assistant":
            yield f"has no answer of an assistant: the role is {shown(repr(message['role']))}"


def check_probability(row: Mapping[str, Any], name: str) -> Iterator[str]:
    """That a number is a probability."""
    if not 0.0 <= row[name] <= 1.0:  # NaN too
        yield f"has a `{name}` outside of 0 to 1: {row[name]}"


def check_close(row: Mapping[str, Any], name: str, expected: float, *, of: str) -> Iterator[str]:
    """That a number is the one that others of the row give."""
    if not abs(row[name] - expected) <= TOLERANCE * max(1.0, abs(expected)):
        yield f"has another `{name}` than {of} gives: {row[name]:.12g}, not {expected:.12g}"


def log_mean_exp(values: Sequence[float] | np.ndarray) -> float:
    """Log of the mean of the exponentials, also where they are too small for a float."""
    shifted = np.asarray(values, dtype=np.float64)
    largest = float(shifted.max())
    return float(largest + np.log(np.mean(np.exp(shifted - largest))))


def each_prompt(
    check: Callable[[dict[str, Any]], Iterator[str]], check_group: Callable[[list[dict[str, Any]]], Iterator[str]]
) -> Callable[[Iterator[dict[str, Any]]], Iterator[str]]:
    """As :func:`each_row`, with a second check of all rows of a prompt together, which follow each other."""

    def check_all(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
        groups: dict[str, list[str]] = {}
        seen: set[str] = set()

        def watched() -> Iterator[dict[str, Any]]:
            waiting: list[dict[str, Any]] = []
            for row in rows:
                if waiting and row["prompt_id"] != waiting[0]["prompt_id"]:
                    close(waiting)
                    waiting = []
                waiting.append(row)
                yield row
            if waiting:
                close(waiting)

        def close(waiting: list[dict[str, Any]]) -> None:
            prompt = waiting[0]["prompt_id"]
            faults = ["comes twice: its rows do not follow each other"] if prompt in seen else []
            seen.add(prompt)
            for fault in [*faults, *check_group(waiting)]:
                groups.setdefault(fault.partition(":")[0], []).append(f"prompt {prompt} {fault}")

        yield from each_row(check)(watched())
        for faults in groups.values():
            yield faults[0] + (f" (and {len(faults) - 1} more prompts)" if len(faults) > 1 else "")

    return check_all
