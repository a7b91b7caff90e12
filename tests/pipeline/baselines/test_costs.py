"""Wall times and tokens, against manifests and tables by hand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from helpers.written_runs import write_finished, write_samples, written_run

from pipeline.baselines import policies
from pipeline.baselines.costs import _iterates, _token_counts, _trained_share, own_seconds, seconds_to_result
from pipeline.config.loading import load_config
from pipeline.contracts.shards import write_parquet
from pipeline.run.run import Run

ARM = policies.one_shot(0.4)


@pytest.fixture
def base(tmp_path: Path) -> Run:
    run = written_run(tmp_path, load_config(Path("baselines")), name="study/seed0")
    for step, seconds in (("dual", 1.0), ("tilted", 2.0), ("policy", 20.0), ("evaluation", 500.0)):
        write_finished(run.folder / ARM.name / step, step=step, seconds=seconds)
    # Two constraints, hence two rows an iterate: its seconds stand in each, and count once.
    trajectory = pa.table({"iterate": [0, 0, 1, 1, 2, 2], "seconds": [25.0, 25.0, 10.0, 10.0, 12.0, 12.0]})
    write_parquet(run.folder / ARM.name / "multishot" / "trajectory.parquet", trajectory, metadata={})
    return run


def test_one_shot_takes_the_steps_from_the_scores_to_the_policy(base):
    assert own_seconds(base, ARM) == 23.0
    assert seconds_to_result(base, ARM, policies.ONE_SHOT) == 23.0


def test_multi_shot_takes_every_iterate_once(base):
    assert seconds_to_result(base, ARM, policies.MULTI_SHOT) == 47.0


def test_iterates_are_those_of_the_trajectory(base):
    folder = base.folder / ARM.name / "multishot"
    (folder / "7").mkdir()  # of a longer one
    assert _iterates(folder) == [0, 1, 2]


def test_tokens_drawn_are_of_completions_and_tokens_read_of_train_prompts_alone(base):
    lengths = {"train": {"a": [3, 4], "b": [5, 6]}, "test": {"c": [10, 20]}}
    write_samples(base.samples, lengths, prompt_length=7)
    drawn, read = _token_counts(base, base.samples)
    assert drawn == 18 + 30
    assert read == 18 + 4 * 7


def test_held_out_prompts_are_not_trained_on(base):
    counted = {"n_train_prompts": 360, "n_held_out_prompts": 40}
    write_finished(base.policy, step="train", details=counted)
    assert _trained_share(base) == 0.9
