"""`dualign baselines`: the experiments, several at a time, each resumable, and the page that lists them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.baselines.experiments import EXPERIMENTS, PERFORMED_UNASKED
from pipeline.baselines.results import Result, write_index, write_result
from pipeline.baselines.side_by_side import count_jobs, perform_experiments
from pipeline.baselines.study import Study, change_config
from pipeline.config.loading import load_config
from pipeline.config.sections import WIDER
from pipeline.contracts.artifacts import require_writable, run_lock
from pipeline.contracts.errors import InputError
from pipeline.microworld.size import WorldSize
from pipeline.run.run import Run
from pipeline.run.step import log

RECIPE = "baselines"
REAL_MODEL = "smollm2"

_MARGINS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
_PAIRS = ((0.2, 0.2), (0.2, 0.6), (0.4, 0.4), (0.6, 0.2), (0.6, 0.6), (0.8, 0.4), (1.0, 0.2), (0.4, 0.8))

_SIZES = {
    "smaller": replace(
        WorldSize(), policy_layers=1, policy_width=64, policy_heads=2, policy_ffn_width=176, policy_steps=1200
    ),
}
_QUICK_SIZES = {"smaller": replace(_SIZES["smaller"], policy_steps=200)}

_WIDER = {
    "prompts.source": WIDER,
    "prompts.split_column": "split",
    "prompts.category_column": "category",
    "sampling.samples_per_prompt": 32,
    "training.epochs": 0.5,  # somewhat more steps than the recipe's epoch has
    "training.evaluations": 1,  # of two policies a first one chose no other checkpoint
    "evaluation.samples_per_prompt": 5,  # intervals of 8 are a sixth narrower, and a policy takes 10 s longer
}
"""More prompts of fewer responses, but not of 24: lambda* corrected for so few leaves humour 0.03 and 0.08 standard
deviations short at the pairs (0.6, 0.6) and (0.4, 0.8), for 32 it is 0.02 and 0.04 (docs/decisions.md)."""

_QUICK_WIDER = {**_WIDER, "prompts.limit": 200, "sampling.samples_per_prompt": 12, "evaluation.samples_per_prompt": 4}

_QUICK = {
    "sampling.samples_per_prompt": 12,
    "solve.bootstrap_replicates": 100,
    "solve.frontier_points": 5,
    "training.epochs": 0.5,
    "training.evaluations": 1,
    "evaluation.samples_per_prompt": 4,
    "evaluation.bootstrap_replicates": 100,
    "multishot.iterations": 2,
    "multishot.samples_per_prompt": 2,
    "multishot.epochs": 0.25,
}
"""Every step is the real one and every number a rough one."""

_QUICK_REAL_MODEL = {
    "prompts.limit": 6,
    "sampling.samples_per_prompt": 6,
    "sampling.max_new_tokens": 16,
    "sampling.logp_rows": 8,
    "solve.bootstrap_replicates": 100,
    "solve.frontier_points": 3,
    "constraints.reading_ease.margin": 2.0,
    "training.epochs": 1.0,
    "training.evaluations": 1,
    "evaluation.samples_per_prompt": 2,
    "evaluation.bootstrap_replicates": 100,
}
"""Of the published model, which takes hundreds of times as long a token as the embedded one."""


def build_study(*, data_dir: Path, n_seeds: int, quick: bool, show_progress: bool) -> Study:
    """The study of the shipped recipe.

    Args:
        data_dir: holds ``runs/`` and ``models/``.
        n_seeds: how many seeds the experiments run that use several.
        quick: a few minutes for all experiments, to see that they work.
        show_progress: show progress bars.

    Raises:
        InputError: the number of seeds is not positive.
    """
    if n_seeds < 1:
        raise InputError(f"--seeds is {n_seeds}; it must be at least 1")
    config, real_model = load_config(Path(RECIPE)), load_config(Path(REAL_MODEL))
    return Study(
        config=change_config(config, _QUICK) if quick else config,
        data_dir=data_dir,
        name="baselines-quick" if quick else "baselines",
        seeds=tuple(range(n_seeds)),
        margins=(0.4, 0.8) if quick else _MARGINS,
        pairs=_PAIRS[2:3] if quick else _PAIRS,
        dpo_epochs=0.5 if quick else 3.0,  # 3: as in arXiv 2405.19544, table 2
        sizes=_QUICK_SIZES if quick else _SIZES,
        wider=_QUICK_WIDER if quick else _WIDER,
        real_model=change_config(real_model, _QUICK_REAL_MODEL) if quick else real_model,
        show_progress=show_progress,
    )


def run_experiments(study: Study, names: Sequence[str], *, jobs: int | None = None) -> list[Result]:
    """Perform experiments and write their results as they are done; policies that are there are kept.

    Args:
        study: the study.
        names: of experiments; none for all but those that are only performed by name.
        jobs: how many at a time, which share the cores; as many as there are cores where not given.

    Returns:
        The results in the order in which they were done.

    Raises:
        InputError: there is no such experiment, or the number of jobs is not positive.
        DualignError: whatever makes a step stop; finished work is kept.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise InputError(f"--only {name}: there is no such experiment; there are {', '.join(EXPERIMENTS)}")
    chosen = list(dict.fromkeys(names)) or PERFORMED_UNASKED
    jobs = count_jobs(jobs, n_experiments=len(chosen))
    folder = study.folder / "results"
    require_writable(folder)
    results: list[Result] = []
    begun = time.monotonic()
    origin = study.origin
    metadata = Run(study.config, study.name, study.data_dir).table_metadata()
    with run_lock(folder):
        log.info("%d experiments, %d at a time", len(chosen), jobs)
        for result, seconds in perform_experiments(study, chosen, jobs=jobs):
            results.append(result)
            page = write_result(result, folder, origin=origin, metadata=metadata)[1]
            write_index(folder, EXPERIMENTS, origin=origin)
            log.info(
                "==== %s done in %.0f s (%d of %d after %.0f min): %s",
                result.name,
                seconds,
                len(results),
                len(chosen),
                (time.monotonic() - begun) / 60,
                page,
            )
            for finding in result.findings:
                log.info("  - %s", finding)
    return results
