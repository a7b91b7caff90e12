"""What a policy came to, against tables by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.solutions import bound, build_solution
from helpers.written_runs import Values, write_scores, written_run
from scipy.stats import t as student

from pipeline.baselines.outcomes import Outcome, read_outcome
from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import write_json

REFERENCE = {"a": [0.0, 2.0], "b": [1.0, 1.0], "c": [3.0, 5.0]}
POLICY = {"a": [2.0, 4.0], "b": [1.0, 2.0], "c": [5.0, 6.0]}


def _outcome(tmp_path: Path, reference: Values, policy: Values) -> Outcome:
    config = load_config(Path("baselines"))
    base, run = (written_run(tmp_path, config, name=name) for name in ("base", "base/arm"))
    train = {"z": [100.0]}  # no part of what the test prompts show
    write_scores(base.folder / "scores" / "harmless", {"train": train, "test": reference})
    write_scores(run.folder / "evaluation" / "scores" / "harmless", {"test": policy})
    return Outcome(run=run, base=base, solution=build_solution(bound()), dual={}, evaluation={})


def test_an_improvement_is_paired_by_prompt(tmp_path):
    found = _outcome(tmp_path, REFERENCE, POLICY).score("harmless")
    gains = np.array([2.0, 0.5, 1.5])
    assert found.reference == pytest.approx(2.0)
    assert found.improvement == pytest.approx(gains.mean())
    np.testing.assert_allclose(found.ci95, student.interval(0.95, 2, gains.mean(), gains.std(ddof=1) / np.sqrt(3)))
    assert found.sd == pytest.approx(np.std([0, 2, 1, 1, 3, 5], ddof=1))


def test_prompts_weigh_the_same_whatever_their_responses(tmp_path):
    uneven = {"a": [0.0, 2.0, 0.0, 2.0, 0.0, 2.0], "b": [1.0], "c": [4.0]}
    found = _outcome(tmp_path, uneven, POLICY).score("harmless")
    assert found.reference == pytest.approx(2.0)
    assert found.improvement == pytest.approx(4 / 3)


def test_a_shift_of_the_policy_is_its_improvement_and_has_no_width(tmp_path):
    shifted = {prompt: [value + 0.25 for value in values] for prompt, values in REFERENCE.items()}
    found = _outcome(tmp_path, REFERENCE, shifted).score("harmless")
    np.testing.assert_allclose([found.improvement, *found.ci95], 0.25, atol=1e-15)


def test_prompts_that_only_one_policy_has_are_left_out_of_the_improvement(tmp_path):
    found = _outcome(tmp_path, {**REFERENCE, "d": [50.0]}, {**POLICY, "e": [-50.0]}).score("harmless")
    assert found.improvement == pytest.approx(4 / 3)


def test_what_the_samples_understate_is_what_the_dual_corrects(tmp_path):
    outcome = _outcome(tmp_path, REFERENCE, POLICY)
    solved = [
        {"name": "harmless", "predicted": 0.75, "predicted_corrected": 0.8},
        {"name": "humour", "predicted": 0.5, "predicted_corrected": None},
    ]
    found = replace(outcome, dual={"constraints": solved})
    assert found.understated("harmless") == pytest.approx(0.05)
    assert found.understated("humour") == 0.0


def test_an_outcome_is_read_from_the_folders_of_its_run(tmp_path):
    config = load_config(Path("baselines"))
    base, run = (written_run(tmp_path, config, name=name) for name in ("base", "base/arm"))
    solution = build_solution(bound("harmless", multiplier=0.7), bound("humour", multiplier=0.0))
    document = {"status": "certified", **solution.to_document()}
    write_json(run.folder / "dual" / "dual.json", document)
    write_json(run.folder / "evaluation" / "evaluation.json", {"status": "satisfied"})
    outcome = read_outcome(base, run)
    assert outcome.multipliers == {"harmless": 0.7, "humour": 0.0}
    assert outcome.solution == solution
    assert outcome.evaluation == {"status": "satisfied"}
