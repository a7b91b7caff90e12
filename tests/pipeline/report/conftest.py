"""Runs with Gaussian scores: small, and real in every part that the report reads.

The reference policy draws scores from N(mean of the prompt, C); its tilt by exp{<(1, lam), y>/beta} is that Gaussian
with its mean moved by C (1, lam) / beta, so a trained policy can be drawn exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts.artifacts import Manifest, write_json, write_manifest
from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.shards import write_table
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import PROMPTS, SAMPLES, SCORES, prompt_id, tilted_schema
from pipeline.dual.posing import pose
from pipeline.dual.solving import EvaluationSize, solve_problem, tilted_weights
from pipeline.dual.sweep import sweep_constraints, write_frontier
from pipeline.evaluation import evaluate_policy, judge_categories
from pipeline.report.solved import ReportedSolution
from pipeline.scoring.categories import statistics_by_category
from pipeline.scoring.joined import JoinedScores

BETA = 1.0
CATEGORIES = ("family", "work")
COMPLETION = "Take a walk & call <someone> you trust."


@dataclass(frozen=True)
class BuiltRun:
    """A run on disk and what was written into it."""

    folder: Path
    dual: dict[str, Any]
    evaluation: dict[str, Any]
    training_log: list[dict[str, float]]

    @property
    def solved(self) -> ReportedSolution:
        """The dual as the report reads it."""
        return ReportedSolution.from_document(self.dual)


RunBuilder = Callable[..., BuiltRun]


@pytest.fixture(scope="session")
def one_bound(build_run: RunBuilder) -> BuiltRun:
    """A margin that binds and is nearly met, after both stages."""
    return build_run([Constraint("harmless", ">=", margin=0.8)])


@pytest.fixture(scope="session")
def two_bounds(build_run: RunBuilder) -> BuiltRun:
    """A margin and an absolute upper bound, both missed by a policy that went half of the way."""
    return build_run(
        [Constraint("harmless", ">=", margin=0.8), Constraint("toxicity", "<=", threshold=-0.2)], achieved=0.5
    )


@pytest.fixture(scope="session")
def build_run(tmp_path_factory: pytest.TempPathFactory) -> RunBuilder:
    def build(
        constraints: Sequence[Constraint],
        *,
        achieved: float = 0.95,
        has_stage2: bool = True,
        completion: str = COMPLETION,
        n_prompts: int = 40,
        n_samples: int = 48,
    ) -> BuiltRun:
        folder = tmp_path_factory.mktemp("runs") / "gaussian"
        return _build_run(folder, constraints, achieved, has_stage2, completion, n_prompts, n_samples)

    return build


def _build_run(
    folder: Path,
    constraints: Sequence[Constraint],
    achieved: float,
    has_stage2: bool,
    completion: str,
    n_prompts: int,
    n_samples: int,
) -> BuiltRun:
    rng = np.random.default_rng(7)
    n_constraints = len(constraints)
    sign_m = np.array([constraint.sign for constraint in constraints])
    # In turned units every constraint conflicts with the reward; the user sees a `<=` score with its own sign.
    cov = np.eye(1 + n_constraints)
    cov[0, 1:] = cov[1:, 0] = -0.46
    turn = np.concatenate([[1.0], sign_m])
    sd = np.concatenate([[1.4], np.full(n_constraints, 1.2)])
    cov = cov * np.outer(sd, sd)
    mean_px = rng.normal(0.0, 0.6, (n_prompts, 1 + n_constraints))
    n_test = n_prompts // 3
    splits = ["test"] * n_test + ["train"] * (n_prompts - n_test)
    scores_pkx = mean_px[:, None, :] + rng.multivariate_normal(
        np.zeros(1 + n_constraints), cov, (n_prompts, n_samples)
    )
    train, test = slice(n_test, None), slice(None, n_test)
    messages = [[{"role": "user", "content": f"Question {place}: what now? <b>&</b>"}] for place in range(n_prompts)]
    ids = [prompt_id(one) for one in messages]

    rows = {
        split: _rows(ids[part], scores_pkx[part] * turn, constraints)
        for split, part in (("train", train), ("test", test))
    }
    problems = {split: pose(rows[split], constraints=constraints, beta=BETA) for split in rows}
    solved = solve_problem(
        problems["train"],
        heldout=problems["test"],
        reward_name="helpful",
        safeguards=[Safeguard()] * n_constraints,
        evaluation=EvaluationSize(n_test, n_samples),
        corrects_response_bias=False,
        n_replicates=200,
        rng=rng,
    )
    dual, problem = solved.content, solved.problem
    solution = Solution.from_document(dual)
    lam_star = solution.multipliers_m
    weight_pk = np.concatenate(
        [tilted_weights(rows[split], solution).reshape(-1, n_samples) for split in ("test", "train")]
    )
    dual |= {"inputs": {"scores": "ab" * 32}, "environment": {"python": "3.11", "numpy": np.__version__}}
    _write_tilted(folder, constraints, ids, messages, splits, scores_pkx * turn, weight_pk, completion)
    write_json(folder / "dual" / "dual.json", dual)
    frontier = sweep_constraints(solved.posed, n_points=31)
    write_frontier(folder / "dual" / "frontier.parquet", frontier, metadata={})
    write_manifest(
        folder / "dual",
        Manifest(
            step="solve",
            run="gaussian",
            settings={"beta": BETA},
            inputs={"scores": "ab" * 32},
            files={},
            counts={"rows": problem.n_samples},
            wall_seconds=1.25,
        ),
    )

    shift = achieved * cov @ np.concatenate([[1.0], lam_star]) / BETA
    noise = rng.multivariate_normal(np.zeros(1 + n_constraints), cov, (n_test, n_samples))
    drawn = mean_px[test, None, :] + shift + noise
    pull = np.linalg.solve(cov, shift)
    log_ratio = noise @ pull + 0.5 * shift @ pull
    policy_rows = _rows(ids[test], drawn * turn, constraints)
    categories = {one: CATEGORIES[place % 2] for place, one in enumerate(ids)}
    judged = evaluate_policy(
        reference=rows["test"],
        policy=policy_rows,
        log_ratio_n=log_ratio.reshape(-1),
        solution=solution,
        constraints=constraints,
        n_replicates=200,
        rng=rng,
    )
    evaluation = {
        **judged,
        "by_category": judge_categories(
            statistics_by_category(
                {"reference": (rows["test"], None), "realised": (policy_rows, None)},
                {one: categories[one] for one in ids[test]},
                reward="helpful",
                constraints=constraints,
            ),
            reference=rows["test"],
            policy=policy_rows,
            categories=categories,
            constraints=constraints,
            tolerances=[entry["tolerance"] for entry in judged["constraints"]],
        ),
        "gold": {"helpful": {"reference": 0.31, "realised": 0.62}},
        "environment": {"python": "3.11", "torch": "2.13.0+cpu"},
        "inputs": {"policy": "cd" * 32},
    }
    log = _training_log(rng)
    if has_stage2:
        write_json(folder / "evaluation" / "evaluation.json", evaluation)
        write_json(folder / "policy" / "training_log.json", log)
        _write_policy_samples(folder, ids[:n_test], messages[:n_test], completion, drawn * turn, constraints)
    return BuiltRun(folder, json.loads(json.dumps(dual)), json.loads(json.dumps(evaluation)), log)


def _rows(ids: Sequence[str], scores_pkx: np.ndarray, constraints: Sequence[Constraint]) -> JoinedScores:
    n_prompts, n_samples, _ = scores_pkx.shape
    flat_nx = scores_pkx.reshape(n_prompts * n_samples, -1)
    return JoinedScores(
        prompt_ids=tuple(ids),
        prompt_n=np.repeat(np.arange(n_prompts), n_samples),
        sample_index_n=np.tile(np.arange(n_samples), n_prompts),
        reward_n=flat_nx[:, 0],
        score_names=tuple(one.statistic.score for one in constraints),
        scores_ns=flat_nx[:, 1:],
        cut_off_n=np.zeros(len(flat_nx), dtype=bool),
    )


def _write_tilted(
    folder: Path,
    constraints: Sequence[Constraint],
    ids: Sequence[str],
    messages: Sequence[Any],
    splits: Sequence[str],
    scores_pkx: np.ndarray,
    weight_pk: np.ndarray,
    completion: str,
) -> None:
    rows = [
        {
            "prompt_id": ids[p],
            "sample_index": k,
            "prompt": messages[p],
            "completion": f"{completion} ({k})",
            "reward": scores_pkx[p, k, 0],
            **{f"constraint_{one.name}": scores_pkx[p, k, 1 + j] for j, one in enumerate(constraints)},
            "weight": weight_pk[p, k],
            "category": CATEGORIES[p % 2],
            "split": splits[p],
        }
        for p in range(len(ids))
        for k in range(weight_pk.shape[1])
    ]
    table = pa.Table.from_pylist(rows, schema=tilted_schema([one.name for one in constraints]))
    write_table(folder / "tilted", table, metadata={})


def _training_log(rng: np.random.Generator) -> list[dict[str, float]]:
    """The form of a Trainer's log history, with the reference at step 0."""
    log: list[dict[str, float]] = [{"step": 0, "epoch": 0.0, "eval_loss": 46.1, "eval_closed_fraction": 0.0}]
    for step in range(2, 241, 2):
        fitted = 1.0 - np.exp(-step / 45)
        log.append({"step": step, "epoch": step / 240, "loss": 46.0 - 2.9 * fitted + rng.normal(0, 0.35)})
        if step % 20 == 0:
            log.append(
                {
                    "step": step,
                    "epoch": step / 240,
                    "eval_loss": 46.1 - 2.6 * fitted + 0.25 * max(0.0, step / 160 - 1.0),
                    "eval_closed_fraction": 0.93 * fitted - 0.06 * max(0.0, step / 160 - 1.0),
                }
            )
    log.append({"step": 240, "epoch": 1.0, "train_loss": 43.7, "train_runtime": 61.0})
    return log


