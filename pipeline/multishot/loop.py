"""The iterative baseline: train at lambda(t), sample and score what was trained, step lambda by its slack, repeat.

Iterate 0 is the run's own one-shot policy at lambda*, the warm start of arXiv 2505.19387. Every later iterate is a run
of its own, in ``multishot/<t>/`` of the run: it shares prompts, samples and scores with it, and its dual is asked for
the thresholds whose solution is lambda(t), so that lambda reaches training by the same way as always. Training goes on
from the policy before. Slacks are measured on the train prompts; the test prompts see only the iterate that is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.recipe import RunConfig
from pipeline.config.sections import ConstraintSettings, MultishotSettings
from pipeline.contracts.artifacts import (
    begin_step,
    file_sha256,
    is_complete,
    read_json,
    read_manifest,
    require_writable,
    run_lock,
    write_json,
)
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.contracts.shards import write_parquet
from pipeline.contracts.solution import Solution, read_solution
from pipeline.dual.posing import PosedProblem
from pipeline.multishot.rules import Measured, gradient_step, secant_step
from pipeline.report.trajectory import write_trajectory_figure
from pipeline.run.replaced import drop_replaced, put_aside
from pipeline.run.response_set import known_response_sets, policy_responses
from pipeline.run.run import Run
from pipeline.run.step import finish_step, log, remedy, reopen
from pipeline.sampling.policies import trained_policy
from pipeline.sampling.policy_samples import sample_policy
from pipeline.scoring.sample_scores import score_policy
from pipeline.steps.evaluate import compare_policy
from pipeline.steps.runner import run_steps
from pipeline.steps.solve import pose_reference
from stage1_dual.dual import (
    DualProblem,
    InfeasibleError,
    NotCertifiedError,
    evaluate_dual,
    threshold_at_multipliers,
)

FOLDER = "multishot"
_MEASURING_SEED = 2_000_029
"""Added to the run's seed for the iterates' samples on train prompts."""

TRAJECTORY = pa.schema(
    [
        pa.field("iterate", pa.int32(), nullable=False),
        pa.field("constraint", pa.string(), nullable=False),
        pa.field("multiplier", pa.float64(), nullable=False),
        pa.field("slack", pa.float64(), nullable=False),
        pa.field("slack_ci95_low", pa.float64(), nullable=False),
        pa.field("slack_ci95_high", pa.float64(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("kl", pa.float64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)
"""One row for each iterate and constraint. Slacks are of the train prompts, in units of the statistic, and positive
where the demand is met.
``seconds`` are those of all steps of the iterate; of iterate 0, of the one-shot training and its measurement."""


@dataclass(frozen=True, eq=False)
class Iterate:
    """One policy of the trajectory.

    Attributes:
        run: the run that trained it.
        names: of the constraints.
        measured: its multipliers, and its slacks in units of the constraints' columns.
        slack: in units of the statistics, shape (m,).
        slack_ci95: intervals of these, shape (m, 2).
        reward: mean reward on the train prompts.
        kl: KL to the reference, nats per prompt.
        seconds: of its steps, whenever they ran.
    """

    run: Run
    names: tuple[str, ...]
    measured: Measured
    slack: np.ndarray
    slack_ci95: np.ndarray
    reward: float
    kl: float
    seconds: float


def run_multishot(run: Run, *, redo: bool = False) -> Run:
    """Iterate from the run's one-shot policy and evaluate the best iterate on the test prompts.

    A killed call continues: finished iterates are kept.

    Args:
        run: the run; its steps up to the evaluation are performed where they are not done.
        redo: remove the iterates first.

    Returns:
        The run that holds the kept policy and its evaluation; the run itself where no iterate is better.

    Raises:
        StaleArtifactError: iterates are there that were made with other settings.
        DualignError: whatever makes a step stop; finished work is kept.
    """
    _require_iterable(run.config)
    run_steps(run, ("prepare", "sample", "score", "solve", "export", "train", "evaluate"))
    started = time.monotonic()
    folder, settings = run.folder / FOLDER, run.config.multishot
    if redo and folder.is_dir():
        with run_lock(folder):
            pass  # nobody works there
        put_aside(run.folder, [FOLDER])
    require_writable(folder)
    with run_lock(folder):
        inputs = {name: read_manifest(run.folder / name).identity for name in ("dual", "policy", "samples")}
        begin_step(folder, settings=_step_settings(settings), inputs=inputs, remedy=remedy("multishot"))
        reopen(folder)
        posed = pose_reference(run, "train")
        iterates = [_measure(run, folder / "0", posed)]
        while len(iterates) < settings.iterations:
            number = len(iterates)
            lam = _next_multipliers(settings, [one.measured for one in iterates], posed.problem)
            log.info("multishot: iterate %d at lambda %s", number, ", ".join(f"{value:.4g}" for value in lam))
            try:
                iterates.append(_perform_iterate(run, number, lam, start=iterates[-1].run, posed=posed))
            except (InfeasibleError, NotCertifiedError) as error:
                log.warning("multishot: the step leads to where no tilted policy is; ended there. %s", error)
                break
        best = choose_iterate(iterates)
        kept = iterates[best].run
        if best > 0:
            run_steps(kept, ("evaluate",))
        trajectory = _trajectory(iterates, best)
        write_parquet(folder / "trajectory.parquet", trajectory, metadata=run.table_metadata())
        pictures = write_trajectory_figure(trajectory, folder / "trajectory")
        finish_step(
            run.name,
            folder,
            "multishot",
            settings=settings.model_dump(mode="json"),
            inputs=inputs,
            files={path.name: file_sha256(path) for path in (folder / "trajectory.parquet", *pictures)},
            counts={"iterates": len(iterates)},
            details={"kept": best, "kept_run": kept.name},
            started=started,
        )
    drop_replaced(run.folder, [FOLDER])
    log.info("multishot: kept iterate %d of %d, run `%s`", best, len(iterates) - 1, kept.name)
    return kept


def _require_iterable(config: RunConfig) -> None:
    if config.training.optimizer != "adamw":
        raise InputError(
            f"`training.optimizer` is {config.training.optimizer}, which takes one step from the reference; a later "
            "iterate of multishot trains on from another policy, by adamw"
        )
    for constraint, _ in config.stated_constraints():
        if constraint.is_equality or constraint.statistic.kind == "cvar":
            raise InputError(
                f"constraint `{constraint.name}` ({constraint.text()}): multishot steps the multipliers of bounds on "
                "means; it has none for an equality, nor for a cvar, whose column differs from iterate to iterate"
            )


def choose_iterate(iterates: Sequence[Iterate]) -> int:
    """The iterate with the highest reward among those that meet all demands to within their error, or else the one
    that misses them least (its worst slack, in half-widths of its interval).
    """

    def rank(iterate: Iterate) -> tuple[bool, float]:
        half_width = np.maximum(np.ptp(iterate.slack_ci95, axis=1) / 2, np.finfo(float).tiny)
        worst = float(np.min(iterate.slack / half_width))
        return worst >= -1.0, iterate.reward if worst >= -1.0 else worst

    return max(range(len(iterates)), key=lambda number: rank(iterates[number]))


def _step_settings(settings: MultishotSettings) -> dict[str, Any]:
    """What decides the iterates: more of them leave the first ones as they are."""
    return settings.model_dump(mode="json", exclude={"iterations"})


def _next_multipliers(settings: MultishotSettings, history: Sequence[Measured], problem: DualProblem) -> np.ndarray:
    if settings.rule == "gradient":
        assert settings.step_size is not None  # MultishotSettings
        return gradient_step(history[-1], step_size=settings.step_size)
    return secant_step(history, evaluate_dual(problem, history[-1].lam).hess_mm)


def _perform_iterate(run: Run, number: int, lam: np.ndarray, *, start: Run, posed: PosedProblem) -> Iterate:
    """Solve, export and train at ``lam``, from the policy of ``start``, then measure."""
    moved_m = threshold_at_multipliers(posed.problem, lam) - posed.problem.thresholds_m
    asked = [unit.asked(float(moved)) for unit, moved in zip(posed.units, moved_m, strict=True)]
    child = replace(
        run,
        name=f"{run.name}/{FOLDER}/{number}",
        config=_iterate_config(run.config, posed.constraints, reserves=asked, initial=start.policy),
    )
    share_stage1(run, child)
    run_steps(child, ("solve", "export", "train"))
    return _measure(child, child.folder / "measured", posed)


def _iterate_config(
    config: RunConfig, demands: Sequence[Constraint], *, reserves: Sequence[float], initial: Path
) -> RunConfig:
    """The run's own recipe, but for lambda, by way of what is asked beyond the demand, and the start of training."""
    constraints = {
        # To ten digits: a killed call goes on on another machine, whose sums differ in the last one.
        demand.name: ConstraintSettings.of(demand, reserve=float(f"{reserve:.10g}"))
        for demand, reserve in zip(demands, reserves, strict=True)
    }
    training = config.training.model_copy(
        update={
            "initial": str(initial.absolute()),
            "learning_rate": config.multishot.learning_rate,
            "epochs": config.multishot.epochs,
        }
    )
    # Lambda is what the step says.
    solve = config.solve.model_copy(update={"correct_response_bias": False})
    return config.model_copy(update={"constraints": constraints, "training": training, "solve": solve})


