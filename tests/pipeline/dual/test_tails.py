"""The t of a cvar: of all rows, of one tail or the other, and of some prompts alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.statistics import Statistic, tail_mean
from pipeline.dual.posing import PosedProblem, pose
from pipeline.dual.tails import FoundTails, find_tails
from pipeline.scoring.joined import JoinedScores
from stage1_dual.dual import DualSolution, InfeasibleError, solve_dual

N_PROMPTS, N_RESPONSES = 90, 32
BENIGN = (("category", ("benign",)),)


@pytest.fixture(scope="module")
def rows() -> JoinedScores:
    rng = np.random.default_rng(11)
    n = N_PROMPTS * N_RESPONSES
    g_n = rng.normal(size=n)
    return JoinedScores(
        prompt_ids=tuple(f"p{place:03d}" for place in range(N_PROMPTS)),
        prompt_n=np.repeat(np.arange(N_PROMPTS), N_RESPONSES),
        sample_index_n=np.tile(np.arange(N_RESPONSES), N_PROMPTS),
        reward_n=rng.normal(size=n) - 0.5 * g_n,
        score_names=("g",),
        scores_ns=g_n[:, None],
        cut_off_n=np.zeros(n, dtype=bool),
        prompt_columns={"category": np.where(np.arange(N_PROMPTS) % 3 == 0, "benign", "other").astype(object)},
    )


def solved(rows: JoinedScores, constraint: Constraint) -> tuple[FoundTails, PosedProblem, DualSolution]:
    posed = pose(rows, constraints=[constraint], beta=1.0)
    found = find_tails(posed, [Safeguard()])
    assert found is not None
    chosen = pose(rows, constraints=[constraint], beta=1.0, chosen=posed.chosen.__class__(found.at))
    return found, chosen, solve_dual(chosen.problem)


def cvar(constraint: Constraint, direction: str, *, where: tuple = (), **bound: float) -> Constraint:
    tail = "lower" if direction == ">=" else "upper"
    statistic = Statistic("g", "cvar", level=0.1, tail=tail, where=where)
    return Constraint(constraint, direction, statistic=statistic, **bound)


@pytest.mark.parametrize(
    ("direction", "bound", "where"),
    [
        (">=", {"threshold": -1.4}, ()),
        (">=", {"margin": 0.3}, ()),
        ("<=", {"threshold": 1.0}, ()),
        (">=", {"threshold": -1.3}, BENIGN),
        ("<=", {"margin": -0.6}, BENIGN),
    ],
)
def test_the_policy_has_the_tail_that_was_asked_for(
    rows: JoinedScores, direction: str, bound: dict[str, float], where: tuple
) -> None:
    constraint = cvar("tail", direction, where=where, **bound)
    found, posed, solution = solved(rows, constraint)
    weight_n = posed.problem.tilted_weights(solution.multipliers) / N_PROMPTS
    counts_n = np.ones(len(weight_n), dtype=bool)
    if where:
        counts_n = rows.prompt_columns["category"][rows.prompt_n] == "benign"

    def tail_of(weight_n: np.ndarray) -> float:
        statistic = constraint.statistic
        assert statistic.level is not None
        own = tail_mean(rows.scores_ns[counts_n, 0], weight_n[counts_n], level=statistic.level, tail=statistic.tail)
        return own[0]

    asked = constraint.absolute_threshold(tail_of(np.full(len(weight_n), 1.0 / len(weight_n))))
    # Never worse than promised; and of no better t than the search leaves, off by what that is worth.
    assert constraint.sign * (tail_of(weight_n) - asked) >= -1e-9
    assert tail_of(weight_n) == pytest.approx(asked, abs=5e-3)
    assert solution.multipliers[0] > 0
    assert 0 <= found.largest_gain <= 1e-3 * max(1.0, posed.problem.reward_scale)
    assert found.responses["tail"] > 10


def test_no_other_t_gives_more(rows: JoinedScores) -> None:
    constraint = cvar("tail", ">=", threshold=-1.4)
    found, _, solution = solved(rows, constraint)
    for shift in (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4):
        at = {"tail": found.at["tail"] + shift}
        posed = pose(rows, constraints=[constraint], beta=1.0)
        try:
            other = solve_dual(posed.with_columns(type(posed.chosen)(at)).problem)
        except InfeasibleError:
            continue
        assert other.primal_value <= solution.primal_value + found.largest_gain + 1e-9


def test_a_tail_out_of_reach_is_said_in_its_own_units(rows: JoinedScores) -> None:
    with pytest.raises(InfeasibleError) as caught:
        solved(rows, cvar("tail", ">=", threshold=2.5))
    best_p = rows.scores_ns[:, 0].reshape(N_PROMPTS, N_RESPONSES).max(axis=1)
    best, _ = tail_mean(best_p, np.full(N_PROMPTS, 1 / N_PROMPTS), level=0.1, tail="lower")
    assert "tail >= 2.5; reference -1.7" in str(caught.value)
    assert f"best attainable alone {best:.4g}" in str(caught.value)


def test_of_a_cvar_whole_prompts_count(rows: JoinedScores) -> None:
    class Torn:
        prompt_n, reward_n, score_n = rows.prompt_n, rows.reward_n, rows.score_n

        def statistic_columns(self, statistic, *, at=None):
            columns = rows.statistic_columns(statistic, at=at)
            return type(columns)(columns.u_n, (rows.sample_index_n % 2).astype(float))

    posed = pose(Torn(), constraints=[cvar("tail", ">=", threshold=-1.4, where=BENIGN)], beta=1.0)
    with pytest.raises(InputError, match=r"cvar\(g, 0.1\)\[category=benign\]: which rows count differs"):
        find_tails(posed, [Safeguard()])
