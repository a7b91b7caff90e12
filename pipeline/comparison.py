"""A trained policy's scored samples against the reference's, on the prompts of one split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.categories import means_by_category, prompt_categories
from pipeline.contracts.errors import InputError
from pipeline.evaluation import ScoredSamples, evaluate_policy
from pipeline.log_ratios import log_ratios
from pipeline.microworld import gold_scores
from pipeline.run import Run, log
from pipeline.run_scores import policy_scores, reference_scores
from pipeline.scores import ScoredRows


def compare_policy(run: Run, *, dual: Mapping[str, Any], samples: Path, scores: Path, split: str) -> dict[str, Any]:
    """What the run's policy does beside what the reference does and what the dual predicted.

    Args:
        run: the run; its demands are judged.
        dual: content of its ``dual.json``, which gives lambda* and beta.
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
    evaluation = evaluate_policy(
        reference=_by_prompt(reference_rows),
        policy=_by_prompt(policy_rows),
        log_ratio=log_ratios(run, policy_samples=samples, rows=policy_rows, split=split),
        reward_name=dual["reward"]["name"],
        constraints=config.demanded_constraints(),
        lam_star=np.array([entry["multiplier"] for entry in dual["constraints"]]),
        beta=dual["beta"],
        n_replicates=config.evaluation.bootstrap_replicates,
        rng=np.random.default_rng(config.seed),
    )
    policies = {"reference": (reference_rows, None), "realised": (policy_rows, None)}
    names = (config.reward, *config.constraints)
    evaluation["prompts_left_out"] = left_out
    evaluation["by_category"] = means_by_category(policies, prompt_categories(run), names=names)
    return evaluation


def _by_prompt(rows: ScoredRows) -> ScoredSamples:
    _, reward, constraints = rows.by_prompt()
    return ScoredSamples(reward, constraints)


def gold_means(run: Run, *, samples: Path, split: str) -> dict[str, dict[str, float]]:
    """Means of the world's ground truth over the samples of a split, so that proxy and gold can be compared."""
    texts = {row["prompt_id"]: row["prompt"][-1]["content"] for row in run.prompts_table().to_pylist()}
    means: dict[str, dict[str, float]] = {}
    for role, folder in (("reference", run.folder / "samples"), ("realised", samples)):
        table = run.samples_table(folder).read(split, columns=["prompt_id", "completion"])
        gold = [
            gold_scores(texts[prompt], completion)
            for prompt, completion in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
        ]
        for name in gold[0]:
            means.setdefault(name, {})[role] = float(np.mean([scores[name] for scores in gold]))
    return means
