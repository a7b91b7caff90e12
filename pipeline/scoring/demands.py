"""What a run demands, once its prompts are known: constraints by category, each with its safeguard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.contracts.problem import Constraint, Safeguard, expand_constraints, few_prompts
from pipeline.contracts.tables import PROMPT_COLUMNS
from pipeline.run.run import Run


@dataclass(frozen=True)
class Demands:
    """The m constraints of a run, one for each category where they say ``each``.

    Attributes:
        constraints: as demanded, in the order of the recipe.
        safeguards: what the dual is asked for beyond each.
        warnings: of categories with few prompts.
    """

    constraints: tuple[Constraint, ...]
    safeguards: tuple[Safeguard, ...]
    warnings: tuple[str, ...]


def read_demands(run: Run) -> Demands:
    """The demands of a run whose prompts are prepared.

    Raises:
        InputError: a constraint names a column that prompts have not, or a value that no train prompt has.
    """
    counts = prompt_values(run) if run.config.asks_of_prompts else {}
    constraints: list[Constraint] = []
    safeguards: list[Safeguard] = []
    for stated, safeguard in run.config.stated_constraints():
        found = expand_constraints([stated], counts)
        constraints.extend(found)
        safeguards.extend([safeguard] * len(found))
    return Demands(tuple(constraints), tuple(safeguards), tuple(few_prompts(constraints, counts)))


def prompt_values(run: Run) -> Mapping[str, Mapping[str, int]]:
    """How many train prompts have each value of each column that a constraint may name."""
    prompts = run.prompts_table()
    train = [split == "train" for split in prompts["split"].to_pylist()]
    return {
        column: Counter(value for value, is_train in zip(prompts[column].to_pylist(), train, strict=True) if is_train)
        for column in PROMPT_COLUMNS
    }
