"""The promise on a published model: realised against demanded over seeds, how far training went, examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.baselines import figures, policies
from pipeline.baselines.outcomes import Outcome, read_outcome
from pipeline.baselines.results import Result, Rows
from pipeline.baselines.study import Arm, Study
from pipeline.contracts.errors import InputError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES
from pipeline.contracts.training_verdict import read_training_verdict
from pipeline.run.run import Run

_EXAMPLES = 3


def real_model(study: Study) -> Result:
    """Every demand of the recipe of a published model over seeds: demanded, predicted, realised; the closed fraction.

    Raises:
        InputError: the study has no such recipe.
    """
    if study.real_model is None:
        raise InputError("the study names no recipe of a published model")
    # Runs of its own: another reference, other prompts.
    own = replace(study, config=study.real_model, name=f"{study.name}/real_model")
    outcomes = {}
    for seed in own.seeds:
        base = own.base(seed)
        outcomes[seed] = read_outcome(base, own.train(base, Arm("policy", policies.ONE_SHOT)))
    rows = [row for seed, outcome in outcomes.items() for row in _rows(seed, outcome)]
    table = pa.Table.from_pylist(rows)
    first = next(iter(outcomes.values()))
    return Result(
        "real_model",
        "A published model: realised against demanded",
        table,
        figures.real_model_figure(table),
        [*_findings(rows, outcomes), *_examples(first)],
        table.select(
            ["score", "seed", "demanded", "predicted", "realised", "ci95_low", "ci95_high", "status", "sd", "lambda"]
        ),
    )


def _rows(seed: int, outcome: Outcome) -> Iterator[dict[str, Any]]:
    """The reward and every constraint of a policy, as improvements over the reference in the score's own direction."""
    evaluation = outcome.evaluation
    lagrangian, kl = evaluation["lagrangian"], evaluation["kl"]
    ends = lagrangian["closed_fraction_ci95"]
    verdict = read_training_verdict(outcome.run.folder / "policy")
    shared = {
        "seed": seed,
        "closed_fraction": lagrangian["closed_fraction"],
        "closed_fraction_ci95_low": None if ends is None else ends[0],
        "closed_fraction_ci95_high": None if ends is None else ends[1],
        "kl": kl["realised"],
        "kl_predicted": kl["predicted"],
        "training": None if verdict is None else verdict.verdict,
        "run": outcome.run.name,
    }
    demands: Sequence[Mapping[str, Any]] = [evaluation["reward"], *evaluation["constraints"]]
    for demand in demands:
        name = demand["name"]
        score = outcome.score(name)
        is_reward = name not in outcome.multipliers
        yield {
            "score": name,
            "demanded": None if is_reward else demand["threshold"] - demand["reference"],
            "direction": "maximise" if is_reward else demand["direction"],
            "predicted": demand["predicted"] - demand["reference"],
            "realised": score.improvement,
            "ci95_low": score.ci95[0],
            "ci95_high": score.ci95[1],
            "status": None if is_reward else demand["status"],
            "sd": score.sd,
            "lambda": outcome.multipliers.get(name),
            **shared,
        }


def _findings(rows: Rows, outcomes: Mapping[int, Outcome]) -> Iterator[str]:
    for name in dict.fromkeys(row["score"] for row in rows):
        own = [row for row in rows if row["score"] == name]
        realised = ", ".join(
            f"{row['realised']:+.3f} [{row['ci95_low']:+.3f}, {row['ci95_high']:+.3f}]" for row in own
        )
        if own[0]["demanded"] is None:
            yield f"{name}: over the reference {realised}, predicted {np.mean([row['predicted'] for row in own]):+.3f}"
        else:
            kept = sum(row["status"] != "violated" for row in own)
            yield (
                f"{name}: {own[0]['direction']} {own[0]['demanded']:+.3g} over the reference demanded; {realised}; "
                f"not violated by {kept} of {len(own)}"
            )
    fractions = [outcome.evaluation["lagrangian"] for outcome in outcomes.values()]
    closed = ", ".join(_closed(entry) for entry in fractions)
    kl = [outcome.evaluation["kl"] for outcome in outcomes.values()]
    spent = ", ".join(f"{entry['realised']:.3f}" for entry in kl)
    yield (
        f"closed fraction {closed} by seed; KL {spent} nats where "
        f"{np.mean([entry['predicted'] for entry in kl]):.3f} was predicted"
    )


def _closed(lagrangian: Mapping[str, Any]) -> str:
    fraction, ends = lagrangian["closed_fraction"], lagrangian["closed_fraction_ci95"]
    if fraction is None:
        return "unknown"
    return f"{fraction:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


def _examples(outcome: Outcome) -> Iterator[str]:
    """Response 0 of the reference and of the policy to the first test prompts by id: a hash, so nobody chose them."""
    before, after = (_first_responses(run, folder) for run, folder in _sampled(outcome))
    prompts = {row["prompt_id"]: row["prompt"][-1]["content"] for row in outcome.base.prompts_table().to_pylist()}
    for prompt_id in sorted(before.keys() & after.keys())[:_EXAMPLES]:
        asked, reference, policy = (
            " ".join(text.split()) for text in (prompts[prompt_id], before[prompt_id], after[prompt_id])
        )
        yield f"“{asked}” Reference: “{reference}” Policy: “{policy}”"


def _sampled(outcome: Outcome) -> Iterator[tuple[Run, Any]]:
    yield outcome.base, outcome.base.samples
    yield outcome.run, outcome.run.evaluated.samples


def _first_responses(run: Run, folder: Any) -> dict[str, str]:
    columns = ["prompt_id", "sample_index", "completion"]
    table = ShardedTable(folder=folder, schema=SAMPLES, metadata=run.table_metadata()).read("test", columns=columns)
    first = table.filter(pc.equal(table["sample_index"], 0))
    return dict(zip(first["prompt_id"].to_pylist(), first["completion"].to_pylist(), strict=True))