def share_stage1(run: Run, child: Run) -> None:
    """Let a run below another one's folder read its prompts, samples and scores, those of a data set's pairs too, by
    links that survive moving both.
    """
    run.reference_logp.mkdir(exist_ok=True)  # whoever computes log pi_ref first serves all
    shared = [run.written_reference.name, run.reference_logp.name]
    for responses in known_response_sets(run.folder):
        if responses.made_by and responses.root.is_dir():
            (child.folder / responses.prefix / "scores").mkdir(parents=True, exist_ok=True)
            shared += responses.scored_tables()
    up = Path(*[".."] * len(child.folder.relative_to(run.folder).parts))
    for name in map(Path, shared):
        target, link = run.folder / name, child.folder / name
        if target.exists() and not link.is_symlink() and not link.exists():
            link.symlink_to(Path(*[".."] * (len(name.parts) - 1)) / up / name, target_is_directory=True)


def _measure(run: Run, folder: Path, posed: PosedProblem) -> Iterate:
    """Sample and score the run's policy on the train prompts."""
    solution = read_solution(run.folder / "dual" / "dual.json")
    responses = policy_responses(folder, prompts=run.prompts, split="train")
    sample_policy(
        run,
        trained_policy(run),
        responses,
        step="multishot",
        samples_per_prompt=run.config.multishot.samples_per_prompt,
        seed=run.config.seed + _MEASURING_SEED,
    )
    # What the step of lambda needs.
    names = run.config.needed_scores()
    score_policy(run, responses, step="multishot", names=names)
    path = folder / "measured.json"
    inputs = {
        name: read_manifest(at).identity
        for name, at in (("dual", run.folder / "dual"), ("samples", folder / "samples"))
    }
    begin_step(folder, settings={}, inputs=inputs, remedy=remedy("multishot"))
    if not is_complete(folder):
        started = time.monotonic()
        found = compare_policy(
            run, solution=solution, samples=folder / "samples", scores=folder / "scores", split="train"
        )
        write_json(path, found)
        files = {path.name: file_sha256(path)}
        finish_step(run.name, folder, "multishot", settings={}, inputs=inputs, files=files, started=started)
    return _read_iterate(run, folder, solution, posed)


