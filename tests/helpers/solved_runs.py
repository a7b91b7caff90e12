"""Runs of which every file that is shown is real, without a model: a dual of drawn scores, and an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import dualign
from pipeline.contracts.artifacts import Manifest, file_sha256, write_json, write_manifest


def finish(folder: Path, step: str, *files: str, seconds: float = 0.0, details: dict[str, Any] | None = None) -> None:
    """Write the manifest of a step's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {name: file_sha256(folder / name) for name in files}
    write_manifest(
        folder,
        Manifest(
            step=step,
            run=folder.parent.name,
            settings={},
            inputs={},
            files=hashes,
            details=details or {},
            wall_seconds=seconds,
        ),
    )


def write_solved_run(folder: Path, *, constraint: str = "harmless >= ref + 0.3", reward: str = "helpful") -> None:
    """A run after `solve`, of 40 prompts with 32 responses each; column `other` is a third score."""
    finish(folder / "prompts", "prepare", seconds=1.0)
    finish(folder / "samples", "sample", seconds=60.0)
    finish(folder / "scores" / "helpful", "score", seconds=2.0)
    finish(folder / "scores" / "harmless", "score", seconds=3.0)
    rng = np.random.default_rng(0)
    harmless, other = rng.normal(size=(2, 40 * 32))
    table = {
        "prompt_id": np.repeat(np.arange(40), 32),
        "helpful": rng.normal(size=harmless.size) - harmless / 2,
        "harmless": harmless,
        "other": other,
    }
    result = dualign.solve(pa.table(table), reward=reward, constraints=[constraint], beta=1.0)
    write_json(folder / "dual" / "dual.json", {**result.dual, "inputs": {"prompts": "ab" * 32}})
    finish(folder / "dual", "solve", "dual.json", seconds=0.5)


def write_trained(folder: Path) -> None:
    """A policy that paid beside it."""
    verdict = {
        "verdict": "paid",
        "closed_fraction": 0.9,
        "closed_fraction_ci95": [0.8, 1.0],
        "n_checkpoints": 3,
        "n_prompts": 8,
        "reasons": ["the kept policy is better than the reference"],
        "advice": [],
    }
    finish(folder / "policy", "train", seconds=100.0, details={"verdict": verdict})


def write_evaluated(folder: Path, *, realised: float = 0.35, half_width: float = 0.02) -> None:
    """An evaluation beside a solved run: what is realised is over the reference, which is the train prompts'."""
    dual = json.loads((folder / "dual" / "dual.json").read_text())
    bound, reward = dual["constraints"][0], dual["reward"]
    margin, reference = bound["demanded"]["margin"], bound["reference"]
    status = "undecided" if abs(realised - margin) < half_width else "satisfied" if realised > margin else "violated"
    mean = reference + realised
    write_json(
        folder / "evaluation" / "evaluation.json",
        {
            "status": status,
            "n_prompts": 7,
            "n_samples": 70,
            "reward": {
                "name": reward["name"],
                "reference": reward["reference"],
                "predicted": reward["reference"] + 0.4,
                "realised": reward["reference"] + 0.3,
                "ci95": [reward["reference"] + 0.2, reward["reference"] + 0.4],
                "improvement": 0.3,
                "improvement_ci95": [0.25, 0.35],
            },
            "constraints": [
                {
                    "name": bound["name"],
                    "direction": bound["direction"],
                    "threshold": reference + margin,
                    "margin": margin,
                    "reference": reference,
                    "predicted": reference + 0.32,
                    "realised": mean,
                    "ci95": [mean - half_width, mean + half_width],
                    "slack": realised - margin,
                    "status": status,
                }
            ],
            "kl": {"predicted": 0.5, "realised": 0.6, "realised_ci95": [0.55, 0.65]},
            "lagrangian": {"closed_fraction": 0.93, "closed_fraction_ci95": [0.9, 0.96]},
        },
    )
    finish(folder / "evaluation", "evaluate", "evaluation.json", seconds=30.0)
