"""The problem of several seeds' responses together, and the last word of each method of a comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.written_runs import write_samples, write_scores, written_run

from pipeline.baselines.dual_experiments import _last_rows, _pooled_problem, _shown
from pipeline.baselines.study import change_config
from pipeline.config.loading import load_config
from pipeline.run.run import Run

REWARD = ({"a": [0.0, 1.0], "b": [2.0, 4.0]}, {"a": [5.0, 6.0], "b": [7.0, 9.0]})
HARMLESS = ({"a": [3.0, 2.0], "b": [1.0, 0.0]}, {"a": [0.5, 0.25], "b": [-1.0, -2.0]})


def _bases(tmp_path: Path, **constraint: object) -> list[Run]:
    config = change_config(load_config(Path("baselines")), {"constraints": {"harmless": constraint}})
    bases = []
    for seed, (reward, harmless) in enumerate(zip(REWARD, HARMLESS, strict=True)):
        base = written_run(tmp_path, config, name=f"seed{seed}")
        write_samples(base.samples, {"train": {prompt: [3, 3] for prompt in reward}}, prompt_length=2)
        write_scores(base.scores / "helpful", {"train": reward})
        write_scores(base.scores / "harmless", {"train": harmless})
        bases.append(base)
    return bases


def test_a_prompt_has_the_responses_of_all_seeds(tmp_path):
    problem = _pooled_problem(_bases(tmp_path, direction=">=", margin=0.5))
    assert (problem.n_prompts, problem.n_samples) == (2, 8)
    prompt_means = [np.mean([*HARMLESS[0][name], *HARMLESS[1][name]]) for name in ("a", "b")]
    assert problem.reference_means_m == pytest.approx([np.mean(prompt_means)])
    # At lambda = 0 the weights are those of the reward alone, within a prompt of four responses.
    tilted = problem.tilted_weights([0.0])
    logits = np.array([[*REWARD[0][name], *REWARD[1][name]] for name in ("a", "b")]) / problem.beta
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.sort(tilted), np.sort(expected.ravel()), rtol=1e-12)
    assert tilted.sum() == pytest.approx(2.0)


def test_an_upper_bound_is_turned(tmp_path):
    below = _pooled_problem(_bases(tmp_path / "below", direction="<=", margin=-0.5))
    above = _pooled_problem(_bases(tmp_path / "above", direction=">=", margin=0.5))
    np.testing.assert_allclose(below.reference_means_m, -above.reference_means_m)


def test_the_last_row_of_each_method_is_that_of_its_last_evaluation():
    rows = [("newton", 1, 0.5), ("step 1", 3, 0.2), ("newton", 2, 0.1), ("step 1", 1, 0.9)]
    table = pa.table({name: [row[k] for row in rows] for k, name in enumerate(("method", "evaluation", "gap"))})
    assert {row["method"]: row["gap"] for row in _last_rows(table)} == {"newton": 0.1, "step 1": 0.2}


def test_a_multiplier_that_does_not_exist_is_said_so():
    assert (_shown(None), _shown(0.12345)) == ("none", "0.123")
