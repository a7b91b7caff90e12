"""The correction for finitely many responses, and which intervals belong to which solution."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

from stage1_dual.dual import (
    Demand,
    DualProblem,
    TightenedSolution,
    Uncertainty,
    bootstrap_intervals,
    climb_ladder,
    correct_response_bias,
    quantify_uncertainty,
    sandwich_standard_errors,
    solve_tightened,
)

N_REPLICATES = 50


def _solve(n_responses: int) -> TightenedSolution:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=n_responses, n_constraints=2, seed=3)
    thresholds = np.mean(g_pkm, axis=(0, 1)) + 0.2
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=thresholds, beta=1.0)
    nothing = Demand(np.zeros(2), np.full(2, np.nan), np.zeros(2), np.zeros(2), 0, 0, np.array([True, True]))
    return solve_tightened(problem, nothing)


def _quantify(tightened: TightenedSolution, *, corrects: bool) -> Uncertainty:
    return quantify_uncertainty(
        tightened,
        thresholds_are_relative_m=[True, True],
        corrects_response_bias=corrects,
        n_replicates=N_REPLICATES,
        rng=np.random.default_rng(0),
    )


def _intervals(tightened: TightenedSolution, *, bias: object, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    return bootstrap_intervals(
        tightened.problem,
        tightened.solution,
        thresholds_are_relative_m=[True, True],
        n_replicates=N_REPLICATES,
        rng=rng,
        bias=bias,
    )


@pytest.mark.parametrize("n_responses", [32, 6])
def test_without_a_correction_everything_is_about_the_solution_as_it_was(n_responses: int) -> None:
    tightened = _solve(n_responses)
    found = _quantify(tightened, corrects=False)
    expected = _intervals(tightened, bias=found.ladder.bias, rng=np.random.default_rng(0))
    errors = sandwich_standard_errors(tightened.problem, tightened.solution, thresholds_are_relative_m=[True, True])

    assert found.tightened is tightened
    assert (found.ladder.bias is None) == (n_responses == 6)
    np.testing.assert_array_equal(found.intervals.multipliers, expected.multipliers)
    np.testing.assert_array_equal(found.intervals.policy.constraints, expected.policy.constraints)
    np.testing.assert_array_equal(found.errors.multipliers, errors.multipliers)


def test_a_correction_moves_the_policy_and_leaves_the_interval_of_what_was_asked() -> None:
    tightened = _solve(32)
    rng = np.random.default_rng(0)
    before = _quantify(tightened, corrects=False)
    after = _quantify(tightened, corrects=True)
    corrected = correct_response_bias(tightened, before.ladder)
    _intervals(tightened, bias=before.ladder.bias, rng=rng)  # draws first, as the uncorrected intervals do
    bias = climb_ladder(corrected.problem, corrected.solution).bias or before.ladder.bias
    expected = _intervals(corrected, bias=bias, rng=rng)

    np.testing.assert_array_equal(after.tightened.solution.multipliers, corrected.solution.multipliers)
    assert (after.tightened.solution.multipliers < tightened.solution.multipliers).all()
    np.testing.assert_array_equal(after.ladder.rungs[0].multipliers_m, tightened.solution.multipliers)
    np.testing.assert_array_equal(after.intervals.multipliers, before.intervals.multipliers)
    np.testing.assert_array_equal(after.intervals.policy.constraints, expected.policy.constraints)


def test_a_refused_correction_changes_nothing() -> None:
    tightened = _solve(6)
    asked, plain = _quantify(tightened, corrects=True), _quantify(tightened, corrects=False)

    assert asked.tightened is tightened
    np.testing.assert_array_equal(asked.intervals.policy.constraints, plain.intervals.policy.constraints)
