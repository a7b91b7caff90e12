from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.dual_problems import GaussianPopulation, draw_scores
from helpers.figures import require_nothing_cut_off
from scipy.optimize import brentq

from pipeline.baselines.sample_sizes import SAMPLE_SIZES, sample_size_figure, sample_size_table
from pipeline.contracts.errors import InputError
from stage1_dual.dual import DualProblem

POPULATION = GaussianPopulation(margin=0.3)


def _problem(n_prompts: int = 150, n_responses: int = 64, seed: int = 0) -> DualProblem:
    r_pk, g_pk = POPULATION.draw(np.random.default_rng(seed), n_prompts=n_prompts, n_responses=n_responses)
    return DualProblem.from_arrays(r_pk, g_pk, thresholds=0.0, beta=POPULATION.beta)


def _table(problem: DualProblem, margins: list[float], n_draws: int = 8, **sizes: Any) -> pa.Table:
    return sample_size_table(problem, margins=margins, n_draws=n_draws, rng=np.random.default_rng(3), **sizes)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return _table(_problem(), [0.3, 2.0], prompt_sizes=(50, 100, 1000))


def _rows(table: pa.Table, varied: str, margin: float) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if row["varied"] == varied and row["margin"] == margin]


def test_every_size_has_a_row_for_every_margin(table: pa.Table) -> None:
    assert table.schema == SAMPLE_SIZES
    for margin in (0.3, 2.0):
        by_responses, by_prompts = (_rows(table, varied, margin) for varied in ("responses", "prompts"))
        sizes = [(row["n_prompts"], row["n_responses"], row["n_subsets"]) for row in by_responses]
        assert sizes == [(150, 8, 8), (150, 16, 8), (150, 32, 8), (150, 64, 1)]
        sizes = [(row["n_prompts"], row["n_responses"], row["n_subsets"]) for row in by_prompts]
        assert sizes == [(50, 64, 8), (100, 64, 8), (150, 64, 1)], "1000 prompts are not there"
        assert {**by_responses[-1], "varied": ""} == {**by_prompts[-1], "varied": ""}


def test_all_samples_give_the_root_of_the_slack() -> None:
    r_pk, g_pk = POPULATION.draw(np.random.default_rng(0), n_prompts=60, n_responses=32)
    problem = DualProblem.from_arrays(r_pk, g_pk, thresholds=0.0, beta=1.0)

    def lam_at_root(columns: slice, threshold: float) -> float:
        def slack(lam: float) -> float:
            w_pk = np.exp(r_pk[:, columns] + lam * g_pk[:, columns])
            return float(np.mean(np.sum(w_pk * g_pk[:, columns], axis=1) / np.sum(w_pk, axis=1)) - threshold)

        return float(brentq(slack, 0.0, 20.0, xtol=1e-12))

    threshold = float(np.mean(g_pk)) + 0.3
    plug_in = lam_at_root(slice(None), threshold)
    halves = [lam_at_root(slice(first, None, 2), threshold) for first in (0, 1)]
    row = _rows(_table(problem, [0.3]), "responses", 0.3)[-1]
    assert row["plug_in_mean"] == pytest.approx(plug_in, abs=1e-8)
    assert row["corrected_mean"] == pytest.approx(2 * plug_in - np.mean(halves), abs=1e-8)
    assert row["plug_in_sd"] is None


def test_few_responses_give_too_large_a_multiplier_and_the_correction_most_of_it_back(table: pa.Table) -> None:
    rows = _rows(table, "responses", 0.3)
    plug_in = np.array([row["plug_in_mean"] for row in rows])
    corrected = np.array([row["corrected_mean"] for row in rows])
    answer = corrected[-1]
    assert np.all(np.diff(plug_in) < 0)
    assert np.all(plug_in > answer)
    assert np.all(np.abs(corrected - answer) < 0.5 * np.abs(plug_in - answer))
    # What 100 of 150 prompts drawn without replacement scatter is sqrt(1/2) of the standard error of all 150.
    standard_error = np.sqrt(2.0) * _rows(table, "prompts", 0.3)[1]["corrected_sd"]
    assert abs(answer - POPULATION.lam_star) < 4 * standard_error


