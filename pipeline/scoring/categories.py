"""Statistics by category of prompt: a bound that holds on average may be missed where it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.run.run import Run
from pipeline.scoring.estimates import estimate
from pipeline.scoring.joined import JoinedScores


def prompt_categories(run: Run) -> dict[str, str]:
    """Category of each prompt of a run, by prompt id."""
    table = run.prompts_table()
    return dict(zip(table["prompt_id"].to_pylist(), table["category"].to_pylist(), strict=True))


def statistics_by_category(
    policies: Mapping[str, tuple[JoinedScores, FloatArray | None]],
    categories: Mapping[str, str],
    *,
    reward: str,
    constraints: Sequence[Constraint],
) -> list[dict[str, Any]]:
    """The mean reward and each constraint's statistic over the prompts of each category, under several policies.

    Args:
        policies: by name, rows and their weights, shape (n,), which sum to 1 within a prompt, or None for equal ones.
        categories: category of each prompt id.
        reward: name of the reward.
        constraints: the constraints; one that is about some prompts alone is None where a category has none of them.

    Returns:
        For each category, in alphabetical order: ``category``, ``n_prompts`` and ``scores``: the reward and each
        constraint by name, with its value under each policy. Empty where all prompts are of one category.
    """
    if len(set(categories.values())) < 2:
        return []
    category_of = {
        policy: np.array([categories[prompt_id] for prompt_id in rows.prompt_ids])[rows.prompt_n]
        for policy, (rows, _) in policies.items()
    }
    table = []
    for category in sorted(set(categories.values())):
        inside = {policy: found_n == category for policy, found_n in category_of.items()}
        n_prompts = max(len(np.unique(rows.prompt_n[inside[policy]])) for policy, (rows, _) in policies.items())
        if n_prompts == 0:
            continue
        scores: list[dict[str, Any]] = [{"name": name} for name in (reward, *(one.name for one in constraints))]
        for policy, (rows, weight_n) in policies.items():
            mask_n = inside[policy]
            scores[0][policy] = _mean_reward(rows, weight_n, mask_n)
            for entry, constraint in zip(scores[1:], constraints, strict=True):
                entry[policy] = _value(constraint, rows, weight_n, mask_n)
        table.append({"category": category, "n_prompts": n_prompts, "scores": scores})
    return table


def _mean_reward(rows: JoinedScores, weight_n: FloatArray | None, mask_n: np.ndarray) -> float | None:
    if not mask_n.any():
        return None
    share_n = 1.0 / np.bincount(rows.prompt_n)[rows.prompt_n] if weight_n is None else weight_n
    return float(np.sum((rows.reward_n * share_n)[mask_n]) / len(np.unique(rows.prompt_n[mask_n])))


def _value(
    constraint: Constraint, rows: JoinedScores, weight_n: FloatArray | None, mask_n: np.ndarray
) -> float | None:
    try:
        return estimate(constraint.statistic, rows, weight_n, mask_n=mask_n).value
    except InputError:  # none of its prompts is of this category
        return None
