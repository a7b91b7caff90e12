"""The examples run as they are shipped: one on a table with the core alone, one on models of one's own."""

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
