"""The experiments about the dual itself: sample sizes, convergence, and the geometry of one constraint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.baselines import figures, policies
from pipeline.baselines.convergence import convergence_figure, convergence_table
from pipeline.baselines.geometry import (
    POLICIES,
    frontier_points,
    geometry_figure,
    multiplier_grid,
    supporting_line,
)
from pipeline.baselines.outcomes import read_outcome
from pipeline.baselines.results import Result, Rows
from pipeline.baselines.sample_sizes import sample_size_figure, sample_size_table
from pipeline.baselines.study import Study
from pipeline.contracts.problem import constraint_signs
from pipeline.planning.model_sizes import read_size
from pipeline.run.run import Run
from pipeline.scoring.demanded import read_demands
from pipeline.scoring.joined import reference_scores
from pipeline.steps.solve import reference_problem
from stage1_dual.dual import DualProblem

_DEFAULT = "default"
_KKT_TOLERANCE = 1e-8


_N_SUBSETS = 20


def sample_sizes(study: Study) -> Result:
    """Lambda* against the number of prompts and of responses, on the samples of all seeds together."""
    problem = _pooled_problem([study.base(seed) for seed in study.seeds])
    rng = np.random.default_rng(study.config.seed)
    table = sample_size_table(problem, margins=study.some_margins, n_draws=_N_SUBSETS, rng=rng)
    findings = []
    for margin in study.some_margins:
        rows = table.filter((pc.field("margin") == margin) & (pc.field("varied") == "responses")).sort_by(
            "n_responses"
        )
        few, all_of_them = rows.to_pylist()[0], rows.to_pylist()[-1]
        findings.append(
            f"margin {margin:g}: with {few['n_responses']} responses a prompt lambda* is "
            f"{_shown(few['plug_in_mean'])} plug-in and {_shown(few['corrected_mean'])} corrected (of the draws, "
            f"{1 - few['infeasible_share']:.0%} are feasible and {few['corrected_share']:.0%} corrected), with all "
            f"{all_of_them['n_responses']} "
            f"{_shown(all_of_them['plug_in_mean'])} and {_shown(all_of_them['corrected_mean'])}"
        )
    return Result(
        "sample_sizes",
        "Lambda* against the number of prompts and of responses",
        table,
        sample_size_figure(table),
        findings,
    )


def convergence(study: Study) -> Result:
    """The dual at the largest margin, by our solver and by projected gradient with the papers' steps."""
    base = study.base(study.seeds[0])
    problem = reference_problem(base, "train")
    problem = problem.with_thresholds(problem.reference_means_m + study.margins[-1])
    table = convergence_table(problem)
    findings = []
    for method in dict.fromkeys(table["method"].to_pylist()):
        rows = table.filter(pc.field("method") == method).sort_by("evaluation").to_pylist()
        reached = next((row["evaluation"] for row in rows if row["kkt_residual"] <= _KKT_TOLERANCE), None)
        ending = f"; {rows[-1]['ending']}" if rows[-1]["ending"] else ""
        findings.append(
            f"{method}: "
            + (f"{reached} evaluations of the dual" if reached is not None else f"not in {rows[-1]['evaluation']}")
            + f" to a KKT residual of {_KKT_TOLERANCE:g}{ending}"
        )
    return Result(
        "convergence",
        f"Convergence of the dual at a margin of {study.margins[-1]:g}",
        table,
        convergence_figure(table),
        findings,
        pa.Table.from_pylist(_last_rows(table)),
    )


def geometry(study: Study) -> Result:
    """Slack against value: frontier, supporting line and trained policies; the gap against the policy's size."""
    table, base = policies_in_the_plane(study)
    of_default = table.filter(pc.field("size") == _DEFAULT)
    problem = _test_problem(base, study.middle_margin)
    star = of_default["lambda_star"][0].as_py()
    figure = geometry_figure(
        frontier_points(problem, multiplier_grid(problem, star)),
        supporting_line(problem, star),
        of_default.select(POLICIES.names),
        looks=figures.LOOKS,
    )
    findings = [
        f"{row['size']} policy ({row['parameters']:,} weights), {row['method']}: lambda {row['lambda']:.3f} "
        f"(lambda* {row['lambda_star']:.3f}), slack {row['slack']:+.3f}, {row['gap']:.3f} reward units below the "
        f"line, {row['corrected_gap']:.3f} with D corrected for finitely many responses as in the closed fraction, "
        f"which is {row['closed_fraction']:.2f}"
        for row in table.to_pylist()
    ]
    return Result(
        "geometry",
        "The tilted optimum, the supporting line and the trained policies",
        table,
        figure,
        findings,
        table.drop_columns(["slack_ci95_low", "slack_ci95_high", "value_ci95_low", "value_ci95_high", "run"]),
    )


