"""The step ``solve``: lambda* of a run, certified, with all that ``dual.json`` says."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.contracts.artifacts import environment, file_sha256, read_manifest, write_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.solution import Solution
from pipeline.dual.posing import PosedProblem, pose
from pipeline.dual.solving import EvaluationSize, SolvedDual, solve_problem, tilted_weights
from pipeline.dual.sweep import sweep_constraints, write_frontier
from pipeline.run.looks import limit_reached
from pipeline.run.run import Run
from pipeline.run.step import derived_step_is_current, finish_step, log
from pipeline.scoring.categories import prompt_categories, statistics_by_category
from pipeline.scoring.demanded import Demands, read_demands
from pipeline.scoring.joined import JoinedScores, all_scores, apply_length_rule, reference_scores
from pipeline.scoring.quality import describe_faults, describe_truncation
from pipeline.scoring.repeats import measured_sigma, read_noise
from stage1_dual.dual import DualProblem


def reference_problem(run: Run, split: str) -> DualProblem:
    """The dual problem of the reference's scored samples of a split, under the run's demands."""
    return pose_reference(run, split).problem


def pose_reference(run: Run, split: str) -> PosedProblem:
    """The same, with what its columns are of."""
    return pose(reference_scores(run, split), constraints=read_demands(run).constraints, beta=run.config.given_beta)


def solve(run: Run) -> None:
    """Minimise the dual, certify the answer, and write ``dual.json`` and the frontier."""
    started = time.monotonic()
    folder, config = run.dual, run.config
    settings = {
        "beta": config.model_dump(mode="json", include={"beta"})["beta"],
        "reward": config.reward,
        "constraints": {name: bound.model_dump(mode="json") for name, bound in config.constraints.items()},
        **config.solve.model_dump(mode="json"),
        "seed": config.seed,
    }
    inputs = {
        **{name: read_manifest(run.folder / name).identity for name in ("prompts", "samples")},
        **{f"scores/{name}": read_manifest(run.scores / name).identity for name in config.needed_scores()},
    }
    if derived_step_is_current(folder, step="solve", settings=settings, inputs=inputs):
        return
    demands = read_demands(run)
    everything, n_unscored = all_scores(run, samples=run.samples, scores=run.scores, split="train")
    train, test = apply_length_rule(everything, config.solve.on_length), reference_scores(run, "test")
    for split, rows in (("train", train), ("test", test)):
        if rows.n_samples == 0:
            raise InputError(
                f"no {split} response takes part: none was scored, or all were cut off at `sampling.max_new_tokens`, "
                f"{config.sampling.max_new_tokens}, and `solve.on_length` is {config.solve.on_length!r}"
            )
    solved = _solve(run, demands, train, test, n_replicates=config.solve.bootstrap_replicates)
    dual = _describe_samples(run, solved.content, demands, train, everything=everything, n_unscored=n_unscored)
    solution = Solution.from_document(dual)
    for bound in solution.constraints:
        guard = bound.safeguard
        added = guard.reserve + guard.assurance + guard.score_error + guard.score_noise
        if added:
            log.info("solve: %s is asked for %.3g beyond the demand, as its safeguards say", bound.name, added)
    frontier = sweep_constraints(solved.posed, n_points=config.solve.frontier_points)
    write_frontier(folder / "frontier.parquet", frontier, metadata=run.table_metadata())
    write_json(folder / "dual.json", {**dual, "seed": config.seed, "inputs": inputs, "environment": environment()})
    finish_step(
        run.name,
        folder,
        "solve",
        settings=settings,
        inputs=inputs,
        files={name: file_sha256(folder / name) for name in ("dual.json", "frontier.parquet")},
        counts={"prompts": solution.n_prompts, "samples": solution.n_samples},
        started=started,
    )


def solve_scores(run: Run, *, n_replicates: int) -> SolvedDual:
    """What :func:`solve` finds for what is scored so far, and writes nothing.

    Args:
        run: the run.
        n_replicates: bootstrap replicates over prompts.
    """
    train, test = reference_scores(run, "train"), reference_scores(run, "test")
    return _solve(run, read_demands(run), train, test, n_replicates=n_replicates)


def _solve(run: Run, demands: Demands, train: JoinedScores, test: JoinedScores, *, n_replicates: int) -> SolvedDual:
    config = run.config
    # Under a KL budget beta is where the search starts.
    start = 1.0 if config.kl_budget is not None else config.given_beta
    heldout = pose(test, constraints=demands.constraints, beta=start)
    return solve_problem(
        pose(train, constraints=demands.constraints, beta=start).within(config.kl_budget),
        heldout=heldout,
        reward_name=config.reward,
        safeguards=[
            replace(guard, score_noise=measured_sigma(run.scores / one.statistic.score), measures_noise=False)
            if guard.measures_noise
            else guard
            for one, guard in zip(demands.constraints, demands.safeguards, strict=True)
        ],
        evaluation=EvaluationSize(heldout.problem.n_prompts, config.evaluation.samples_per_prompt),
        corrects_response_bias=config.solve.correct_response_bias,
        n_replicates=n_replicates,
        rng=np.random.default_rng(config.seed),
    )


def _noise_warnings(run: Run, dual: Mapping[str, Any]) -> list[str]:
    """What noise that was measured adds to what is predicted, where no reserve is asked for and it shows.

    It shows where it is more than the prediction's own 95% interval says of either side.
    """
    found = []
    reward = dual["reward"]
    entries = [(reward, reward["name"], 1.0, "a policy is expected to have so much less")]
    entries += [
        (
            bound,
            bound["score"],
            bound["multiplier"],
            f"set `constraints.{bound['name']}.score_noise: measured` to ask for it",
        )
        for bound in dual["constraints"]
        if not bound["safeguard"]["score_noise"] and bound["statistic"] == {"kind": "mean"}
    ]
    for entry, score, multiplier, remedy in entries:
        noise = read_noise(run.scores / score)
        low, high = entry["predicted_ci95"]
        over = 0.0 if noise is None else multiplier * noise.sigma**2 / dual["beta"]
        if noise is not None and low is not None and high is not None and over > 0.5 * (high - low):
            found.append(
                f"two ratings of one response by `{score}` differ by chance (standard deviation of one "
                f"{noise.sigma:.3g}), so that its predicted mean is {over:.3g} too good: {remedy}"
            )
    return found


def _describe_samples(
    run: Run,
    dual: dict[str, Any],
    demands: Demands,
    train: JoinedScores,
    *,
    everything: JoinedScores,
    n_unscored: int,
) -> dict[str, Any]:
    """What ``dual.json`` says about the samples besides the solution."""
    names = (run.config.reward, *run.config.constraint_scores())
    manifest = read_manifest(run.samples)
    truncation = describe_truncation(everything, run.config.solve.on_length, names=names)
    faults = describe_faults(
        sampling=manifest.settings,
        truncation=truncation,
        n_unscored=n_unscored,
        n_prompts_lost=len(everything.prompt_ids) - len(train.prompt_ids),
        n_unsampled=manifest.count("failed"),
        n_prompts_left_out=read_manifest(run.prompts).counts.get("left_out", 0),
    )
    faults += _noise_warnings(run, dual)
    faults += limit_reached(run)
    for fault in faults:
        log.warning("solve: %s", fault)
    weight_n = tilted_weights(train, Solution.from_document(dual))
    policies = {"reference": (train, None), "predicted": (train, weight_n)}
    return {
        **dual,
        "by_category": statistics_by_category(
            policies, prompt_categories(run), reward=run.config.reward, constraints=demands.constraints
        ),
        "truncation": truncation,
        "warnings": [*demands.warnings, *dual["warnings"], *faults],
    }
