from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores
from scipy.stats import genpareto

from stage1_dual.dual import DualProblem, pareto_k
from stage1_dual.dual.tail_index import fit_tail


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.7, 1.2])
def test_fit_recovers_the_shape_of_a_generalised_pareto(shape: float) -> None:
    n_fits, n_tail = 400, 200
    excess = np.sort(genpareto.rvs(shape, size=(n_fits, n_tail), random_state=np.random.default_rng(0)), axis=1)
    found = fit_tail(excess)
    # The prior pulls towards 1/2 by 10 points in n_tail + 10.
    expected = (n_tail * shape + 10 * 0.5) / (n_tail + 10)
    standard_error = (1 + max(shape, 0.0)) / np.sqrt(n_tail * n_fits)
    assert abs(found.mean() - expected) < 5 * standard_error + 0.01


def test_scale_and_neighbours_do_not_matter() -> None:
    excess = np.sort(genpareto.rvs(0.4, size=(3, 30), random_state=np.random.default_rng(1)), axis=1)
    together = fit_tail(excess * np.array([[1e-12], [1.0], [1e9]]))
    alone = [fit_tail(row[np.newaxis])[0] for row in excess]
    np.testing.assert_allclose(together, alone, rtol=1e-9)


@pytest.mark.parametrize(
    ("excess", "expected"),
    [
        (np.zeros((1, 10)), -np.inf),  # equal weights
        (np.ones((1, 100)), None),  # all at one place: a grid point of the fit falls on its singularity
        (np.array([[0.0] * 9 + [1.0]]), None),
    ],
)
def test_degenerate_tails_give_numbers(excess: np.ndarray, expected: float | None) -> None:
    (found,) = fit_tail(excess)
    assert not np.isnan(found)
    if expected is not None:
        assert found == expected


def test_k_of_a_problem_prompt_by_prompt() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=128, n_constraints=1, seed=3)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=0.0, beta=0.5)
    k_p = pareto_k(problem, np.array([0.5]))
    w_pk = problem.tilted_weights([0.5])
    tail = 26  # ceil(0.2 * 128), less than 3 sqrt(128)
    largest = np.sort(w_pk, axis=1)[:, -tail - 1 :]
    np.testing.assert_allclose(k_p, fit_tail(largest[:, 1:] - largest[:, :1]), rtol=1e-12)
    # The same responses as ragged rows, with a prompt too short for a tail.
    ids = np.append(np.repeat(np.arange(60), 128), [60] * 4)
    ragged = DualProblem.from_rows(
        ids,
        np.append(r_pk.reshape(-1), np.zeros(4)),
        np.append(g_pkm.reshape(-1), np.arange(4.0)),
        thresholds=0.0,
        beta=0.5,
    )
    found = pareto_k(ragged, np.array([0.5]))
    np.testing.assert_allclose(found[:60], k_p, rtol=1e-12)
    assert np.isnan(found[60])


def test_collapsed_weights_have_the_heaviest_tail_there_is() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=30, n_responses=128, n_constraints=1, seed=3)
    for beta in (0.01, 0.002):
        problem = DualProblem.from_arrays(6 * r_pk, g_pkm, thresholds=-5.0, beta=beta)
        assert np.all(pareto_k(problem, np.zeros(1)) > 0.7)
