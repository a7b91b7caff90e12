"""A dual that is normalised over all prompts at once, as some published methods have it, and what it realises.

D(lambda) = beta log E_{x, y} exp{(r + <lambda, g - b>)/beta} is the dual of a problem over joint distributions p(x, y)
near p(x) pi_ref(y|x) (arXiv 2510.10020). Its optimum meets the demand by giving more weight to prompts whose responses
score well, which no policy can: a policy answers every prompt it is asked. What a policy gets from its multipliers is
the tilt within each prompt at a lambda that is too small.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.baselines.results import Result, Rows
from pipeline.baselines.study import Study
from pipeline.report.style import BLUE, INK, VERMILLION, few_ticks, legend_above, new_figure, paper_style
from pipeline.scoring.joined import JoinedScores, reference_scores
from pipeline.steps.solve import reference_problem
from stage1_dual.dual import DualProblem, InfeasibleError, solve_dual, threshold_at_multipliers

PER_PROMPT = "normalised by prompt"
GLOBAL = "normalised over all prompts"


def global_normalisation(study: Study) -> Result:
    """Of each seed and margin the multiplier by either dual, and the gain of the policy that is tilted by it."""
    rows: Rows = []
    for seed in study.seeds:
        base = study.base(seed)
        train, test = (reference_problem(base, split) for split in ("train", "test"))
        whole = over_all_prompts(reference_scores(base, "train"), train)
        for margin in study.margins:
            thresholds = train.reference_means_m + margin
            for method, problem in ((PER_PROMPT, train), (GLOBAL, whole)):
                try:
                    multipliers = solve_dual(problem.with_thresholds(thresholds)).multipliers
                except InfeasibleError:  # of the few responses of a quick study
                    continue
                gains = [gain(one, multipliers) for one in (train, test)]
                rows.append(
                    {
                        "method": method,
                        "seed": seed,
                        "demanded": margin,
                        "lambda": float(multipliers[0]),
                        "gain_train": gains[0],
                        "gain_test": gains[1],
                        "realised_share": gains[0] / margin,
                    }
                )
    table = pa.Table.from_pylist(rows)
    return Result(
        "global_normalisation",
        "The dual normalised over all prompts at once",
        table,
        normalisation_figure(table),
        _findings(rows),
    )


def over_all_prompts(rows: JoinedScores, problem: DualProblem) -> DualProblem:
    """The same responses as if they were all of one prompt: the dual that is normalised over all of them.

    Args:
        rows: the responses, as many to each prompt, so that each of them weighs the same; scores in the user's own
            direction, which must be that of the problem.
        problem: of the same responses.
    """
    return DualProblem.from_rows(
        np.zeros(len(rows.reward_n), dtype=np.int64),
        rows.reward_n,
        rows.scores_ns,
        thresholds=problem.thresholds_m,
        beta=problem.beta,
        constraint_names=problem.constraint_names,
    )


def gain(problem: DualProblem, multipliers: np.ndarray) -> float:
    """What the policy tilted by the multipliers has of the constraint's score over the reference, score units."""
    return float((threshold_at_multipliers(problem, multipliers) - problem.reference_means_m)[0])


def normalisation_figure(table: pa.Table) -> Figure:
    """The share of the demanded gain that a policy tilted by either multiplier has, on the samples of the dual."""
    with paper_style():
        figure = new_figure(height_inches=2.6)
        axes = figure.subplots()
        for method, color, marker in ((PER_PROMPT, BLUE, "o"), (GLOBAL, VERMILLION, "s")):
            rows = [row for row in table.to_pylist() if row["method"] == method]
            axes.plot(
                [row["demanded"] for row in rows],
                [row["realised_share"] for row in rows],
                marker,
                color=color,
                markersize=4,
                label=method,
            )
        axes.axhline(1.0, color=INK, linewidth=0.6)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("demanded gain of harmlessness (score)")
        axes.set_ylabel("share of it that a policy has")
        few_ticks(axes)
        legend_above(figure, axes, columns=2)
    return figure


def _findings(rows: Rows) -> list[str]:
    findings = []
    for method in (GLOBAL, PER_PROMPT):
        own = [row for row in rows if row["method"] == method]
        if not own:
            findings.append(f"{method}: no margin of this study is feasible")
            continue
        shares = [row["realised_share"] for row in own]
        short = [row["demanded"] - row["gain_test"] for row in own]
        findings.append(
            f"{method}: a policy tilted by its multiplier has {min(shares):.1%} to {max(shares):.1%} of the demanded "
            f"gain on the samples that the dual was solved on; on the test prompts it is {np.mean(short):+.3f} score "
            f"units short in the mean (lambda {own[0]['lambda']:.3f} at a margin of {own[0]['demanded']:g}, "
            f"{own[-1]['lambda']:.3f} at {own[-1]['demanded']:g})"
        )
    return findings
