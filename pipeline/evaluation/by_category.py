"""Is a demand met in each category of prompts? A bound that holds on average may be missed where it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.evaluation.intervals import margin_interval, mean_interval, statistic_interval
from pipeline.evaluation.judging import judge
from pipeline.scoring.statistic_estimates import estimate

if TYPE_CHECKING:  # they are handed in, and bring Arrow along
    from pipeline.scoring.joined import JoinedScores


def judge_categories(
    table: Sequence[Mapping[str, Any]],
    *,
    reference: JoinedScores,
    policy: JoinedScores,
    categories: Mapping[str, str],
    constraints: Sequence[Constraint],
    tolerances: Sequence[float | None],
) -> list[dict[str, Any]]:
    """The statistics of each category with their intervals and the verdict there.

    A margin is taken over the reference's own statistic in the category.

    Args:
        table: means by category, as ``statistics_by_category`` has them of ``reference`` and ``realised``.
        reference: the reference policy's rows.
        policy: the trained policy's rows, of the same prompts.
        categories: category of each prompt id.
        constraints: the m constraints as demanded.
        tolerances: of the equalities among them, None of the others; length m.

    Returns:
        The table; each score has also ``improvement`` with ``improvement_ci95``, and each constraint ``ci95`` and
        ``status``. These are None where fewer than two prompts count.
    """
    rows = (reference, policy)
    of_prompt = [np.array([categories[one] for one in found.prompt_ids])[found.prompt_n] for found in rows]
    judged = []
    for entry in table:
        ref_n, pol_n = (of_n == entry["category"] for of_n in of_prompt)
        reward, *bounds = entry["scores"]
        judged.append(
            {
                **entry,
                "scores": [
                    {**reward, **_reward(reference, policy, ref_n, pol_n)},
                    *(
                        {**bound, **_bound(one, tolerance or 0.0, reference, policy, ref_n, pol_n)}
                        for bound, one, tolerance in zip(bounds, constraints, tolerances, strict=True)
                    ),
                ],
            }
        )
    return judged


def _reward(reference: JoinedScores, policy: JoinedScores, ref_n: np.ndarray, pol_n: np.ndarray) -> dict[str, Any]:
    before_q, after_q = _means(reference, ref_n), _means(policy, pol_n)
    if len(before_q) != len(after_q) or len(after_q) < 2:
        return {"improvement": None, "improvement_ci95": None}
    gained_q = after_q - before_q
    return {"improvement": float(gained_q.mean()), "improvement_ci95": mean_interval(gained_q)}


def _means(rows: JoinedScores, mask_n: np.ndarray) -> FloatArray:
    """Mean reward of each prompt of a category, shape (q,)."""
    counts_p = np.bincount(rows.prompt_n[mask_n], minlength=len(rows.prompt_ids))
    sums_p = np.bincount(rows.prompt_n[mask_n], rows.reward_n[mask_n], minlength=len(rows.prompt_ids))
    return np.asarray(sums_p[counts_p > 0] / counts_p[counts_p > 0], dtype=np.float64)


def _bound(
    constraint: Constraint,
    tolerance: float,
    reference: JoinedScores,
    policy: JoinedScores,
    ref_n: np.ndarray,
    pol_n: np.ndarray,
) -> dict[str, Any]:
    unknown = {"improvement": None, "improvement_ci95": None, "ci95": None, "status": None}
    try:
        ref = estimate(constraint.statistic, reference, mask_n=ref_n)
        pol = estimate(constraint.statistic, policy, mask_n=pol_n)
    except InputError:  # none of its prompts is of this category
        return unknown
    if len(ref.numerator_q) != len(pol.numerator_q) or len(pol.numerator_q) < 2:
        return unknown
    interval = statistic_interval(pol) if constraint.margin is None else margin_interval(pol, ref)
    threshold = constraint.absolute_threshold(ref.value)
    return {
        "improvement": pol.value - ref.value,
        "improvement_ci95": mean_interval(pol.observations_q - ref.observations_q),
        "ci95": interval,
        "status": judge(interval, threshold, constraint.direction, tolerance=tolerance),
    }