def test_fewer_prompts_scatter_more(table: pa.Table) -> None:
    fewest, more, _ = _rows(table, "prompts", 0.3)
    assert fewest["plug_in_sd"] > more["plug_in_sd"] > 0


def test_infeasible_subsets_are_counted() -> None:
    problem = _problem(n_prompts=40)
    (block,) = problem.samples.partitions[0].blocks()
    g_pk = block.scores_mn[0].reshape(40, 64)
    # The mean over prompts of the largest of 64 responses: what the samples attain.
    largest = float(np.mean(np.max(g_pk, axis=1) - np.mean(g_pk, axis=1)))
    # Expected largest of 8 standard Gaussians: 1.4236 (David and Nagaraja 2003, Order Statistics, table).
    table = _table(problem, [1.42, largest - 1e-3, largest + 1e-3], n_draws=40)
    shares = {(row["varied"], row["margin"], row["n_responses"]): row for row in table.to_pylist()}
    assert 0.1 < shares["responses", 1.42, 8]["infeasible_share"] < 0.9
    assert shares["responses", 1.42, 8]["plug_in_mean"] > 0
    assert shares["responses", 1.42, 64]["infeasible_share"] == 0
    assert shares["responses", largest - 1e-3, 8]["infeasible_share"] == 1
    assert shares["responses", largest - 1e-3, 8]["plug_in_mean"] is None
    assert shares["responses", largest - 1e-3, 64]["infeasible_share"] == 0
    assert shares["responses", largest + 1e-3, 64]["infeasible_share"] == 1


def test_a_margin_is_over_the_reference_mean_of_the_subset() -> None:
    """An offset of each prompt's scores moves means of subsets of prompts; over their own mean it changes nothing."""
    r_pk, g_pkm = draw_scores(n_prompts=60, n_responses=16, n_constraints=1, seed=1)
    offsets = np.random.default_rng(2).normal(scale=10.0, size=(60, 1, 1))
    plain, moved = (
        _table(DualProblem.from_arrays(r_pk, scores, thresholds=0.0, beta=1.0), [0.3], prompt_sizes=(20,))
        for scores in (g_pkm, g_pkm + offsets)
    )
    for name in ("plug_in_mean", "plug_in_sd", "corrected_mean", "ess_median"):
        for before, after in zip(plain[name].to_pylist(), moved[name].to_pylist(), strict=True):
            assert after == (before if before is None else pytest.approx(before, abs=1e-9))


def test_prompts_may_have_different_numbers_of_responses() -> None:
    rng = np.random.default_rng(0)
    prompt_n = np.repeat(np.arange(50), rng.integers(5, 40, size=50))
    r_n, g_n = rng.normal(size=(2, len(prompt_n)))
    problem = DualProblem.from_rows(prompt_n, r_n, g_n, thresholds=0.0, beta=1.0)
    sizes = [row["n_responses"] for row in _rows(_table(problem, [0.3], n_draws=2), "responses", 0.3)]
    assert sizes == [8, 16, round(float(np.median(np.bincount(prompt_n))))]


@pytest.mark.parametrize(
    ("n_constraints", "margins", "n_draws", "message"),
    [(2, [0.1], 1, "has 2 constraints"), (1, [], 1, "`margins` is"), (1, [0.1], 0, "`n_draws` 0")],
)
def test_bad_input_is_named(n_constraints: int, margins: list[float], n_draws: int, message: str) -> None:
    r_pk, g_pkm = draw_scores(n_prompts=4, n_responses=8, n_constraints=n_constraints, seed=0)
    problem = DualProblem.from_arrays(r_pk, g_pkm, thresholds=np.zeros(n_constraints), beta=1.0)
    with pytest.raises(InputError, match=message):
        _table(problem, margins, n_draws)


def test_the_figure_shows_every_margin_and_the_infeasible_ones_within_its_bounds(table: pa.Table) -> None:
    figure = sample_size_figure(table)
    require_nothing_cut_off(figure)
    (legend,) = figure.legends
    frame = legend.get_window_extent()
    assert not any(frame.overlaps(axes.get_window_extent()) for axes in figure.axes)
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [
        "margin 0.3",
        "margin 2",
        "plug-in (sd)",
        "corrected (sd)",
        "from all samples",
        "some infeasible",
    ]