def policies_in_the_plane(study: Study) -> tuple[pa.Table, Run]:
    """One-shot and multi-shot policies of every size at one margin, and the base run of the default size.

    Of each policy its slack and its value E[r] - beta KL on the test prompts, and its ``gap``: how far it is below the
    supporting line at the one-shot's lambda*, which is D(lambda*) less its Lagrangian, beta E_x KL(pi || pi_lambda*)
    but for the error of D on finitely many responses. ``corrected_gap`` has D as in the closed fraction.
    """
    first = study.seeds[0]
    bases = {_DEFAULT: study.base(first)} | {
        name: study.base_of_size(name, size) for name, size in study.sizes.items()
    }
    rows: Rows = []
    for name, base in bases.items():
        arm = policies.one_shot(study.middle_margin)
        one = read_outcome(base, study.train(base, arm))
        multi = read_outcome(base, study.iterate(base, arm))
        star = one.multipliers["harmless"]
        line = supporting_line(_test_problem(base, study.middle_margin), star)
        optimum, reference = (one.evaluation["lagrangian"][key] for key in ("optimum", "reference"))
        for method, outcome in ((policies.ONE_SHOT, one), (policies.MULTI_SHOT, multi)):
            bound, reward = outcome.evaluation["constraints"][0], outcome.evaluation["reward"]
            kl = outcome.evaluation["kl"]
            value = reward["realised"] - base.config.given_beta * kl["realised"]
            # Of the same prompts: as wide as the difference's can be, whatever the two's correlation.
            half = (np.ptp(reward["ci95"]) + base.config.given_beta * np.ptp(kl["realised_ci95"])) / 2
            lagrangian = value + star * bound["slack"]
            rows.append(
                {
                    "size": name,
                    "parameters": read_size(Path(base.model(base.config.reference, "reference"))).parameters,
                    "method": method,
                    "lambda_star": star,
                    "lambda": outcome.multipliers["harmless"],
                    "slack": bound["slack"],
                    "slack_ci95_low": bound["ci95"][0] - bound["threshold"],
                    "slack_ci95_high": bound["ci95"][1] - bound["threshold"],
                    "value": value,
                    "value_ci95_low": value - half,
                    "value_ci95_high": value + half,
                    "gap": line.dual_value - lagrangian,
                    "corrected_gap": optimum - lagrangian,
                    "closed_fraction": (lagrangian - reference) / (optimum - reference),
                    "kl": kl["realised"],
                    "run": outcome.run.name,
                }
            )
    return pa.Table.from_pylist(rows), bases[_DEFAULT]


def _test_problem(base: Run, margin: float) -> DualProblem:
    problem = reference_problem(base, "test")
    return problem.with_thresholds(problem.reference_means_m + margin)


def _pooled_problem(bases: Sequence[Run]) -> DualProblem:
    """The train samples of several seeds as one set: the same prompts, with the responses of all seeds."""
    rows = [reference_scores(base, "train") for base in bases]
    constraints = read_demands(bases[0]).constraints
    prompts = np.concatenate([np.array(one.prompt_ids)[one.prompt_n] for one in rows])
    return DualProblem.from_rows(
        prompts,
        np.concatenate([one.reward_n for one in rows]),
        np.concatenate([one.scores_ns for one in rows]) * constraint_signs(constraints),
        thresholds=np.zeros(len(constraints)),
        beta=bases[0].config.given_beta,
        constraint_names=[constraint.name for constraint in constraints],
    )


def _last_rows(table: pa.Table) -> Rows:
    last = {row["method"]: row for row in table.sort_by("evaluation").to_pylist()}
    return list(last.values())


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
