"""What a run demands, once its prompts are known: constraints by category, each with its safeguard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    Constraint,
    Safeguard,
    expand_constraints,
    few_prompts,
    require_consistent,
)
from pipeline.contracts.tables import PROMPT_COLUMNS, SPLITS
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
        InputError: as :func:`demands_on`.
    """
    # Most demands are on all prompts, and need no look at them.
    return demands_on(run.config, run.prompts_table() if run.config.asks_of_prompts else None)


def demands_on(config: RunConfig, prompts: pa.Table | None) -> Demands:
    """The demands of a recipe on a prompts table.

    Args:
        config: the recipe.
        prompts: the table; may be None where no constraint asks anything of a prompt.

    Raises:
        InputError: a constraint is of a value that no train prompt has, or no test prompt, so that it could not be
            judged.
    """
    if prompts is None or not config.asks_of_prompts:
        stated = config.stated_constraints()
        return Demands(tuple(one for one, _ in stated), tuple(safeguard for _, safeguard in stated), ())
    train, test = (_counts(prompts.filter(pc.equal(prompts["split"], split))) for split in SPLITS)
    constraints: list[Constraint] = []
    safeguards: list[Safeguard] = []
    for stated_one, safeguard in config.stated_constraints():
        found = expand_constraints([stated_one], train)
        constraints.extend(found)
        safeguards.extend([safeguard] * len(found))
    for constraint in constraints:
        for column, values in constraint.statistic.where:
            if not any(test[column][value] for value in values):
                raise InputError(
                    f"constraint `{constraint.name}` cannot be judged: no test prompt has the {column} "
                    f"{' or '.join(map(repr, values))}"
                )
    require_consistent(constraints)
    return Demands(tuple(constraints), tuple(safeguards), tuple(few_prompts(constraints, train)))


def _counts(prompts: pa.Table) -> Mapping[str, Counter[str]]:
    """How many prompts have each value of each column that a constraint may name."""
    return {column: Counter(prompts[column].to_pylist()) for column in PROMPT_COLUMNS}
