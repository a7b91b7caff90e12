"""A trained policy's scored samples against the reference's, on the prompts of one split."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts.artifacts import (
    begin_step,
    environment,
    file_sha256,
    is_complete,
    read_json,
    read_manifest,
    write_json,
)
from pipeline.contracts.errors import InputError, require_extra
from pipeline.contracts.solution import Solution
from pipeline.contracts.training_verdict import read_training_verdict
from pipeline.evaluation import evaluate_policy, judge_categories
from pipeline.microworld import gold_scores
from pipeline.report.evaluated import Evaluation, read_evaluation
from pipeline.report.solved import ReportedSolution
from pipeline.report.terminal import print_stage2
from pipeline.run.run import Run
from pipeline.run.step import finish_step, log, remedy
from pipeline.sampling.policies import trained_policy
from pipeline.sampling.policy_samples import sample_policy
from pipeline.scoring.categories import prompt_categories, statistics_by_category
from pipeline.scoring.joined import policy_scores, reference_scores
from pipeline.scoring.log_ratios import log_ratios
from pipeline.scoring.sample_scores import score_policy

_EVALUATION_SEED = 1_000_003
"""Added to the run's seed for the policy's samples: with equal seeds the two policies' samples would be correlated."""


def evaluate(run: Run) -> None:
    """Sample the trained policy on the test prompts and compare what it does with what was predicted."""
    require_extra("train", "torch", "transformers", purpose="evaluating")
    from stage2_policy.saving import write_model_card

    started = time.monotonic()
    folder, config = run.evaluation, run.config
    demands = {name: bound.model_dump(mode="json") for name, bound in config.constraints.items()}
    settings = {**config.evaluation.model_dump(mode="json"), "constraints": demands, "seed": config.seed}
    inputs = {name: read_manifest(run.folder / name).identity for name in ("policy", "dual", "samples")}
    begin_step(folder, settings=settings, inputs=inputs, remedy=remedy("evaluate"))
    path = run.folder / "dual" / "dual.json"
    dual = read_json(path)
    solution = Solution.from_document(dual, source=path)
    if is_complete(folder):
        log.info("evaluate: done before, kept")
    else:
        sample_policy(
            run,
            trained_policy(run),
            run.evaluated,
            step="evaluate",
            samples_per_prompt=config.evaluation.samples_per_prompt,
            seed=config.seed + _EVALUATION_SEED,
        )
        score_policy(run, run.evaluated, step="evaluate", names=list(config.used_scorers()))
        evaluation = compare_policy(
            run, solution=solution, samples=folder / "samples", scores=folder / "scores", split="test"
        )
        if run.uses_embedded:
            evaluation["gold"] = gold_means(run, samples=folder / "samples", split="test")
        evaluation |= {"seed": config.seed, "inputs": inputs, "environment": environment()}
        write_json(folder / "evaluation.json", evaluation)
        write_model_card(run.policy, dual=dual, evaluation=evaluation)
        finish_step(
            run.name,
            folder,
            "evaluate",
            settings=settings,
            inputs=inputs,
            files={"evaluation.json": file_sha256(folder / "evaluation.json")},
            counts={"prompts": evaluation["n_prompts"], "samples": evaluation["n_samples"]},
            started=started,
        )
    read_evaluation(folder / "evaluation.json", ReportedSolution.from_document(dual, source=path))
    print_stage2(read_json(folder / "evaluation.json"), dual, read_training_verdict(run.folder / "policy"))


def read_status(run: Run) -> str:
    """The verdict of the run's evaluation: ``satisfied``, ``undecided`` or ``violated``."""
    path = run.evaluation / "evaluation.json"
    return Evaluation.from_document(read_json(path), source=path).status


def compare_policy(run: Run, *, solution: Solution, samples: Path, scores: Path, split: str) -> dict[str, Any]:
    """What the run's policy does beside what the reference does and what the dual predicted.

    Args:
        run: the run.
        solution: of its dual; what was demanded of it is judged.
        samples: folder of the policy's samples table.
        scores: holds a folder with a score table for each scorer.
        split: of the prompts.

    Returns:
        The content of ``evaluation.json`` (docs/artifacts.md), without gold scores and provenance.

    Raises:
        InputError: no prompt has responses of both that take part.
    """
    config = run.config
    reference_rows = reference_scores(run, split)
    policy_rows = policy_scores(run, samples=samples, scores=scores, split=split)
    # A prompt may have lost all responses of one of the two, to failures or to the rule on cut-off ones.
    both = set(reference_rows.prompt_ids) & set(policy_rows.prompt_ids)
    left_out = len(set(reference_rows.prompt_ids) | set(policy_rows.prompt_ids)) - len(both)
    if left_out:
        log.warning("%d %s prompts have no response left of one of the policies, left out", left_out, split)
    if not both:
        raise InputError(f"no {split} prompt has responses of both the reference and the policy that take part")
    reference_rows, policy_rows = reference_rows.of_prompts(both), policy_rows.of_prompts(both)
    demands = [one.demand for one in solution.constraints]
    evaluation = evaluate_policy(
        reference=reference_rows,
        policy=policy_rows,
        log_ratio_n=log_ratios(run, policy_samples=samples, rows=policy_rows, split=split),
        solution=solution,
        constraints=demands,
        n_replicates=config.evaluation.bootstrap_replicates,
        rng=np.random.default_rng(config.seed),
    )
    policies = {"reference": (reference_rows, None), "realised": (policy_rows, None)}
    evaluation["prompts_left_out"] = left_out
    categories = prompt_categories(run)
    evaluation["by_category"] = judge_categories(
        statistics_by_category(policies, categories, reward=config.reward, constraints=demands),
        reference=reference_rows,
        policy=policy_rows,
        categories=categories,
        constraints=demands,
        tolerances=[entry["tolerance"] for entry in evaluation["constraints"]],
    )
    return evaluation


def gold_means(run: Run, *, samples: Path, split: str) -> dict[str, dict[str, float]]:
    """Means of the world's ground truth over the samples of a split, so that proxy and gold can be compared."""
    texts = {row["prompt_id"]: row["prompt"][-1]["content"] for row in run.prompts_table().to_pylist()}
    means: dict[str, dict[str, float]] = {}
    for role, folder in (("reference", run.samples), ("realised", samples)):
        table = run.samples_table(folder).read(split, columns=["prompt_id", "completion"])
        gold = [
            gold_scores(texts[prompt], completion)
            for prompt, completion in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
        ]
        for name in gold[0]:
            means.setdefault(name, {})[role] = float(np.mean([scores[name] for scores in gold]))
    return means
