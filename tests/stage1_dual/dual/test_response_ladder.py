from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import GaussianPopulation, draw_scores

from stage1_dual.dual import DualProblem, bootstrap_intervals, climb_ladder, solve_dual

pytestmark = pytest.mark.slow


def _ladder(problem: DualProblem):  # type: ignore[no-untyped-def]
    return climb_ladder(problem, solve_dual(problem))


def test_rungs_are_means_over_disjoint_shares_of_the_responses() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=80, n_responses=24, n_constraints=2, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm, axis=(0, 1)) + 0.2, beta=1.0)
    ladder = _ladder(problem)
    assert [(rung.n_responses, rung.n_parts) for rung in ladder.rungs] == [(24, 1), (12, 2), (6, 4)]
    for rung in ladder.rungs[1:]:
        step = rung.n_parts
        parts = [
            solve_dual(
                DualProblem.from_arrays(
                    r_pk[:, part::step], g_pkm[:, part::step], thresholds=problem.thresholds_m, beta=1.0
                )
            )
            for part in range(step)
        ]
        np.testing.assert_allclose(rung.multipliers_m, np.mean([p.multipliers for p in parts], axis=0), atol=1e-10)
        assert rung.kl == pytest.approx(np.mean([p.predicted_kl for p in parts]))
    full, half = ladder.rungs[0].multipliers_m, ladder.rungs[1].multipliers_m
    assert ladder.corrected_multipliers_m is not None
    np.testing.assert_allclose(ladder.corrected_multipliers_m, 2 * full - half, atol=1e-12)
    assert not ladder.refusal


@pytest.mark.parametrize(("margin", "beta"), [(0.3, 1.0), (0.5, 1.0), (0.5, 0.7)])
def test_correction_at_least_halves_the_error_with_32_responses(margin: float, beta: float) -> None:
    population = GaussianPopulation(margin=margin, beta=beta)
    plug_in, corrected = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        r_pk, g_pk = population.draw(rng, n_prompts=2_000, n_responses=32)
        # Measured from the known reference of each prompt: the error of the reference mean is another matter.
        problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + margin, beta=beta)
        solution = solve_dual(problem)
        ladder = climb_ladder(problem, solution)
        assert ladder.corrected_multipliers_m is not None
        plug_in.append(solution.multipliers[0] - population.lam_star)
        corrected.append(ladder.corrected_multipliers_m[0] - population.lam_star)
    assert np.mean(plug_in) > 0
    assert np.sqrt(np.mean(np.square(corrected))) < 0.5 * np.sqrt(np.mean(np.square(plug_in)))


def _gaussian(
    *, margin: float, n_responses: int, n_prompts: int, seed: int, beta: float = 1.0
) -> tuple[DualProblem, float]:
    population = GaussianPopulation(correlation=-0.46, margin=margin, beta=beta)
    r_pk, g_pk = population.draw(np.random.default_rng(seed), n_prompts=n_prompts, n_responses=n_responses)
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + margin, beta=beta)
    return problem, population.lam_star


@pytest.mark.parametrize(
    ("n_responses", "margin", "beta", "why"),
    [
        (8, 0.7, 1.0, "out of reach in 4 of 4 quarters"),
        (8, 1.0, 1.0, "out of reach in"),
        (8, 0.45, 3.0, "where a bias in 1/K doubles them"),
        (16, 1.2, 1.0, "out of reach in 4 of 4 quarters"),
        (64, 1.9, 1.0, "out of reach in"),
    ],
)
def test_few_responses_and_a_steep_margin_are_not_corrected(
    n_responses: int, margin: float, beta: float, why: str
) -> None:
    plug_in, jackknife = [], []
    for seed in range(10):
        problem, lam_star = _gaussian(margin=margin, n_responses=n_responses, n_prompts=1_000, seed=seed, beta=beta)
        ladder = _ladder(problem)
        assert why in ladder.refusal
        assert ladder.bias is None
        assert ladder.corrected_multipliers_m is None
        full, half = (float(rung.multipliers_m[0]) for rung in ladder.rungs[:2])
        if not ladder.rungs[1].n_infeasible:
            plug_in.append(full - lam_star)
            jackknife.append(max(2 * full - half, 0.0) - lam_star)
    # The refusal is deserved: the correction would overshoot by more than half of the bias.
    assert np.mean(plug_in) > 0
    assert np.mean(jackknife) < -0.5 * np.mean(plug_in)


