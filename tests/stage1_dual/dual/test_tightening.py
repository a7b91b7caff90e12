from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import GaussianPopulation

from stage1_dual.dual import (
    Demand,
    DualProblem,
    InfeasibleError,
    InputError,
    climb_ladder,
    correct_response_bias,
    solve_dual,
    solve_tightened,
    tilt,
)

pytestmark = pytest.mark.slow


def _demand(
    *,
    reserve: float = 0.0,
    assurance: float = np.nan,
    score_error: float = 0.0,
    score_noise: float = 0.0,
    prompts: int = 150,
    responses: int = 40,
) -> Demand:
    return Demand(
        reserve_m=np.array([reserve]),
        assurance_m=np.array([assurance]),
        score_error_m=np.array([score_error]),
        score_noise_m=np.array([score_noise]),
        n_evaluation_prompts=prompts,
        n_evaluation_responses=responses,
        thresholds_are_relative_m=np.array([True]),
    )


def _problem(*, n_prompts: int = 300, margin: float = 0.3, seed: int = 0) -> DualProblem:
    r_pk, g_pk = GaussianPopulation().draw(np.random.default_rng(seed), n_prompts=n_prompts, n_responses=64)
    return DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + margin, beta=1.0)


def test_nothing_asked_changes_nothing() -> None:
    problem = _problem()
    found, plain = solve_tightened(problem, _demand()), solve_dual(problem)
    assert found.solution.multipliers.tolist() == plain.multipliers.tolist()
    assert found.price == 0.0
    assert found.problem.thresholds_m.tolist() == problem.thresholds_m.tolist()


def test_a_reserve_is_added_as_it_is_and_has_its_price() -> None:
    problem = _problem()
    found = solve_tightened(problem, _demand(reserve=0.2))
    stricter = solve_dual(problem.with_thresholds(problem.thresholds_m + 0.2))
    np.testing.assert_allclose(found.solution.multipliers, stricter.multipliers, atol=1e-9)
    assert found.price == pytest.approx(solve_dual(problem).predicted_reward - stricter.predicted_reward, abs=1e-9)
    assert found.price > 0
    easier = solve_tightened(problem, _demand(reserve=-0.1))
    assert easier.solution.multipliers[0] < solve_dual(problem).multipliers[0]
    assert easier.price < 0


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_assurance_comes_true_on_other_prompts(level: float) -> None:
    """Draw a sample, solve with assurance, evaluate the tilted policy itself on other prompts, count satisfied."""
    population = GaussianPopulation()
    n_prompts, n_responses, margin, trials = 60, 40, 0.3, 250
    satisfied = plainly = 0
    for trial in range(trials):
        rng = np.random.default_rng(1_000 + trial)
        r_pk, g_pk = population.draw(rng, n_prompts=200, n_responses=128)
        problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + margin, beta=1.0)
        demand = _demand(assurance=level, prompts=n_prompts, responses=n_responses)
        tightened = solve_tightened(problem, demand)
        for multiplier, is_tightened in (
            (tightened.solution.multipliers[0], True),
            (solve_dual(problem).multipliers[0], False),
        ):
            # The tilted policy moves the mean of g by (Cov(r, g) + lam Var(g)) / beta on every prompt.
            shift = population.correlation + multiplier
            reference_p, policy_p = (
                rng.normal(size=(n_prompts, n_responses)).mean(axis=1),
                shift + rng.normal(size=(n_prompts, n_responses)).mean(axis=1),
            )
            gain_p = policy_p - reference_p
            low = gain_p.mean() - 1.96 * gain_p.std(ddof=1) / np.sqrt(n_prompts)
            satisfied += is_tightened and low >= margin
            plainly += not is_tightened and low >= margin
    share, error = satisfied / trials, np.sqrt(level * (1 - level) / trials)
    assert abs(share - level) < 4 * error + 0.02
    assert plainly / trials < 0.25


