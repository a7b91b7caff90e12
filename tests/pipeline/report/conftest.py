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
import pyarrow.parquet as pq
import pytest

from pipeline.contracts.artifacts import Manifest, write_json, write_manifest
from pipeline.contracts.problem import Constraint
from pipeline.contracts.shards import write_table
from pipeline.contracts.tables import PROMPTS, SAMPLES, prompt_id, tilted_schema
from pipeline.evaluation import ScoredSamples, evaluate_policy
from stage1_dual.dual import DualProblem, solve_dual
from stage1_dual.dual.dual_function import tilt
from stage1_dual.dual.frontier import solve_frontier

BETA = 1.0
COMPLETION = "Take a walk & call <someone> you trust."


@dataclass(frozen=True)
class BuiltRun:
    """A run on disk and what was written into it."""

    folder: Path
    dual: dict[str, Any]
    evaluation: dict[str, Any]
    training_log: list[dict[str, float]]


RunBuilder = Callable[..., BuiltRun]


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

    reference_m = scores_pkx[train, :, 1:].mean(axis=(0, 1)) * sign_m
    threshold_m = np.array([one.absolute_threshold(mean) for one, mean in zip(constraints, reference_m, strict=True)])
    problem = DualProblem.from_arrays(
        scores_pkx[train, :, 0], scores_pkx[train, :, 1:], thresholds=threshold_m * sign_m, beta=BETA
    )
    solution = solve_dual(problem)
    lam_star = solution.multipliers
    weight_pk = np.concatenate(
        [
            DualProblem.from_arrays(
                part[..., 0], part[..., 1:], thresholds=threshold_m * sign_m, beta=BETA
            ).tilted_weights(lam_star)
            for part in (scores_pkx[test], scores_pkx[train])
        ]
    )

    messages = [[{"role": "user", "content": f"Question {place}: what now? <b>&</b>"}] for place in range(n_prompts)]
    ids = [prompt_id(one) for one in messages]
    _write_tilted(folder, constraints, ids, messages, splits, scores_pkx * turn, weight_pk, completion)
    dual = _dual_record(constraints, threshold_m, reference_m, problem, solution, scores_pkx[test], rng)
    write_json(folder / "dual" / "dual.json", dual)
    _write_frontier(folder / "dual" / "frontier.parquet", dual, problem, sign_m)
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
    evaluation = {
        **evaluate_policy(
            reference=_scored(scores_pkx[test] * turn),
            policy=_scored(drawn * turn),
            log_ratio=list(log_ratio),
            reward_name="helpful",
            constraints=constraints,
            lam_star=lam_star,
            beta=BETA,
            n_replicates=200,
            rng=rng,
        ),
        "gold": {"helpful": {"reference": 0.31, "realised": 0.62}},
        "environment": {"python": "3.11", "torch": "2.13.0+cpu"},
        "inputs": {"policy": "cd" * 32},
    }
    log = _training_log(rng)
    if has_stage2:
        write_json(folder / "evaluation" / "evaluation.json", evaluation)
        write_json(folder / "policy" / "training_log.json", log)
        _write_policy_samples(folder, ids[:n_test], messages[:n_test], completion)
    return BuiltRun(folder, json.loads(json.dumps(dual)), json.loads(json.dumps(evaluation)), log)


def _scored(scores_pkx: np.ndarray) -> ScoredSamples:
    return ScoredSamples(reward=list(scores_pkx[..., 0]), constraints=list(scores_pkx[..., 1:]))


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
            "split": splits[p],
        }
        for p in range(len(ids))
        for k in range(weight_pk.shape[1])
    ]
    table = pa.Table.from_pylist(rows, schema=tilted_schema([one.name for one in constraints]))
    write_table(folder / "tilted", table, metadata={})