@pytest.mark.parametrize(("n_responses", "margin"), [(16, 0.5), (32, 0.9), (64, 1.3), (128, 1.6)])
def test_margins_well_inside_what_a_quarter_reaches_are_corrected(n_responses: int, margin: float) -> None:
    plug_in, corrected = [], []
    for seed in range(6):
        problem, lam_star = _gaussian(margin=margin, n_responses=n_responses, n_prompts=800, seed=seed)
        solution = solve_dual(problem)
        ladder = climb_ladder(problem, solution)
        assert not ladder.refusal
        assert ladder.corrected_multipliers_m is not None
        plug_in.append(solution.multipliers[0] - lam_star)
        corrected.append(ladder.corrected_multipliers_m[0] - lam_star)
    assert np.sqrt(np.mean(np.square(corrected))) < 0.5 * np.sqrt(np.mean(np.square(plug_in)))


def test_the_ratio_of_changes_is_no_ground_where_they_are_negligible() -> None:
    beyond = 0
    for seed in range(8):
        problem, _ = _gaussian(margin=0.1, n_responses=128, n_prompts=100, seed=seed)
        ladder = _ladder(problem)
        full, half, quarter = (float(rung.multipliers_m[0]) for rung in ladder.rungs)
        beyond += not 0 <= (quarter - half) / (half - full) <= 5
        assert not ladder.refusal
    assert beyond > 0


def test_a_refused_constraint_is_named_and_refuses_for_all() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=300, n_responses=16, n_constraints=2, seed=4)
    thresholds = np.mean(g_pkm, axis=(0, 1)) + np.array([0.1, 0.9])
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=thresholds, beta=1.0, constraint_names=["mild", "steep"])
    refusal = _ladder(problem).refusal
    assert refusal.startswith("lambda* of steep is ")
    assert _ladder(problem).bias is None


def test_drift_is_the_change_from_half_the_responses() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=200, n_responses=16, n_constraints=1, seed=1)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm) + 0.4, beta=0.5)
    ladder = _ladder(problem)
    full, half = ladder.rungs[0].multipliers_m[0], ladder.rungs[1].multipliers_m[0]
    scale = max(full, 0.5 / problem.score_scale_m[0])
    assert ladder.drift_m[0] == pytest.approx((half - full) / scale)
    assert ladder.drift_m[0] > 0  # fewer responses, larger multipliers


def test_when_a_correction_must_not_be_used() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=100, n_responses=16, n_constraints=1, seed=2)
    reference = float(np.mean(g_pkm))
    few = DualProblem.from_arrays(r_pk[:, :3], g_pkm[:, :3], thresholds=reference, beta=1.0)
    assert "3 responses" in _ladder(few).refusal
    assert len(_ladder(few).rungs) == 1
    no_quarters = DualProblem.from_arrays(r_pk[:, :7], g_pkm[:, :7], thresholds=reference, beta=1.0)
    assert "7 responses; quarters" in _ladder(no_quarters).refusal
    assert len(_ladder(no_quarters).rungs) == 2
    strong = DualProblem.from_arrays(r_pk, g_pkm, thresholds=reference + 0.5, beta=0.1)
    assert "less than half of the bias" in _ladder(strong).refusal
    best = float(np.mean(np.max(g_pkm[..., 0], axis=1)))
    steep = DualProblem.from_arrays(r_pk, g_pkm, thresholds=best - 0.05, beta=1.0)
    ladder = _ladder(steep)
    assert ladder.rungs[1].n_infeasible == 2
    assert np.isnan(ladder.rungs[1].multipliers_m).all()
    assert "out of reach in 2 of 2 halves" in ladder.refusal
    for problem in (few, no_quarters, strong, steep):
        assert _ladder(problem).corrected_multipliers_m is None


