"""What each prompt contributes, against slow loops that leave out one response at a time."""

import numpy as np
import pytest
from helpers.pilots import draw_gaussian, pilot_rows

from stage1_dual.dual.pilot_terms import leave_one_out, prompt_terms, tilted_weights


def tilted_means(rows, kept_k, prompt):
    """Slack and KL of one prompt by plain sums over the responses kept."""
    k = int(rows.counts_p[prompt])
    place = np.arange(prompt * k, (prompt + 1) * k)[kept_k]
    logit = (rows.reward_n[place] + rows.multipliers_m @ rows.column_mn[:, place]) / rows.beta
    weight = np.exp(logit) / np.exp(logit).sum()
    slack = rows.column_mn[:, place] @ weight - rows.reference_mn[:, place].mean(axis=1) - rows.target_m
    return slack, weight @ logit - np.log(np.mean(np.exp(logit)))


@pytest.mark.parametrize("relative", [True, False])
def test_leaving_out_one_response_is_what_a_loop_over_all_of_them_finds(relative):
    rows = pilot_rows(*draw_gaussian(np.random.default_rng(0), 5, 12, n_constraints=2), 0.3, relative=relative)
    terms = prompt_terms(rows, rows.multipliers_m)
    found = leave_one_out(rows, tilted_weights(rows, rows.multipliers_m)[0])
    for prompt in range(5):
        whole, kl = tilted_means(rows, np.ones(12, bool), prompt)
        without = [tilted_means(rows, np.arange(12) != left_out, prompt) for left_out in range(12)]
        slacks = np.array([slack for slack, _ in without])
        np.testing.assert_allclose(terms.psi_mp[:, prompt], whole, atol=1e-12)
        off = slacks - slacks.mean(axis=0)
        np.testing.assert_allclose(found.within_mmp[:, :, prompt], 11 * off.T @ off, rtol=1e-9)
        np.testing.assert_allclose(found.bias_mp[:, prompt], -12 * 11 * (slacks.mean(axis=0) - whole), atol=1e-10)
        bias_of_kl = 11 * (np.mean([one for _, one in without]) - kl)
        np.testing.assert_allclose(terms.kl_p[prompt], kl - bias_of_kl, atol=1e-12)


def test_a_prompt_that_leans_on_one_response_has_no_negative_kl():
    rows = pilot_rows(*draw_gaussian(np.random.default_rng(1), 20, 12), 0.3, beta=0.01)
    kl_p = prompt_terms(rows, rows.multipliers_m).kl_p
    assert (kl_p > 0).all()
    assert kl_p.mean() > 0.9 * np.log(12)  # what 12 responses show of it, which is too little, and not less


def test_a_constant_reward_costs_nothing():
    r_pk, g_pkm = draw_gaussian(np.random.default_rng(2), 5, 12)
    rows = pilot_rows(np.full_like(r_pk, 0.1), g_pkm, 0.3)
    assert (prompt_terms(rows, rows.multipliers_m).reward_slope_mp == 0).all()
