"""Means by category of prompt: a bound that holds on average may be missed where it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.run.run import Run
from pipeline.scoring.joined import JoinedScores


def prompt_categories(run: Run) -> dict[str, str]:
    """Category of each prompt of a run, by prompt id."""
    table = run.prompts_table()
    return dict(zip(table["prompt_id"].to_pylist(), table["category"].to_pylist(), strict=True))


def means_by_category(
    policies: Mapping[str, tuple[JoinedScores, np.ndarray | None]],
    categories: Mapping[str, str],
    *,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Mean of each score over the prompts of each category, under several policies.

    Args:
        policies: by name, rows and their weights, shape (n,), which sum to 1 within a prompt, or None for equal ones.
        categories: category of each prompt id.
        names: the reward, then the scores of the constraints.

    Returns:
        For each category, in alphabetical order: ``category``, ``n_prompts`` and ``scores``, for each score its name
        and its mean under each policy. Empty where all prompts are of one category.
    """
    if len(set(categories.values())) < 2:
        return []
    per_prompt = {policy: _prompt_means(rows, weight_n) for policy, (rows, weight_n) in policies.items()}
    table = []
    for category in sorted(set(categories.values())):
        mask = {
            policy: np.array([categories[prompt_id] == category for prompt_id in rows.prompt_ids], dtype=bool)
            for policy, (rows, _) in policies.items()
        }
        n_prompts = max(int(places.sum()) for places in mask.values())
        if n_prompts == 0:
            continue
        scores = [
            {
                "name": name,
                **{
                    policy: float(means[mask[policy], column].mean()) if mask[policy].any() else None
                    for policy, means in per_prompt.items()
                },
            }
            for column, name in enumerate(names)
        ]
        table.append({"category": category, "n_prompts": n_prompts, "scores": scores})
    return table


def _prompt_means(rows: JoinedScores, weight_n: np.ndarray | None) -> np.ndarray:
    """Mean of each score for each prompt, shape (p, 1 + m)."""
    if weight_n is None:
        weight_n = 1.0 / np.bincount(rows.prompt_n)[rows.prompt_n]
    values_nc = np.column_stack([rows.reward_n, rows.scores_ns])
    return np.column_stack([np.bincount(rows.prompt_n, column * weight_n) for column in values_nc.T])