def test_inactive_constraint_keeps_its_zero_and_short_prompts_stay() -> None:
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=16, n_constraints=1, seed=3)
    slack = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.mean(g_pkm) - 3.0, beta=1.0)
    corrected = _ladder(slack).corrected_multipliers_m
    assert corrected is not None
    assert corrected.tolist() == [0.0]
    ids = np.append(np.repeat(np.arange(60), 16), 60)
    ragged = DualProblem.from_rows(
        ids, np.append(r_pk, 0.0), np.append(g_pkm, 5.0), thresholds=np.mean(g_pkm) + 0.2, beta=1.0
    )
    quarter = ragged.samples.every(4, 1)
    assert quarter.facts.n_prompts == 61
    assert quarter.counts_p.tolist() == [4] * 60 + [1]


def test_intervals_moved_by_the_bias_cover_and_plain_ones_do_not() -> None:
    """Many prompts and few responses: the error between prompts is small, the bias is not."""
    population = GaussianPopulation(margin=0.5)
    trials = 60
    plain = moved = policy_plain = policy_moved = 0
    for seed in range(trials):
        r_pk, g_pk = population.draw(np.random.default_rng(seed), n_prompts=500, n_responses=48)
        problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=g_pk.mean() + 0.5, beta=1.0)
        solution = solve_dual(problem)
        bias = climb_ladder(problem, solution).bias
        assert bias is not None
        # The mean slack of the policy tilted by this lam, in the population.
        true_slack = population.correlation + solution.multipliers[0] - 0.5
        for correction in (None, bias):
            found = bootstrap_intervals(
                problem,
                solution,
                rng=np.random.default_rng(seed),
                n_replicates=400,
                thresholds_are_relative_m=[True],
                bias=correction,
            )
            low, high = found.multipliers[0]
            covers = bool(low <= population.lam_star <= high)
            slack_low, slack_high = found.policy.slack[0]
            slack_covers = bool(slack_low <= true_slack <= slack_high)
            if correction is None:
                plain, policy_plain = plain + covers, policy_plain + slack_covers
            else:
                moved, policy_moved = moved + covers, policy_moved + slack_covers
    # Over 300 trials: 0.93 and 0.87 moved, 0.17 and 0.14 plain; four standard errors over 60 are 0.13 and 0.17.
    assert moved / trials >= 0.80
    assert policy_moved / trials >= 0.70
    assert plain / trials <= 0.5
    assert policy_plain / trials <= 0.5


def test_the_beta_of_a_kl_budget_is_corrected_towards_the_populations() -> None:
    # The reward alone, Gaussian: kappa nats are spent at beta = 1 / sqrt(2 kappa).
    truth, plug_in, corrected = 1.0, [], []
    for seed in range(8):
        r_pk = np.random.default_rng(seed).normal(size=(1_000, 32))
        problem = DualProblem.from_arrays(r_pk, np.zeros((1_000, 32, 0)), thresholds=[], beta=1.0).with_kl_budget(0.5)
        ladder = _ladder(problem)
        assert [rung.kl for rung in ladder.rungs] == pytest.approx([0.5, 0.5, 0.5])
        assert ladder.corrected_beta is not None
        assert ladder.beta_drift == pytest.approx(ladder.rungs[1].beta / ladder.rungs[0].beta - 1)
        plug_in.append(ladder.rungs[0].beta)
        corrected.append(ladder.corrected_beta)
    assert np.mean(plug_in) < truth - 0.02
    assert abs(np.mean(corrected) - truth) < 0.4 * (truth - np.mean(plug_in))
