"""The dual that is normalised over all prompts: what it solves, and what a policy gets of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.written_runs import write_samples, write_scores, written_run

from pipeline.baselines.global_normalisation import gain, over_all_prompts
from pipeline.baselines.study import change_config
from pipeline.config.loading import load_config
from pipeline.run.run import Run
from pipeline.scoring.joined import reference_scores
from pipeline.steps.solve import reference_problem
from stage1_dual.dual import solve_dual


def _base(tmp_path: Path, shift: float) -> Run:
    """Prompts whose responses differ by a shift of the constraint's score alone."""
    rng = np.random.default_rng(0)
    reward, harmless = rng.normal(size=(2, 200))
    config = change_config(
        load_config(Path("baselines")), {"constraints": {"harmless": {"direction": ">=", "margin": 0.5}}}
    )
    base = written_run(tmp_path, config, name="base")
    write_samples(base.samples, {"train": {prompt: [3] * 200 for prompt in "ab"}}, prompt_length=2)
    write_scores(base.scores / "helpful", {"train": {prompt: list(reward) for prompt in "ab"}})
    shifted = {"a": list(harmless), "b": list(harmless + shift)}
    write_scores(base.scores / "harmless", {"train": shifted})
    return base


def test_prompts_that_are_alike_have_the_same_multiplier_either_way(tmp_path: Path) -> None:
    base = _base(tmp_path, 0.0)
    problem = reference_problem(base, "train")
    whole = over_all_prompts(reference_scores(base, "train"), problem)
    assert solve_dual(whole).multipliers == pytest.approx(solve_dual(problem).multipliers, abs=1e-9)


def test_it_meets_the_demand_by_weighing_prompts_which_no_policy_can(tmp_path: Path) -> None:
    base = _base(tmp_path, 2.0)
    problem = reference_problem(base, "train")
    rows = reference_scores(base, "train")
    whole = over_all_prompts(rows, problem)
    multipliers = solve_dual(whole).multipliers
    # Over responses and prompts together the demand is met; within prompts, as a policy answers, it is not.
    joint = np.exp(rows.reward_n + multipliers[0] * rows.scores_ns[:, 0])
    joint /= joint.sum()
    assert joint @ rows.scores_ns[:, 0] == pytest.approx(problem.thresholds_m[0], abs=1e-7)
    assert gain(problem, solve_dual(problem).multipliers) == pytest.approx(0.5, abs=1e-7)
    assert 0 < gain(problem, multipliers) < 0.45