def test_score_error_tightens_by_the_bound() -> None:
    problem = _problem()
    found = solve_tightened(problem, _demand(score_error=0.1))
    ess_p = tilt(found.problem, found.solution.multipliers).ess_p
    second_moment = np.mean(64 / ess_p)
    assert found.score_error_m[0] == pytest.approx((np.sqrt(0.5) + np.sqrt(second_moment / 2)) * 0.1, abs=1e-4)
    added = found.problem.thresholds_m - problem.thresholds_m
    np.testing.assert_allclose(added, found.score_error_m, atol=1e-12)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_score_noise_takes_back_what_the_tilt_leans_on_it(noise: float) -> None:
    """The mean of the true scores under the weights of noisy ones, whose noise nobody sees but this test."""
    margin, rng = 0.4, np.random.default_rng(2)
    r_pk, g_pk = GaussianPopulation().draw(rng, n_prompts=600, n_responses=256)
    noisy_pk = g_pk + rng.normal(scale=noise, size=g_pk.shape)
    problem = DualProblem.from_arrays(r_pk, noisy_pk, thresholds=noisy_pk.mean() + margin, beta=1.0)
    plain, found = solve_dual(problem), solve_tightened(problem, _demand(score_noise=noise))

    def gained(solved: DualProblem, lam: np.ndarray) -> tuple[float, float]:
        w_pk = np.asarray(solved.tilted_weights(lam))
        gain_p = (w_pk * g_pk).sum(axis=1) - g_pk.mean(axis=1)
        return float(gain_p.mean()), float(gain_p.std(ddof=1) / np.sqrt(len(gain_p)))

    promised_too_much, error = gained(problem, plain.multipliers)
    kept, _ = gained(found.problem, found.solution.multipliers)
    over = plain.multipliers[0] * noise**2
    assert promised_too_much == pytest.approx(margin - over, abs=4 * error + 0.05 * over)
    assert kept == pytest.approx(margin, abs=4 * error)
    assert margin - promised_too_much > 8 * error or noise < 1
    # The fixed point, to the share of a standard deviation that the rounds settle at.
    assert found.score_noise_m[0] == pytest.approx(found.solution.multipliers[0] * noise**2, abs=2e-4)
    np.testing.assert_allclose(found.problem.thresholds_m - problem.thresholds_m, found.score_noise_m, atol=1e-12)


def test_a_score_that_is_all_noise_cannot_be_bounded() -> None:
    rng = np.random.default_rng(4)
    noise_pk = rng.normal(size=(300, 64))
    problem = DualProblem.from_arrays(rng.normal(size=(300, 64)), noise_pk, thresholds=noise_pk.mean() + 0.1, beta=1.0)
    with pytest.raises(InputError, match="the tilt leans on the noise by more"):
        solve_tightened(problem, _demand(score_noise=1.05))


def test_what_cannot_be_asked() -> None:
    with pytest.raises(InfeasibleError):
        solve_tightened(_problem(), _demand(reserve=100.0))
    with pytest.raises((InfeasibleError, InputError)):
        solve_tightened(_problem(), _demand(score_error=2.0))
    with pytest.raises(InputError, match="size of the evaluation"):
        _demand(assurance=0.9, prompts=0)
    for wrong in ({"assurance": 1.0}, {"reserve": np.inf}, {"score_error": np.nan}, {"score_noise": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            _demand(**wrong)  # type: ignore[arg-type]


def test_corrected_multipliers_solve_the_relaxed_problem_and_are_nearer_to_the_truth() -> None:
    population = GaussianPopulation()
    truth = population.lam_star
    plug_in, corrected = [], []
    for seed in range(20):
        r_pk, g_pk = population.draw(np.random.default_rng(seed), n_prompts=500, n_responses=32)
        problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + population.margin, beta=population.beta)
        tightened = solve_tightened(problem, _demand())
        ladder = climb_ladder(problem, tightened.solution)
        found = correct_response_bias(tightened, ladder)
        assert ladder.corrected_multipliers_m is not None
        np.testing.assert_allclose(found.solution.multipliers, ladder.corrected_multipliers_m, atol=1e-9)
        assert found.solution.kkt_residual <= 1e-8
        np.testing.assert_allclose(
            found.problem.thresholds_m, problem.thresholds_m + found.response_bias_m, atol=1e-12
        )
        assert found.response_bias_m[0] < 0
        # Less is asked for, and more of the reward kept.
        assert found.price < 0
        plug_in.append(tightened.solution.multipliers[0])
        corrected.append(found.solution.multipliers[0])
    assert abs(np.mean(corrected) - truth) < 0.5 * abs(np.mean(plug_in) - truth)


def test_a_constraint_that_does_not_bind_keeps_its_threshold() -> None:
    rng = np.random.default_rng(3)
    g_pkm = rng.normal(size=(200, 32, 2))
    r_pk = -0.4 * g_pkm[:, :, 0] + rng.normal(size=(200, 32))
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.array([0.2, -1.0]), beta=1.0)
    demand = Demand(
        reserve_m=np.zeros(2),
        assurance_m=np.full(2, np.nan),
        score_error_m=np.zeros(2),
        score_noise_m=np.zeros(2),
        n_evaluation_prompts=100,
        n_evaluation_responses=10,
        thresholds_are_relative_m=np.array([False, False]),
    )
    tightened = solve_tightened(problem, demand)
    assert tightened.solution.multipliers[1] == 0
    found = correct_response_bias(tightened, climb_ladder(problem, tightened.solution))
    assert found.response_bias_m[0] < 0 == found.response_bias_m[1]
    assert found.solution.multipliers[1] == 0


