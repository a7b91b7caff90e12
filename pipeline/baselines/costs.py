"""What each method costs: wall time and tokens to its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.baselines import figures, policies
from pipeline.baselines.results import Result, Rows, methods
from pipeline.baselines.study import Arm, Study
from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.tables import TOKEN_IDS
from pipeline.multishot.loop import FOLDER as MULTISHOT
from pipeline.run.run import Run


def cost(study: Study) -> Result:
    """Wall time and tokens of each method to its result."""
    base = study.base(study.seeds[0])
    names = ("samples", "scores/helpful", "scores/harmless")
    stage1 = {name: read_manifest(base.folder / name).wall_seconds for name in names}
    drawn, read = _token_counts(base, base.folder / "samples")
    rows: Rows = []
    for margin in study.margins:
        arm = policies.one_shot(margin)
        run = study.train(base, arm)
        trained = _trained_share(run) * read * run.config.training.epochs
        rows.append(_cost_row(policies.ONE_SHOT, margin, stage1, own_seconds(base, arm), drawn, trained))
        if margin not in study.some_margins:
            continue
        study.iterate(base, arm)
        iterates = run.folder / MULTISHOT
        later = _iterates(iterates)[1:]
        measured = [iterates / "0" / "samples", *(iterates / str(number) / "measured/samples" for number in later)]
        sampled = drawn + sum(_token_counts(base, folder)[0] for folder in measured)
        retrained = _trained_share(run) * read * run.config.multishot.epochs * len(later)
        seconds = seconds_to_result(base, arm, policies.MULTI_SHOT)
        rows.append(_cost_row(policies.MULTI_SHOT, margin, stage1, seconds, sampled, trained + retrained))
    for margin in study.some_margins:
        arm = policies.paper_dpo(study, margin)
        run = study.train(base, arm)
        trained = _trained_share(run) * read * run.config.training.epochs
        rows.append(_cost_row(policies.PAPER_DPO, margin, stage1, own_seconds(base, arm), drawn, trained))
    table = pa.Table.from_pylist(rows)
    findings = [
        f"{method}: {np.mean([row['own_seconds'] for row in rows if row['method'] == method]):.0f} s after the "
        f"{sum(stage1.values()):.0f} s of sampling and scoring the reference"
        for method in methods(rows)
    ]
    return Result("cost", "Wall time and tokens to the result", table, figures.cost_figure(table), findings)


def _cost_row(
    method: str, margin: float, stage1: Mapping[str, float], own: float, drawn: int, trained: float
) -> dict[str, Any]:
    return {
        "method": method,
        "demanded": margin,
        "sampling_seconds": stage1["samples"],
        "scoring_seconds": stage1["scores/helpful"] + stage1["scores/harmless"],
        "own_seconds": own,
        "tokens_sampled": drawn,
        "tokens_trained_on": int(trained),
    }


def _trained_share(run: Run) -> float:
    """Of the train prompts, those that training learned from; the others chose its checkpoint."""
    counted = read_manifest(run.folder / "policy").details
    return float(counted["n_train_prompts"] / (counted["n_train_prompts"] + counted["n_held_out_prompts"]))


def _iterates(folder: Path) -> list[int]:
    """The iterates that a trajectory holds: more may lie beside it, of a longer one."""
    return sorted(set(pq.read_table(folder / "trajectory.parquet", columns=["iterate"])["iterate"].to_pylist()))


def own_seconds(base: Run, arm: Arm) -> float:
    """Wall time from the scored samples of the reference to a one-shot policy, whenever the steps ran."""
    folder = base.folder / arm.name
    return sum(read_manifest(folder / name).wall_seconds for name in ("dual", "tilted", "policy"))


def seconds_to_result(base: Run, arm: Arm, method: str) -> float:
    """Wall time from the scored samples of the reference to the policy of a method, whenever the steps ran."""
    if method == policies.ONE_SHOT:
        return own_seconds(base, arm)
    path = base.folder / arm.name / MULTISHOT / "trajectory.parquet"
    by_iterate = pq.read_table(path, columns=["iterate", "seconds"]).to_pydict()
    return float(sum(dict(zip(by_iterate["iterate"], by_iterate["seconds"], strict=True)).values()))


def _token_counts(run: Run, folder: Path) -> tuple[int, int]:
    """Completion tokens of a samples table, and prompt and completion tokens of its train split."""
    drawn = read = 0
    for split in ("train", "test"):
        table = run.samples_table(folder).read(split, columns=TOKEN_IDS)
        lengths = [sum(map(len, table[name].to_pylist())) for name in table.column_names]
        drawn += lengths[1]
        read += sum(lengths) if split == "train" else 0
    return drawn, read
