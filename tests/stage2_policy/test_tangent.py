from __future__ import annotations

import numpy as np
import pytest
import torch

from stage2_policy.data import segment_softmax
from stage2_policy.tangent import PENALTIES, Judging, choose_factors, fit_tangent

NATS = np.array([2.0, 0.5, 1.0])


def bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.uint16).numpy()


def exact(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).bfloat16().double().numpy()


def centred(values: np.ndarray, prompt_n: np.ndarray) -> np.ndarray:
    means = np.stack([values[prompt_n == prompt].mean(axis=0) for prompt in np.unique(prompt_n)])
    return values - means[prompt_n]


def a_problem(seed: int = 0, *, noise: float = 1.0, n_weights: int = 60) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    prompt_n = np.repeat(np.arange(40), rng.integers(3, 9, size=40))
    functions = exact(rng.standard_normal((len(prompt_n), n_weights)))
    truth = rng.standard_normal((n_weights, 3)) / np.sqrt(n_weights)
    offsets = rng.standard_normal((40, 3))[prompt_n] * 5
    columns = functions @ truth + offsets + noise * rng.standard_normal((len(prompt_n), 3))
    return functions, columns, prompt_n, truth


def test_the_changes_are_the_ridge_regression_within_prompts() -> None:
    functions, columns, prompt_n, _ = a_problem()
    tangent = fit_tangent(bits(functions), columns, prompt_n, nats=NATS)

    x, y = centred(functions, prompt_n), centred(columns, prompt_n)
    penalty = tangent.penalty * np.trace(x @ x.T) / len(x)
    expected = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y).T
    np.testing.assert_allclose(tangent.changes, expected, rtol=1e-3, atol=1e-5)
    assert tangent.penalty in PENALTIES


def test_without_noise_the_changes_are_found_and_explain_all() -> None:
    functions, columns, prompt_n, truth = a_problem(noise=0.0)
    tangent = fit_tangent(bits(functions), columns, prompt_n, nats=NATS)
    assert tangent.explained > 0.99
    np.testing.assert_allclose(tangent.changes.T, truth, atol=0.02)


def test_of_pure_noise_nothing_is_explained() -> None:
    functions, _, prompt_n, _ = a_problem()
    columns = np.random.default_rng(3).standard_normal((len(prompt_n), 3))
    tangent = fit_tangent(bits(functions), columns, prompt_n, nats=NATS)
    assert abs(tangent.explained) < 0.1
    assert tangent.penalty >= 1.0


def judging(
    *, required: list[float], is_equality: list[bool] | None = None, learnt: float = 1.0, **changes: object
) -> Judging:
    """Three columns of which the first is the reward; of each a share is learnt, of the last another one."""
    rng = np.random.default_rng(1)
    prompt_n = np.repeat(np.arange(300), 32)
    columns = rng.standard_normal((len(prompt_n), 3))
    columns[:, 1] -= 0.3 * columns[:, 0]
    log_ratios = np.stack([0.5 * columns[:, 0], 0.3 * columns[:, 1], learnt * 0.2 * columns[:, 2]], axis=1)
    return Judging(
        log_ratios=log_ratios,
        columns=columns,
        prompt_n=prompt_n,
        reward_nats=0.5,
        required=np.array(required),
        is_equality=np.array(is_equality or [False, False]),
        **changes,  # type: ignore[arg-type]
    )


def test_constraints_gain_what_is_required_and_the_rest_goes_to_the_reward() -> None:
    chosen = choose_factors(judging(required=[0.4, 0.3]))
    gains, _ = judging(required=[0.4, 0.3]).outcome(chosen.factors)
    assert chosen.reached == 1.0
    np.testing.assert_allclose(gains[1:], [0.4, 0.3], atol=2e-3)
    # The tilt exp(c) of these columns is exact: with all learnt, the reward's own factor is that of beta.
    assert chosen.factors[0] == pytest.approx(1.0, abs=0.05)


def test_a_score_of_which_little_was_learnt_gets_a_larger_factor() -> None:
    whole, half = (choose_factors(judging(required=[0.4, 0.3], learnt=learnt)).factors for learnt in (1.0, 0.5))
    assert half[2] == pytest.approx(2 * whole[2], rel=0.02)
    np.testing.assert_allclose(half[:2], whole[:2], rtol=0.02)


def test_an_equality_is_met_from_either_side() -> None:
    problem = judging(required=[0.2, -0.1], is_equality=[False, True])
    chosen = choose_factors(problem)
    assert problem.outcome(chosen.factors)[0][2] == pytest.approx(-0.1, abs=2e-3)


def test_a_kl_budget_is_kept() -> None:
    free = judging(required=[0.2, 0.0])
    spent = free.outcome(choose_factors(free).factors)[1]
    bounded = judging(required=[0.2, 0.0], most_kl=spent / 2)
    chosen = choose_factors(bounded)
    gains, kl = bounded.outcome(chosen.factors)
    assert chosen.reached == 1.0
    assert kl <= spent / 2 * 1.002
    assert gains[1] >= 0.2 - 2e-3


def test_of_what_no_sum_reaches_the_largest_share_is_taken() -> None:
    problem = judging(required=[6.0, 0.0])
    chosen = choose_factors(problem)
    gains, _ = problem.outcome(chosen.factors)
    assert 0 < chosen.reached < 1
    assert gains[1] >= chosen.reached * 6.0 - 2e-3
    assert gains[2] >= -2e-3


def test_a_change_of_nothing_keeps_its_factor() -> None:
    problem = judging(required=[0.2, 0.0])
    problem.log_ratios[:, 2] = 0.0
    assert choose_factors(problem).factors[2] == 1.0


def test_outcome_is_the_weighted_mean_less_the_plain_one() -> None:
    problem = judging(required=[0.0, 0.0])
    factors = np.array([1.0, 2.0, 0.5])
    weight = segment_softmax(problem.log_ratios @ factors, problem.prompt_n).reshape(300, 32)
    columns = problem.columns.reshape(300, 32, 3)
    gains, kl = problem.outcome(factors)
    np.testing.assert_allclose(
        gains, np.mean([w @ c - c.mean(axis=0) for w, c in zip(weight, columns, strict=True)], axis=0)
    )
    assert kl == pytest.approx(np.mean([np.sum(w * np.log(w * 32)) for w in weight]))