def _write_policy_samples(
    folder: Path,
    ids: Sequence[str],
    messages: Sequence[Any],
    completion: str,
    scores_pkx: np.ndarray,
    constraints: Sequence[Constraint],
) -> None:
    prompts = [
        {"prompt_id": one, "prompt": text, "split": "test", "source": "gaussian", "category": CATEGORIES[place % 2]}
        for place, (one, text) in enumerate(zip(ids, messages, strict=True))
    ]
    write_table(folder / "prompts", pa.Table.from_pylist(prompts, schema=PROMPTS), metadata={})
    samples = [
        {
            "prompt_id": one,
            "sample_index": k,
            "completion": f"Trained: {completion} ({k})",
            "prompt_token_ids": [1, 2],
            "completion_token_ids": [3, 4],
            "finish_reason": "stop",
            "seed": k,
            "sampler_logp": -3.0,
        }
        for one in ids
        for k in range(scores_pkx.shape[1])
    ]
    _write_test_rows(folder / "evaluation" / "samples", pa.Table.from_pylist(samples, schema=SAMPLES))
    for place, name in enumerate(("helpful", *(one.name for one in constraints))):
        scores = [
            {
                "prompt_id": one,
                "sample_index": k,
                "value": float(scores_pkx[p, k, place]),
                "scored_sha256": "",
                "truncated": False,
            }
            for p, one in enumerate(ids)
            for k in range(scores_pkx.shape[1])
        ]
        _write_test_rows(folder / "evaluation" / "scores" / name, pa.Table.from_pylist(scores, schema=SCORES))


def _write_test_rows(folder: Path, table: pa.Table) -> None:
    split = pa.array(["test"] * table.num_rows)
    write_table(folder, table.append_column(pa.field("split", pa.string(), nullable=False), split), metadata={})
