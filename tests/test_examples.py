"""The examples run as they are shipped: one on a table with the core alone, one on models of one's own, two jobs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from helpers.tiny_models import save_tiny_classifier, save_tiny_policy

from pipeline.commands.parsers import parser_for
from pipeline.config.loading import load_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DID_NOT_PAY = 6


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


_CORE_ALONE = """
import importlib.abc, runpy, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "vllm", "pandas", "datasets", "ray"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_a_table_gives_its_multiplier_and_its_price_list_by_the_core_alone(tmp_path: Path) -> None:
    done = _run("-c", _CORE_ALONE, ROOT / "examples" / "scores.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Trust in lambda*: OK" in done.stdout
    assert "Frontier: " in done.stdout
    assert "beta 0.1: unreliable" in done.stdout
    assert "harmless >= ref + 50: the thresholds cannot be met on these samples" in done.stdout
    dual = json.loads((tmp_path / "out" / "dual.json").read_text())
    assert dual["constraints"][0]["multiplier"] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"dual.json", "frontier.parquet", "weights.parquet"}


def test_the_shipped_table_is_what_its_readme_says() -> None:
    table = pyarrow.csv.read_csv(ROOT / "examples" / "scores.csv").to_pandas()
    assert list(table.columns[:4]) == ["prompt_id", "sample_index", "split", "category"]
    assert table.groupby("prompt_id").size().eq(32).all()
    assert table.drop_duplicates("prompt_id").groupby("split").size().to_dict() == {"test": 40, "train": 120}


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The example of one's own models, on random checkpoints of a few thousand weights."""
    folder = tmp_path_factory.mktemp("own")
    save_tiny_policy(folder / "policy", eos_logit=24.0)
    for seed, name in enumerate(("helpful", "harmless")):
        save_tiny_classifier(folder / name, seed=seed)
    settings = {
        "--data-dir": folder / "data",
        "--limit": "12",
        "--reference.model": folder / "policy",
        "--scorers.helpful.model": folder / "helpful",
        "--scorers.harmless.model": folder / "harmless",
        "--sampling.samples_per_prompt": "6",
        "--sampling.max_new_tokens": "12",
        "--constraints.harmless.margin": "0.05",
        "--solve.bootstrap_replicates": "100",
        "--solve.frontier_points": "3",
        "--training.epochs": "1",
        "--training.evaluations": "1",
        "--evaluation.samples_per_prompt": "4",
        "--evaluation.bootstrap_replicates": "100",
    }
    arguments = [str(text) for pair in settings.items() for text in pair]
    return _run(ROOT / "examples" / "own_models.py", *arguments), folder / "data" / "runs" / "own-models"


def test_ones_own_models_go_all_the_way(own_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, run = own_run
    assert done.returncode in (0, DID_NOT_PAY), done.stderr  # of random weights, training may have nothing to learn
    assert "closed fraction: " in done.stdout
    assert (run / "report" / "report.html").is_file()
    words = pq.read_table(run / "scores" / "words" / "data").to_pylist()
    samples = pq.read_table(run / "samples" / "data").to_pylist()
    counted = {(row["prompt_id"], row["sample_index"]): len(row["completion"].split()) for row in samples}
    assert {(row["prompt_id"], row["sample_index"]): row["value"] for row in words} == counted


def test_every_key_of_evaluation_json_is_described(own_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, run = own_run
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    text = (ROOT / "docs" / "artifacts.md").read_text()
    described = text.split("## `evaluation.json`")[1]
    keys = set(evaluation) | {key for part in ("reward", "kl", "lagrangian") for key in evaluation[part]}
    keys |= set(evaluation["constraints"][0])
    assert {key for key in keys if not re.search(rf"\b{key}\b", described)} == set()


_STANDS_IN = {
    "bin/srun": 'while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; exec "$@"',
    "bin/scontrol": "printf 'one\\ntwo\\n'",
    ".venv/bin/dualign": 'printf "%s\\0" "$@" >> dualign.log; echo >> dualign.log',
    ".venv/bin/ray": 'echo "$@" >> ray.log',
}
"""Programs of a cluster that is not there: what would be run is written down."""


@pytest.mark.parametrize("job", ["one-node", "several-nodes"])
def test_the_commands_of_a_slurm_job_are_understood(job: str, tmp_path: Path) -> None:
    for name, text in _STANDS_IN.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    script = ROOT / "examples" / "slurm" / f"{job}.sbatch"
    command = ["bash", str(script), "embedded", "mine"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "dualign.log").read_text().splitlines()
    commands = [line.rstrip("\0").split("\0") for line in lines]
    assert [words[0] for words in commands] == (["stage1", "train", "stage2"] if job == "one-node" else ["stage1"])
    for words in commands:
        _, settings = parser_for(words).parse_known_args(words)
        names = dict(zip(settings[::2], settings[1::2], strict=True))
        config = load_config(Path("embedded"), {name.removeprefix("--"): value for name, value in names.items()})
        assert config.execution.max_actors == (1 if not names else 8 if job == "one-node" else 16)
    if job == "several-nodes":
        assert sum("start" in line for line in (tmp_path / "ray.log").read_text().splitlines()) == 2
