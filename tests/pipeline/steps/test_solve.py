"""The problem that a run's artifacts state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.written_runs import write_samples, write_scores, written_run

from pipeline.config.loading import load_config
from pipeline.run.run import Run
from pipeline.steps.solve import reference_problem

REWARD = {"train": {"a": [0.0, 1.0], "b": [2.0, 4.0]}, "test": {"c": [5.0, 7.0]}}
HARMLESS = {"train": {"a": [3.0, 2.0], "b": [1.0, 0.0]}, "test": {"c": [10.0, 20.0]}}


def _run(tmp_path: Path, **settings: str) -> Run:
    overrides = {"beta": "0.5", **{name.replace("__", "."): value for name, value in settings.items()}}
    run = written_run(tmp_path, load_config(Path("embedded"), overrides))
    lengths = {split: {prompt: [1] * len(values) for prompt, values in rows.items()} for split, rows in REWARD.items()}
    write_samples(run.samples, lengths, prompt_length=2, cut_off={("a", 0)})
    write_scores(run.scores / "helpful", REWARD)
    write_scores(run.scores / "harmless", HARMLESS)
    return run


def test_a_problem_is_of_the_prompts_of_its_split_at_the_recipes_beta(tmp_path):
    run = _run(tmp_path, constraints__harmless__margin="0.25")
    train, test = (reference_problem(run, split) for split in ("train", "test"))
    assert (train.n_prompts, train.n_samples, test.n_prompts, test.n_samples) == (2, 4, 1, 2)
    assert train.beta == test.beta == 0.5
    np.testing.assert_allclose(train.reference_reward, 7 / 4)
    # A margin is over the reference mean of the same rows.
    np.testing.assert_allclose(train.reference_means_m, [1.5])
    np.testing.assert_allclose(train.thresholds_m, [1.75])
    np.testing.assert_allclose(test.thresholds_m, [15.25])


def test_demands_are_without_safeguards(tmp_path):
    safeguarded = _run(tmp_path, constraints__harmless__margin="0.25", constraints__harmless__reserve="0.5")
    np.testing.assert_allclose(reference_problem(safeguarded, "train").thresholds_m, [1.75])


def test_an_upper_bound_is_turned(tmp_path):
    run = _run(tmp_path, constraints="{harmless: {direction: '<=', threshold: 1.0}}")
    problem = reference_problem(run, "train")
    np.testing.assert_allclose(problem.reference_means_m, [-1.5])
    np.testing.assert_allclose(problem.thresholds_m, [-1.0])


@pytest.mark.parametrize(("rule", "mean"), [("keep", 1.5), ("flag", 1.5), ("drop", (2.0 + 0.5) / 2)])
def test_a_response_that_was_cut_off_takes_part_unless_it_is_dropped(tmp_path, rule, mean):
    problem = reference_problem(_run(tmp_path, solve__on_length=rule), "train")
    np.testing.assert_allclose(problem.reference_means_m, [mean])