def _read_iterate(run: Run, folder: Path, solution: Solution, posed: PosedProblem) -> Iterate:
    found = read_json(folder / "measured.json")
    bounds = found["constraints"]
    signs_m = solution.signs_m
    ends = signs_m[:, None] * (np.array([b["ci95"] for b in bounds]) - np.array([[b["threshold"]] for b in bounds]))
    steps = [run.folder / name for name in ("dual", "tilted", "policy")]
    # The comparison with the reference is for the reader.
    names = run.config.needed_scores()
    measured = [folder / "samples", *(folder / "scores" / name for name in names)]
    return Iterate(
        run=run,
        names=solution.names,
        measured=Measured(
            lam=solution.multipliers_m,
            slack=np.array(
                [bound["slack"] * unit.denominator for bound, unit in zip(bounds, posed.units, strict=True)]
            ),
        ),
        slack=np.array([bound["slack"] for bound in bounds]),
        slack_ci95=np.sort(ends, axis=1),
        reward=found["reward"]["realised"],
        kl=found["kl"]["realised"],
        seconds=sum(read_manifest(step).wall_seconds for step in (*steps, *measured)),
    )


def _trajectory(iterates: Sequence[Iterate], best: int) -> pa.Table:
    rows = [
        {
            "iterate": number,
            "constraint": name,
            "multiplier": float(iterate.measured.lam[place]),
            "slack": float(iterate.slack[place]),
            "slack_ci95_low": float(iterate.slack_ci95[place, 0]),
            "slack_ci95_high": float(iterate.slack_ci95[place, 1]),
            "reward": iterate.reward,
            "kl": iterate.kl,
            "kept": number == best,
            "seconds": iterate.seconds,
        }
        for number, iterate in enumerate(iterates)
        for place, name in enumerate(iterate.names)
    ]
    return pa.Table.from_pylist(rows, schema=TRAJECTORY)