def _dual_record(
    constraints: Sequence[Constraint],
    threshold_m: np.ndarray,
    reference_m: np.ndarray,
    problem: DualProblem,
    solution: Any,
    test_pkx: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, Any]:
    sign_m = np.array([one.sign for one in constraints])
    tilted = tilt(problem, solution.multipliers)
    heldout = tilt(
        DualProblem.from_arrays(test_pkx[..., 0], test_pkx[..., 1:], thresholds=problem.thresholds_m, beta=BETA),
        solution.multipliers,
    )
    draws = _bootstrap(problem, rng)
    lam_low, lam_high = np.quantile([one.multipliers for one in draws], [0.025, 0.975], axis=0)
    reward_ends = np.quantile([one.predicted_reward for one in draws], [0.025, 0.975])
    constraint_ends = np.quantile([one.predicted_constraints * sign_m for one in draws], [0.025, 0.975], axis=0)
    return {
        "schema_version": "1",
        "status": "certified",
        "beta": BETA,
        "n_prompts": problem.n_prompts,
        "n_samples": problem.n_samples,
        "dual_value": solution.dual_value,
        "primal_value": solution.primal_value,
        "duality_gap": solution.duality_gap,
        "kkt_residual": solution.kkt_residual,
        "n_evaluations": solution.n_evaluations,
        "reward": {
            "name": "helpful",
            "reference": problem.reference_reward,
            "predicted": solution.predicted_reward,
            "predicted_ci95": reward_ends.tolist(),
            "heldout": float(heldout.reward_p.mean()),
        },
        "kl": {"predicted": solution.predicted_kl, "log_samples": float(np.log(problem.segments.counts_p).mean())},
        "constraints": [
            {
                "name": one.name,
                "direction": one.direction,
                "threshold": float(threshold_m[j]),
                "margin": one.margin,
                "reference": float(reference_m[j]),
                "multiplier": float(solution.multipliers[j]),
                "multiplier_ci95": [float(lam_low[j]), float(lam_high[j])],
                "predicted": float(solution.predicted_constraints[j] * sign_m[j]),
                "predicted_ci95": constraint_ends[:, j].tolist(),
                "heldout": float(heldout.scores_mp[j].mean() * sign_m[j]),
                "slack": float(solution.slack[j]),
            }
            for j, one in enumerate(constraints)
        ],
        "diagnostics": {
            "ess_median": float(np.median(tilted.ess_p)),
            "ess_fraction_below_2": float(np.mean(tilted.ess_p < 2)),
            "ess_quantiles": np.quantile(tilted.ess_p, [0.05, 0.5, 0.95]).tolist(),
        },
        "warnings": ["Only 27 prompts: intervals need at least 30 to mean what they say."],
        "inputs": {"scores": "ab" * 32},
        "environment": {"python": "3.11", "numpy": np.__version__},
    }


def _bootstrap(problem: DualProblem, rng: np.random.Generator) -> list[Any]:
    shape = (problem.n_prompts, -1)
    reward_pk = problem.centred_reward_n.reshape(shape) + problem.reward_shift_p[:, None]
    scores_pkm = np.stack(
        [
            centred.reshape(shape) + shift[:, None]
            for centred, shift in zip(problem.centred_scores_mn, problem.score_shift_mp, strict=True)
        ],
        axis=-1,
    )
    found = []
    for _ in range(40):
        rows = rng.integers(problem.n_prompts, size=problem.n_prompts)
        found.append(
            solve_dual(
                DualProblem.from_arrays(reward_pk[rows], scores_pkm[rows], thresholds=problem.thresholds_m, beta=BETA)
            )
        )
    return found


def _write_frontier(path: Path, dual: dict[str, Any], problem: DualProblem, sign_m: np.ndarray) -> None:
    bounds = dual["constraints"]
    rows: list[dict[str, Any]] = []
    for j, bound in enumerate(bounds):
        # Past what the samples can attain, so that the infeasible end is there too.
        grid_g = problem.reference_means_m[j] + problem.score_scale_m[j] * np.linspace(-1.0, 3.5, 31)
        thresholds_gm = np.tile(problem.thresholds_m, (len(grid_g), 1))
        thresholds_gm[:, j] = grid_g
        found = solve_frontier(problem, thresholds_gm)
        for g in range(len(grid_g)):
            feasible = found.status_g[g] == "certified"
            values = {
                "reward": found.reward_g[g],
                "kl": found.kl_g[g],
                "dual_value": found.dual_value_g[g],
                "ess_median": found.ess_median_g[g],
                "kkt_residual": found.kkt_residual_g[g],
                **{f"multiplier_{one['name']}": found.multipliers_gm[g, i] for i, one in enumerate(bounds)},
                **{f"predicted_{one['name']}": found.constraints_gm[g, i] * sign_m[i] for i, one in enumerate(bounds)},
            }
            threshold = float(grid_g[g] * sign_m[j])
            rows.append(
                {
                    "constraint": bound["name"],
                    "threshold": threshold,
                    "margin": threshold - bound["reference"],
                    "feasible": bool(feasible),
                    **{name: float(value) if feasible else None for name, value in values.items()},
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


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


def _write_policy_samples(folder: Path, ids: Sequence[str], messages: Sequence[Any], completion: str) -> None:
    prompts = [
        {"prompt_id": one, "prompt": text, "split": "test", "source": "gaussian", "category": "none"}
        for one, text in zip(ids, messages, strict=True)
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
        for k in range(3)
    ]
    table = pa.Table.from_pylist(samples, schema=SAMPLES)
    write_table(
        folder / "evaluation" / "samples",
        table.append_column(pa.field("split", pa.string(), nullable=False), pa.array(["test"] * table.num_rows)),
        metadata={},
    )
