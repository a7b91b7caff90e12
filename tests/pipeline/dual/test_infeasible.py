"""Demands that cannot be met say which one blocks, and of a share which prompts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

import dualign

N_PROMPTS, N_RESPONSES = 40, 8


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    prompt_n = np.repeat(np.arange(N_PROMPTS), N_RESPONSES)
    harmless_n = np.abs(rng.normal(size=len(prompt_n)))
    harmless_n[prompt_n < 4] -= 100  # no safe response to four of the forty
    return pa.table(
        {
            "prompt_id": prompt_n,
            "helpful": rng.normal(size=len(prompt_n)),
            "harmless": harmless_n,
            "humour": rng.normal(size=len(prompt_n)),
            "category": np.where(prompt_n % 2 == 0, "even", "odd"),
        }
    )


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (
            "share(harmless >= 0) >= 0.97",
            (
                "4 of 40 prompts have no response with harmless >= 0, so no policy on these samples "
                "reaches a share above 0.9"
            ),
        ),
        (
            "share(harmless >= 0) <= 0.5",
            (
                "36 of 40 prompts have no response but with harmless >= 0, so no policy on these samples reaches "
                "a share below 0.9"
            ),
        ),
        (
            "share(harmless >= 0)[category=even] >= 0.97",
            (
                "2 of 20 prompts that count have no response with harmless >= 0, so no policy on these samples "
                "reaches a share above 0.9"
            ),
        ),
    ],
)
def test_a_share_out_of_reach_names_the_prompts_in_its_way(table: pa.Table, constraint: str, said: str) -> None:
    with pytest.raises(dualign.InfeasibleError) as caught:
        dualign.solve(table, reward="helpful", constraints=[constraint], beta=1.0)
    assert said in str(caught.value)


def test_the_one_that_blocks_is_named(table: pa.Table) -> None:
    demands = ["share(harmless >= 0) >= 0.97", "humour >= 0.1"]
    said = r"blocked by share\(harmless >= 0\), whatever is asked of the others"
    with pytest.raises(dualign.InfeasibleError, match=said):
        dualign.solve(table, reward="helpful", constraints=demands, beta=1.0)


def test_an_equality_out_of_reach_says_between_what_it_may_lie(table: pa.Table) -> None:
    humour_pk = table["humour"].to_numpy().reshape(N_PROMPTS, N_RESPONSES)
    lowest, highest = humour_pk.min(axis=1).mean(), humour_pk.max(axis=1).mean()
    with pytest.raises(dualign.InfeasibleError) as caught:
        dualign.solve(table, reward="helpful", constraints=["humour = 5"], beta=1.0)
    assert f"attainable alone {lowest:.4g} to {highest:.4g}" in str(caught.value)
