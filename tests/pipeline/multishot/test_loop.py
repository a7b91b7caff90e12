"""The iterative baseline on whole tiny runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.tiny_models import save_tiny_classifier
from helpers.tiny_runs import dualign, run_folder, write_recipe
from safetensors.numpy import load_file

from pipeline.contracts.artifacts import checkpoint_sha256, file_sha256, read_json, read_manifest
from pipeline.multishot.loop import Iterate, choose_iterate
from pipeline.multishot.rules import Measured
from pipeline.steps.validate import validate_run

pytestmark = pytest.mark.slow

_QUICK = {
    "training": {"epochs": 1, "tokens_per_step": 1024, "evaluations": 1, "learning_rate": 1e-3},
    "evaluation": {"samples_per_prompt": 4, "bootstrap_replicates": 100},
    "multishot": {"iterations": 3, "samples_per_prompt": 4},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("multishot"), **_QUICK)
    assert dualign("multishot", recipe) == 0
    return recipe


def test_each_iterate_is_trained_at_the_lambda_of_its_step(finished: Path) -> None:
    run = run_folder(finished)
    rows = pq.read_table(run / "multishot" / "trajectory.parquet").to_pylist()
    assert [row["iterate"] for row in rows] == [0, 1, 2]
    assert sum(row["kept"] for row in rows) == 1
    for row in rows:
        folder = run if row["iterate"] == 0 else run / "multishot" / str(row["iterate"])
        measured = folder / ("multishot/0" if row["iterate"] == 0 else "measured")
        found = read_json(measured / "measured.json")["constraints"][0]
        assert row["multiplier"] == read_json(folder / "dual" / "dual.json")["constraints"][0]["multiplier"]
        assert row["slack"] == found["slack"]
        # The demand is the run's own, whatever the dual of the iterate was asked for.
        assert found["margin"] == pytest.approx(0.05)
        assert row["slack_ci95_low"] <= row["slack"] <= row["slack_ci95_high"]
    slack, multiplier = ([row[name] for row in rows] for name in ("slack", "multiplier"))
    assert (multiplier[1] - multiplier[0]) * slack[0] <= 0, "lambda falls where there is slack, and rises where not"


def test_training_goes_on_from_the_policy_before(finished: Path) -> None:
    run = run_folder(finished)
    for number, before in ((1, run), (2, run / "multishot" / "1")):
        manifest = read_manifest(run / "multishot" / str(number) / "policy")
        assert manifest.inputs["initial"] == checkpoint_sha256(before / "policy")
        assert manifest.inputs["samples"] == read_manifest(run / "policy").inputs["samples"]


def test_a_second_call_keeps_everything_and_a_third_goes_further(finished: Path) -> None:
    run = run_folder(finished)
    policies = [run / "multishot" / str(number) / "policy" / "model.safetensors" for number in (1, 2)]
    before = [(path.stat().st_mtime_ns, file_sha256(path)) for path in policies]
    assert dualign("multishot", finished) == 0
    assert dualign("multishot", finished, "--multishot.iterations", "4") == 0
    assert [(path.stat().st_mtime_ns, file_sha256(path)) for path in policies] == before
    assert pq.read_table(run / "multishot" / "trajectory.parquet").num_rows == 4


def test_another_rule_is_refused_until_the_iterates_are_redone(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--multishot.rule", "gradient", "--multishot.step_size", "0.5", "--multishot.iterations", "2")
    assert dualign("multishot", finished, *change) == 2
    assert "rule" in capsys.readouterr().err
    assert dualign("multishot", finished, *change, "--redo") == 0
    rows = pq.read_table(run_folder(finished) / "multishot" / "trajectory.parquet").to_pylist()
    expected = max(0.0, rows[0]["multiplier"] - 0.5 * rows[0]["slack"])
    assert rows[1]["multiplier"] == pytest.approx(expected, abs=1e-6)


def test_a_gradient_without_a_step_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert dualign("multishot", recipe, "--multishot.rule", "gradient") == 2
    assert "`gradient` needs one" in capsys.readouterr().err


def test_what_cannot_be_iterated_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, training={"optimizer": "natural_gradient", "adapter": "lora"})
    assert dualign("multishot", recipe) == 2
    assert (
        "`training.optimizer` is natural_gradient, which takes one step from the reference" in capsys.readouterr().err
    )
    assert not (tmp_path / "data").exists()


def test_an_adapter_is_trained_on_by_every_iterate(tmp_path: Path) -> None:
    training = {**_QUICK["training"], "adapter": "lora", "lora_r": 2, "lora_alpha": 4}
    recipe = write_recipe(tmp_path, **{**_QUICK, "training": training})
    # So slow that the second iterate is where the first was, and far from the reference.
    assert dualign("multishot", recipe, "--multishot.iterations", "2", "--multishot.learning_rate", "1e-9") == 0
    run = run_folder(recipe)
    first, second = (load_file(folder / "policy/adapter/adapter_model.safetensors") for folder in _iterates(run, 2))
    moved = max(np.abs(weight).max() for name, weight in first.items() if "lora_B" in name)
    assert moved > 1e-4
    for name, weight in first.items():
        np.testing.assert_allclose(second[name], weight, atol=1e-6)


def test_a_killed_call_goes_on_to_the_same_trajectory(tmp_path: Path) -> None:
    whole, killed = (write_recipe(_made(tmp_path / name), **_QUICK) for name in ("whole", "killed"))
    assert subprocess.run(_command(whole)).returncode == 0

    begun = run_folder(killed) / "multishot" / "1" / "policy" / "checkpoints"
    with subprocess.Popen(_command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not begun.exists():
            assert process.poll() is None, "the call ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (run_folder(killed) / "multishot" / "trajectory.parquet").exists()

    first = file_sha256(run_folder(killed) / "policy" / "model.safetensors")
    assert subprocess.run(_command(killed)).returncode == 0
    assert file_sha256(run_folder(killed) / "policy" / "model.safetensors") == first
    ours, theirs = (
        pq.read_table(run_folder(recipe) / "multishot" / "trajectory.parquet").drop_columns("seconds").to_pylist()
        for recipe in (killed, whole)
    )
    # Of float32 log-probabilities, whose last bits were seen to differ in one of ten calls on a busy machine.
    kl, expected_kl = ([row.pop("kl") for row in rows] for rows in (ours, theirs))
    assert kl == pytest.approx(expected_kl, rel=1e-5)
    assert ours == theirs


def _command(recipe: Path) -> list[str]:
    """Two iterates in a process of their own, as a user has them."""
    return [
        *(sys.executable, "-m", "pipeline", "multishot", "--config", str(recipe), "--run", "tiny"),
        *("--data-dir", str(recipe.parent / "data"), "--no-progress"),
        *("--multishot.iterations", "2", "--multishot.epochs", "4"),
    ]


def test_two_constraints_from_both_sides(tmp_path: Path) -> None:
    save_tiny_classifier(tmp_path / "length", seed=11)
    recipe = write_recipe(
        tmp_path,
        **_QUICK,
        scorers={name: {"model": str(tmp_path / name)} for name in ("helpful", "harmless", "length")},
        constraints={
            "harmless": {"direction": ">=", "margin": 0.05},
            "length": {"direction": "<=", "margin": -0.05},
        },
    )
    assert dualign("multishot", recipe, "--multishot.iterations", "2") == 0
    run = run_folder(recipe)
    rows = pq.read_table(run / "multishot" / "trajectory.parquet").to_pylist()
    assert [(row["iterate"], row["constraint"]) for row in rows] == [
        (0, "harmless"),
        (0, "length"),
        (1, "harmless"),
        (1, "length"),
    ]
    for row in rows:
        folder = run / "multishot" / ("0" if row["iterate"] == 0 else "1/measured")
        bound = next(b for b in read_json(folder / "measured.json")["constraints"] if b["name"] == row["constraint"])
        sign = 1.0 if bound["direction"] == ">=" else -1.0
        assert row["slack"] == pytest.approx(sign * (bound["realised"] - bound["threshold"]), abs=1e-12)
        assert row["slack_ci95_low"] <= row["slack"] <= row["slack_ci95_high"]
    # Where the second dual was asked for other thresholds, its solution is the lambda that was wanted.
    asked = read_json(run / "multishot" / "1" / "dual" / "dual.json")["constraints"]
    assert [entry["multiplier"] for entry in asked] == [row["multiplier"] for row in rows[2:]]
    moves = [after["multiplier"] - before["multiplier"] for before, after in zip(rows[:2], rows[2:], strict=True)]
    assert max(map(abs, moves)) > 1e-6


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_damaged_trajectory_is_found(finished: Path) -> None:
    run = run_folder(finished)
    path = run / "multishot" / "trajectory.parquet"
    assert not validate_run(run).faults
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert any("trajectory.parquet is not the file" in fault for fault in validate_run(run).faults)
    path.write_bytes(content)


def _iterates(run: Path, count: int) -> list[Path]:
    return [run, *(run / "multishot" / str(number) for number in range(1, count))]


@pytest.mark.parametrize(
    ("slacks", "rewards", "best"),
    [
        ([-0.5, -0.05, 0.4], [2.0, 1.0, 0.5], 1),  # met within its error, and the better reward
        ([-0.5, -0.3, -0.4], [2.0, 1.0, 0.5], 1),  # none is met: the least missed
        ([0.1, 0.2, 0.3], [1.0, 1.2, 1.1], 1),
    ],
)
def test_the_iterate_that_is_kept(slacks: list[float], rewards: list[float], best: int) -> None:
    iterates = [
        Iterate(
            run=None,  # type: ignore[arg-type]  # not read
            names=("harmless",),
            measured=Measured(np.array([0.5]), np.array([slack])),
            slack=np.array([slack]),
            slack_ci95=np.array([[slack - 0.1, slack + 0.1]]),
            reward=reward,
            kl=0.5,
            seconds=1.0,
        )
        for slack, reward in zip(slacks, rewards, strict=True)
    ]
    assert choose_iterate(iterates) == best