def test_a_refused_correction_changes_nothing() -> None:
    r_pk, g_pk = GaussianPopulation().draw(np.random.default_rng(0), n_prompts=100, n_responses=6)
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + 0.3, beta=1.0)
    tightened = solve_tightened(problem, _demand())
    assert correct_response_bias(tightened, climb_ladder(problem, tightened.solution)) is tightened


@pytest.mark.parametrize("asked", [{"reserve": 0.1}, {"assurance": 0.9}, {"score_error": 0.1}])
def test_an_equality_has_no_safe_side(asked: dict[str, float]) -> None:
    (setting,) = asked
    problem = _problem().with_equalities([True])
    with pytest.raises(InputError, match=f"`{setting}` of constraint_0: an equality has no safe side"):
        solve_tightened(problem, _demand(**asked))
    assert solve_tightened(problem, _demand()).solution.slack[0] == pytest.approx(0.0, abs=1e-9)


def test_under_a_kl_budget_beta_settles_with_the_tightening() -> None:
    problem = _problem().with_kl_budget(0.5)
    plain = solve_dual(problem)
    found = solve_tightened(problem, _demand(reserve=0.05, assurance=0.9))
    assert found.solution.predicted_kl == pytest.approx(0.5, rel=1e-9)
    assert found.problem.beta == found.solution.beta != plain.beta
    assert found.price == pytest.approx(plain.predicted_reward - found.solution.predicted_reward)
    # It has settled: from what it found the same follows.
    again = solve_tightened(found.problem.with_thresholds(problem.thresholds_m), _demand(reserve=0.05, assurance=0.9))
    assert again.assurance_m[0] == pytest.approx(found.assurance_m[0], rel=1e-3)
    assert again.solution.beta == pytest.approx(found.solution.beta, rel=1e-3)
    sizes = [solve_tightened(problem, _demand(assurance=a)).assurance_m[0] for a in (0.5, 0.9)]
    assert 0 < sizes[0] < sizes[1]


def test_a_corrected_beta_spends_less_on_the_samples_and_is_certified_for_that() -> None:
    problem = _problem().with_kl_budget(0.5)
    tightened = solve_tightened(problem, _demand())
    ladder = climb_ladder(tightened.problem, tightened.solution)
    corrected = correct_response_bias(tightened, ladder)
    assert ladder.corrected_beta is not None
    assert corrected.solution.beta == pytest.approx(ladder.corrected_beta, rel=1e-7)
    assert corrected.problem.beta == corrected.solution.beta > tightened.solution.beta
    assert corrected.response_bias_kl < 0
    assert corrected.solution.predicted_kl == pytest.approx(0.5 + corrected.response_bias_kl, rel=1e-8)
    assert corrected.solution.kkt_residual <= 1e-8
