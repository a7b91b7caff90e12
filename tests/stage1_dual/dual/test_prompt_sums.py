from __future__ import annotations

import numpy as np
import pytest
from helpers.dual_problems import draw_scores

import stage1_dual.dual.prompt_sums
from stage1_dual.dual import (
    DualProblem,
    PromptSample,
    bootstrap_intervals,
    sandwich_standard_errors,
    solve_dual,
    tilt,
)
from stage1_dual.dual.prompt_sums import PromptSums


def _problem(n_prompts: int = 150, n_responses: int = 32) -> DualProblem:
    r_pk, g_pkm = draw_scores(n_prompts=n_prompts, n_responses=n_responses, n_constraints=2, seed=0)
    return DualProblem.from_arrays(r_pk, g_pkm, thresholds=g_pkm.mean(axis=(0, 1)) + 0.3, beta=1.0)


def _deviations_by_prompt(problem: DualProblem, relative: list[bool]) -> tuple[PromptSums, PromptSums]:
    """Means of the sums at the solution, and what each prompt differs from them by: every prompt is a unit."""
    units = PromptSample.gather(problem, solve_dual(problem), thresholds_are_relative_m=relative).units
    assert len(units.sizes_u) == problem.n_prompts
    return units.means(), units.deviations()


def test_slopes_and_bends_are_derivatives_of_the_tilted_means() -> None:
    problem = _problem(n_prompts=20, n_responses=12)
    lam_m, step = solve_dual(problem).multipliers, 1e-4
    means, off = _deviations_by_prompt(problem, [False, False])
    at = {}
    for j, k in [(0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, -1)]:
        tilted = tilt(problem, lam_m + step * np.array([j, k]))
        at[j, k] = np.vstack([tilted.reward_p, tilted.scores_mp, tilted.kl_p]).T
    found = {
        "value": np.column_stack(
            [off.reward_p + means.reward_p, off.scores_pm + means.scores_pm, off.kl_p + means.kl_p]
        ),
        "slope": _stack(means, off, "slope"),
        "bend": _stack(means, off, "bend"),
    }
    np.testing.assert_allclose(found["value"], at[0, 0], atol=1e-12)
    slope = np.stack([at[1, 0] - at[-1, 0], at[0, 1] - at[0, -1]], axis=-1) / (2 * step)
    # Of central differences: of third order in the step, and rounding over the step or its square.
    np.testing.assert_allclose(found["slope"], slope, atol=1e-6)
    both = (at[1, 1] + at[-1, -1] - at[1, 0] - at[-1, 0] - at[0, 1] - at[0, -1] + 2 * at[0, 0]) / (2 * step**2)
    bend = np.empty((*both.shape, 2, 2))
    bend[..., 0, 0] = (at[1, 0] - 2 * at[0, 0] + at[-1, 0]) / step**2
    bend[..., 1, 1] = (at[0, 1] - 2 * at[0, 0] + at[0, -1]) / step**2
    bend[..., 0, 1] = bend[..., 1, 0] = both
    np.testing.assert_allclose(found["bend"], bend, atol=1e-5)


def _stack(means: PromptSums, off: PromptSums, kind: str) -> np.ndarray:
    """Derivatives of the reward, both scores and the KL of each prompt, shape (p, 4, ...)."""
    parts = []
    for name in ("reward", "scores", "kl"):
        axes = "_p" + "m" * ((name == "scores") + (1 if kind == "slope" else 2))
        value = getattr(means, f"{name}_{kind}{axes}") + getattr(off, f"{name}_{kind}{axes}")
        parts.append(value if name == "scores" else value[:, np.newaxis])
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("relative", [False, True])
def test_psi_and_reach_by_hand(relative: bool) -> None:
    """A margin's slack is against the prompt's own reference, an absolute threshold's against the threshold."""
    problem = _problem(n_prompts=10, n_responses=6)
    means, off = _deviations_by_prompt(problem, [relative, False])
    r_pk, g_pkm = draw_scores(n_prompts=10, n_responses=6, n_constraints=2, seed=0)
    tilted = tilt(problem, solve_dual(problem).multipliers)
    own_p = g_pkm[..., 0].mean(axis=1) - g_pkm[..., 0].mean() if relative else np.zeros(len(r_pk))
    for values_p, found in [
        (tilted.slack_mp[0] - own_p, off.psi_pm[:, 0] + means.psi_pm[0, 0]),
        (tilted.slack_mp[1], off.psi_pm[:, 1] + means.psi_pm[0, 1]),
        (g_pkm[..., 0].max(axis=1) - problem.thresholds_m[0] - own_p, off.reach_pm[:, 0] + means.reach_pm[0, 0]),
    ]:
        np.testing.assert_allclose(found, values_p, atol=1e-12)


def test_very_many_prompts_are_drawn_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem()
    solution = solve_dual(problem)
    singly = bootstrap_intervals(problem, solution, rng=np.random.default_rng(0), n_replicates=4_000)
    # 150 prompts in 40 groups of 3 or 4.
    monkeypatch.setattr(stage1_dual.dual.prompt_sums, "_MOST_UNITS", 40)
    in_groups = bootstrap_intervals(problem, solution, rng=np.random.default_rng(1), n_replicates=4_000)
    widths = [np.diff(found.multipliers).reshape(-1) for found in (singly, in_groups)]
    # 40 units instead of 150: widths are known to about 1 / sqrt(2 * 39) = 11% each.
    np.testing.assert_allclose(widths[1], widths[0], rtol=0.35)
    centre = in_groups.multiplier_replicates_bm.mean(axis=0)
    np.testing.assert_allclose(centre, solution.multipliers, atol=0.2 * widths[0].max())


def test_groups_of_prompts_are_thrown_together_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts sorted by source: groups of neighbours would be alike, and the intervals too wide."""
    rng = np.random.default_rng(0)
    offset_p = np.sort(rng.integers(2, size=2_000)) * 5.0
    g_pk = rng.normal(size=(2_000, 16)) + offset_p[:, np.newaxis]
    problem = DualProblem.from_arrays(-0.5 * g_pk, g_pk, thresholds=g_pk.mean() + 0.2, beta=1.0)
    solution = solve_dual(problem)
    errors = []
    for units in (20_000, 100):
        monkeypatch.setattr(stage1_dual.dual.prompt_sums, "_MOST_UNITS", units)
        errors.append(float(sandwich_standard_errors(problem, solution).policy.constraints[0]))
        intervals = bootstrap_intervals(problem, solution, rng=np.random.default_rng(1), n_replicates=2_000)
        errors.append(float(np.diff(intervals.policy.constraints[0])[0]) / 3.92)
    # 100 groups know a standard error to about 7%.
    np.testing.assert_allclose(errors, errors[0], rtol=0.25)
