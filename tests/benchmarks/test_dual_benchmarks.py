"""The benchmarks of the dual run, and what they compare agrees: at sizes of a few seconds, never on their timings."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stage1_dual.dual import DualProblem, solve_dual

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def population_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gaussian_population")


def run_benchmark(name: str, output: Path, *arguments: str) -> tuple[object, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"benchmarks/{name}.py", *arguments, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8")), done.stdout


@pytest.mark.parametrize(("n_constraints", "spread"), [(1, 0.0), (1, 0.5), (3, 0.5)])
def test_closed_form_is_the_limit_of_samples(population_module: ModuleType, n_constraints: int, spread: float) -> None:
    population = population_module.GaussianPopulation(beta=3.0, n_constraints=n_constraints, spread=spread, scale=1.5)
    r_pk, g_pkm = population.draw(np.random.default_rng(5), n_prompts=400, n_responses=1500)
    # Prompt means are taken out, so that 400 prompts are enough; what is left of them moves neither lam nor KL.
    centred_pkm = g_pkm - np.mean(g_pkm, axis=1, keepdims=True)
    problem = DualProblem.from_arrays(
        r_pk - np.mean(r_pk, axis=1, keepdims=True), centred_pkm, thresholds=population.margins_m, beta=3.0
    )
    solution = solve_dual(problem)
    lam_star_m = population.lam_star
    np.testing.assert_allclose(solution.multipliers, lam_star_m, rtol=0.06)
    assert solution.predicted_kl == pytest.approx(population.kl(lam_star_m), rel=0.06)
    assert solution.predicted_reward == pytest.approx(population.reward(lam_star_m), rel=0.06, abs=0.02)
    np.testing.assert_allclose(population.scores(lam_star_m), population.margins_m, atol=1e-12)


def test_solvers_agree(tmp_path: Path) -> None:
    names = [
        "ours",
        "projected gradient, step beta/G^2",
        "projected gradient, best constant step",
        "L-BFGS-B, tight",
        "cvxpy, Clarabel",
    ]
    report, table = run_benchmark(
        "dual_solvers", tmp_path / "rows.json", "--sizes", "60x16x2", "--limit", "30", "--contestants", *names
    )
    assert isinstance(report, dict)
    assert [row["contestant"] for row in report["rows"]] == names
    for row in report["rows"]:
        assert row["cut_short"] == ""
        assert row["gap"] <= 1e-6, row
        assert row["distance 1e-9"] is not None, row  # which is less than a gap of as much: quadratic in the error
        assert row["lam_error"] <= 1e-4, row
    ours = report["rows"][0]
    assert ours["gap"] <= 1e-9
    assert ours["gap 1e-6"] == ours["gap 1e-9"] == ours["KKT 1e-8"]
    assert all(name in table for name in names)


def test_a_contestant_that_takes_too_long_is_stopped_and_named(tmp_path: Path) -> None:
    report, table = run_benchmark(
        "dual_solvers",
        tmp_path / "rows.json",
        *("--sizes", "60x16x1h", "--limit", "1e-6", "--contestants", "ours", "projected gradient, step beta/G^2"),
    )
    assert isinstance(report, dict)
    ours, slow = report["rows"]
    assert ours["KKT 1e-8"] is not None
    assert slow["KKT 1e-8"] is None
    assert slow["tries"][0]["note"] == "over 1e-06 s"
    assert "over 1e-06 s" in table


def test_intervals_cover_where_responses_are_ample(tmp_path: Path) -> None:
    arguments = ["--datasets", "60", "--prompts", "80", "--responses", "256", "--replicates", "200"]
    rows, table = run_benchmark("coverage", tmp_path / "rows.json", *arguments, "--scenarios", "0", "3")
    assert isinstance(rows, list)
    coverage = {(row["scenario"], row["quantity"]): row["coverage"] for row in rows}
    assert len(coverage) == 24
    assert coverage["absolute threshold", "lam, bootstrap"] >= 0.85
    assert coverage["margin, stronger tilt", "lam, sandwich"] >= 0.85
    # The optimum's constraint would have no width; the policy's must not be so narrow.
    assert coverage["absolute threshold", "policy constraint"] >= 0.85
    assert table.count("\n| ") == 25


def test_the_half_sample_jackknife_halves_the_bias(tmp_path: Path) -> None:
    arguments = ["--datasets", "10", "--prompts", "400", "--responses", "32", "--betas", "1"]
    rows, _ = run_benchmark("finite_response_bias", tmp_path / "rows.json", *arguments)
    assert isinstance(rows, list)
    figures = {row["estimator"]: row for row in rows}
    plug_in = figures["plug-in"]
    assert plug_in["bias"] > 5 * plug_in["bias_error"]
    assert abs(figures["half-sample jackknife"]["bias"]) <= 0.5 * plug_in["bias"]
    assert figures["half-sample jackknife"]["rmse"] <= 0.5 * plug_in["rmse"]
    assert figures["response ladder"]["failures"] == 0
    assert figures["response ladder"]["rmse_ratio"] <= 0.5


def test_the_ladder_gives_no_correction_near_what_half_the_responses_reach(tmp_path: Path) -> None:
    arguments = ["--datasets", "6", "--responses", "8", "--betas", "1", "--margins", "0.7"]
    rows, _ = run_benchmark("finite_response_bias", tmp_path / "rows.json", *arguments)
    assert isinstance(rows, list)
    failures = {row["estimator"]: row["failures"] for row in rows}
    assert failures["half-sample jackknife"] == 0
    assert failures["response ladder"] == 6
