"""`dualign.load_run`: the results of a run, each read when it is asked for, none taken on trust."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import dualign
from pipeline.contracts.artifacts import Manifest, file_sha256, write_json, write_manifest
from pipeline.contracts.shards import write_table
from pipeline.contracts.tables import tilted_schema

pytestmark = pytest.mark.slow


def finish(folder: Path, step: str, files: dict[str, str]) -> None:
    write_manifest(folder, Manifest(step=step, run="mine", settings={}, inputs={}, files=files))


def write_tilted(run: Path) -> None:
    rows = [
        {
            "prompt_id": name,
            "sample_index": index,
            "prompt": [{"role": "user", "content": "?"}],
            "completion": f"answer {index}",
            "reward": 1.0,
            "constraint_harmless": 0.5,
            "weight": 0.5,
            "split": split,
            "category": "",
        }
        for name, split in (("a", "test"), ("b", "train"))
        for index in range(2)
    ]
    table = pa.Table.from_pylist(rows, schema=tilted_schema(["harmless"]))
    finish(run / "tilted", "export", write_table(run / "tilted", table, metadata={"run": "mine"}))


def write_evaluation(run: Path) -> None:
    dual = json.loads((run / "dual" / "dual.json").read_text())
    bound, reward = dual["constraints"][0], dual["reward"]
    realised = {"predicted": bound["predicted"], "realised": 0.31, "ci95": [0.3, 0.32], "slack": 0.01}
    evaluation = {
        "status": "satisfied",
        "n_prompts": 7,
        "n_samples": 70,
        "reward": {"reference": reward["reference"], "predicted": 0.4, "realised": 0.3, "ci95": [0.2, 0.4]},
        "constraints": [
            {key: bound[key] for key in ("name", "direction", "threshold", "reference")}
            | {"status": "satisfied"}
            | realised
        ],
        "kl": {"predicted": 0.5, "realised": 0.6},
        "lagrangian": {"closed_fraction": 0.93, "closed_fraction_ci95": [0.9, 0.96]},
    }
    write_json(run / "evaluation" / "evaluation.json", evaluation)
    finish(run / "evaluation", "evaluate", {"evaluation.json": file_sha256(run / "evaluation" / "evaluation.json")})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """After stage 1."""
    folder = tmp_path / "runs" / "mine"
    (folder / "prompts").mkdir(parents=True)
    rng = np.random.default_rng(0)
    harmless = rng.normal(size=40 * 32)
    table = {"prompt_id": np.repeat(np.arange(40), 32), "helpful": -harmless / 2, "harmless": harmless}
    table["helpful"] = table["helpful"] + rng.normal(size=harmless.size)
    asked = {"reward": "helpful", "constraints": ["harmless >= ref + 0.3"], "beta": 1.0}
    dualign.solve(pa.table(table), **asked).save(folder / "dual")
    finish(folder / "dual", "solve", {"dual.json": file_sha256(folder / "dual" / "dual.json")})
    write_tilted(folder)
    return folder


def test_after_stage_1(run: Path) -> None:
    loaded = dualign.load_run(str(run))
    assert loaded.name == "mine"
    assert loaded.dual == json.loads((run / "dual" / "dual.json").read_text())
    assert loaded.tilted["prompt_id"].to_pylist() == ["b", "b", "a", "a"]
    assert loaded.tilted.schema.names == tilted_schema(["harmless"]).names
    shown = repr(loaded)
    assert shown.startswith("Run mine, stage 1: ")
    assert "harmless" in shown
    assert len(shown.splitlines()) <= 25
    with pytest.raises(dualign.InputError, match="run `mine` has no evaluation: its step `evaluate` has not finished"):
        _ = loaded.evaluation
    with pytest.raises(dualign.InputError, match="its step `train` has not finished"):
        _ = loaded.policy_path


def test_after_stage_2(run: Path) -> None:
    write_evaluation(run)
    finish(run / "policy", "train", {})
    loaded = dualign.load_run(run)
    assert loaded.policy_path == run / "policy"
    assert loaded.evaluation["lagrangian"]["closed_fraction"] == 0.93
    assert repr(loaded).startswith("Run mine, stage 2: ")
    assert "SATISFIED" in repr(loaded)
    assert "0.93" in loaded._repr_html_()


def test_before_the_dual(run: Path) -> None:
    (run / "dual" / "manifest.json").unlink()
    loaded = dualign.load_run(run)
    assert repr(loaded) == "Run mine, no dual yet"
    assert "no dual yet" in loaded._repr_html_()


def test_files_that_are_not_what_their_step_wrote(run: Path) -> None:
    path = run / "dual" / "dual.json"
    path.write_text(path.read_text().replace('"certified"', '"guessed"'))
    with pytest.raises(dualign.CorruptArtifactError, match=r"dual\.json is not the file that .*manifest"):
        _ = dualign.load_run(run).dual
    shard = next((run / "tilted" / "data").glob("test-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(dualign.CorruptArtifactError, match=rf"{shard.name} is not the file that .*manifest"):
        _ = dualign.load_run(run).tilted
    shard.unlink()
    with pytest.raises(dualign.CorruptArtifactError, match=rf"{shard.name} cannot be read"):
        _ = dualign.load_run(run).tilted


def test_a_folder_that_is_no_run(run: Path) -> None:
    with pytest.raises(dualign.InputError, match=r"there is no run '.*/mien'; did you mean `mine`\?"):
        dualign.load_run(run.parent / "mien")
    with pytest.raises(dualign.InputError, match="is not a run: it has no prompts folder"):
        dualign.load_run(run.parent)
