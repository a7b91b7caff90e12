"""Several processes take the steps of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from pipeline.cli import main
from pipeline.config.loading import RECIPES
from pipeline.contracts.artifacts import read_manifest
from stage2_policy.settings import TrainSettings
from stage2_policy.trainer import train_policy

pytestmark = pytest.mark.slow

_TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

_PATH = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])

_RUN = """
import json, sys, torch
from pathlib import Path
from stage2_policy.settings import TrainSettings
from stage2_policy.trainer import train_policy
torch.set_num_threads(1)
folders, output, settings = json.loads(sys.argv[1])
train_policy(
    **{name: Path(path) for name, path in folders.items()},
    output=Path(output), settings=TrainSettings(**settings), seed=1, show_progress=False,
    reference_logp=Path(output) / "reference_logp",
)
"""

_SHARDED = """
import os, sys, torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from stage2_policy import logprobs
torch.set_num_threads(1)
distributed.init_process_group("gloo")
logprobs.LOGITS_AT_ONCE = 3 * 320  # three chunks; of a trained head computed anew in the backward pass
sequences = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 12, 13]), ([11], [12, 13, 14])]
batch = logprobs.build_batch(sequences, share_prompts=False)
plain, sharded = (AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32) for _ in range(2))
for model in (plain, sharded):
    model.get_output_embeddings().requires_grad_(sys.argv[2] == "trained")
sharded.gradient_checkpointing_enable({"use_reentrant": False})
sharded.train()
for module in (*sharded.model.layers, sharded):
    fully_shard(module, reshard_after_forward=True)
values = []
for model in (plain, sharded):
    values.append(logprobs.sequence_logp(model, batch))
    values[-1].sum().backward()
torch.testing.assert_close(values[1], values[0])
for whole, part in zip(plain.parameters(), sharded.parameters(), strict=True):
    if not whole.requires_grad:
        assert sys.argv[2] == "fixed" and whole.grad is None and part.grad is None
        continue
    assert isinstance(part.grad, DTensor)
    torch.testing.assert_close(part.grad.full_tensor(), whole.grad)
distributed.barrier()
distributed.destroy_process_group()
# A thread of the communication may still run: the interpreter would end it with an abort, all being done.
os._exit(0)
"""

SETTINGS = {
    "learning_rate": 1e-3,
    "epochs": 4,
    "tokens_per_step": 300,
    "tokens_per_microbatch": 120,
    "responses_per_group": 2,
    "held_out_fraction": 0.25,
    "evaluations": 3,
}


def train_alone(stage_one: Any, output: Path, settings: dict[str, Any]) -> None:
    """Train in this process."""
    train_policy(
        **vars(stage_one),
        output=output,
        settings=TrainSettings(**settings),
        seed=1,
        show_progress=False,
        reference_logp=output / "reference_logp",
    )


def train_together(
    stage_one: Any,
    output: Path,
    settings: dict[str, Any],
    *,
    launcher: Sequence[str] = _TWO_PROCESSES,
    **environment: str,
) -> None:
    """Train on two processes."""
    script = output.parent / "run.py"
    script.write_text(_RUN)
    folders = {name: str(path) for name, path in vars(stage_one).items()}
    subprocess.run(
        [*launcher, str(script), json.dumps([folders, str(output), settings])],
        check=True,
        capture_output=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": _PATH, "OMP_NUM_THREADS": "1", **environment},
    )


def curve(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "training_log.json").read_text())
    timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [entry for entry in log if not any(name in entry for name in timings)]


@pytest.mark.parametrize("change", [{}, {"adapter": "lora", "gradient_checkpointing": True}], ids=["full", "lora"])
def test_two_processes_have_the_loss_curve_of_one(change: dict[str, Any], stage_one: Any, tmp_path: Path) -> None:
    train_alone(stage_one, tmp_path / "1", {**SETTINGS, **change})
    train_together(stage_one, tmp_path / "2", {**SETTINGS, **change})
    require_same_training(tmp_path / "1", tmp_path / "2")


def test_two_processes_of_zero3_have_the_loss_curve_of_one(stage_one: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="a GPU machine's package, not in the locks; runs where it is installed")
    train_alone(stage_one, tmp_path / "1", SETTINGS)
    config = yaml.safe_load((RECIPES / "accelerate_configs" / "zero3.yaml").read_text())
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump({**config, "num_processes": 2, "use_cpu": True}))
    train_together(
        stage_one,
        tmp_path / "2",
        SETTINGS,
        launcher=[sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "zero3.yaml")],
        DS_ACCELERATOR="cpu",
    )
    require_same_training(tmp_path / "1", tmp_path / "2")


def require_same_training(alone: Path, together: Path) -> None:
    """The same curve, weights and files."""
    one, two = curve(alone), curve(together)
    assert len(one) > 6
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for entry, other in zip(one, two, strict=True):
        assert other == pytest.approx(entry, rel=2e-4, abs=2e-5)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (alone, together)]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-3
    assert sorted(path.name for path in alone.iterdir()) == sorted(path.name for path in together.iterdir())


@pytest.mark.parametrize("head", ["trained", "fixed"])
def test_sharded_weights_give_the_same_log_probabilities_and_gradients(
    head: str, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(_SHARDED)
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*_TWO_PROCESSES, str(tmp_path / "run.py"), str(reference), head],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]


_TWO_CPU_PROCESSES = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
main_training_function: main
mixed_precision: "no"
num_machines: 1
num_processes: 2
machine_rank: 0
rdzv_backend: static
same_network: true
use_cpu: true
"""


def test_the_command_trains_on_several_processes(
    stage_one_run: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe, data_dir = stage_one_run
    run = data_dir / "runs" / "test"
    processes = tmp_path / "processes.yaml"
    processes.write_text(_TWO_CPU_PROCESSES)
    for name, value in (("PYTHONPATH", "."), ("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    arguments = ["train", "--config", str(recipe), "--data-dir", str(data_dir), "--no-progress"]

    # So few responses teach it nothing, and the exit of the launched processes is not the launcher's traceback.
    assert main([*arguments, "--accelerate-config", str(processes)]) == 6
    assert "DID NOT PAY: no checkpoint beat the reference on 2 held-out prompts" in capfd.readouterr().err
    manifest = read_manifest(run / "policy")
    assert manifest.details["verdict"]["verdict"] == "did not pay"
    assert "> **Before use:** training DID NOT PAY" in (run / "policy" / "README.md").read_text()
    assert manifest.details["n_responses"] == manifest.counts["responses"] > 40
    AutoModelForCausalLM.from_pretrained(run / "policy")
    # In one process the step is recognised as done: how it was computed is not among its settings.
    assert main(arguments) == 6
    assert read_manifest(run / "policy") == manifest
