"""What a format is: its tables, the files beside them, and what training on it comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import PROMPTS
from pipeline.formats.prompt_rows import Message, PromptRows

Row = dict[str, Any]

SOLUTION, TEMPLATE, CARD = "dual.json", "chat_template.jinja", "README.md"
"""Files of every hand-off: lambda* and beta, the template a trainer is to be given where there is one, the card."""

MESSAGES = PROMPTS.field("prompt").type
MESSAGE = MESSAGES.value_type


@dataclass(frozen=True)
class ExportSettings:
    """What of the export is drawn, and how much.

    Attributes:
        seed: of pairs, labels and resampled lines. The draws of a prompt depend on this and its id alone.
        pairs_per_prompt: pairs of responses; a prompt that has fewer gives all it has.
        lines_per_prompt: resampled lines.
    """

    seed: int = 0
    pairs_per_prompt: int = 64
    lines_per_prompt: int = 64


@dataclass(frozen=True)
class Part:
    """One table of a hand-off.

    Attributes:
        build: rows of a prompt.
        schema: the columns and their types.
        check: what is wrong with the rows of a split, a sentence each; reads the rows alone.
        name: of the configuration that `datasets` knows the table by, and its folder; ``data`` for the only one.
        lines: whether it is JSON Lines; else Parquet.
    """

    build: Callable[[PromptRows, ExportSettings, np.random.Generator], Iterator[Row]]
    schema: pa.Schema
    check: Callable[[Iterator[Row]], Iterator[str]]
    name: str = "data"
    lines: bool = False

    def path(self, split: str) -> str:
        """The file of a split of JSON Lines, relative to the folder of the hand-off."""
        return f"{self.name}/{split}.jsonl"

    def count(self, split: str) -> str:
        """What the rows of a split are counted as in the manifest."""
        return split if self.name == "data" else f"{self.name} {split}"

    def pattern(self, split: str) -> str:
        """What the files of a split are called, relative to the folder of the hand-off."""
        return self.path(split) if self.lines else f"{self.name}/{split}-*.parquet"


@dataclass(frozen=True)
class HandOff:
    """What the files beside the tables of a hand-off are made from.

    Attributes:
        run: name of the run.
        solution: of its dual.
        tilted: folder of its hand-off table.
        splits: of each part the splits that have rows.
        end_of_text: the end token of the reference, as text; empty where it has none.
    """

    run: str
    solution: Solution
    tilted: Path
    splits: Mapping[str, Sequence[str]]
    end_of_text: str


def _nothing(source: HandOff) -> Mapping[str, bytes]:
    del source
    return {}


def _any_prompt(prompt: Sequence[Message]) -> str | None:
    del prompt
    return None


def _no_faults(folder: Path, solution: Solution) -> Iterator[str]:
    del folder, solution
    yield from ()


@dataclass(frozen=True)
class ExportFormat:
    """One format.

    Attributes:
        name: as the command line has it.
        parts: its tables.
        drawn_by: names of the settings that it reads.
        optimum: what a policy trained on it comes to, for the card; Markdown.
        beside: further files, by their names in the folder.
        refuses: why its trainer would not read a prompt, or would pass it over without a word; None where it reads it.
        check: what is wrong with the files beside the tables, in a folder with this solution; runs none of them.
        prefilled: what becomes of a text that the template puts before an answer, for the card.
        takes_template: how its trainer is given a chat template; None where it takes none, and renders by its own.
    """

    name: str
    parts: tuple[Part, ...]
    drawn_by: tuple[str, ...]
    optimum: str
    beside: Callable[[HandOff], Mapping[str, bytes]] = _nothing
    refuses: Callable[[Sequence[Message]], str | None] = _any_prompt
    check: Callable[[Path, Solution], Iterator[str]] = _no_faults
    prefilled: str = (
        "The answers of the rows begin with it too, so that a trainer that renders whole conversations has what was "
        "sampled. A service that renders by another template learns it as a part of the answer."
    )
    takes_template: str | None = '`tokenizer.chat_template = open("chat_template.jinja").read()`'

    @property
    def usage(self) -> str:
        """How its trainer is told to read it, for the card and the documentation; Markdown."""
        return (Path(__file__).parent / "usage" / f"{self.name}.md").read_text(encoding="utf-8")


def sigmoid(value: Any) -> Any:
    """1 / (1 + exp(-value)), of large values too."""
    return 0.5 * (1.0 + np.tanh(0.5 * value))
