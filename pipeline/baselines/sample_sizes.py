"""How lambda* depends on how many prompts and how many responses it is solved on, plug-in and bias-corrected.

Subsets are drawn without replacement from the samples of one problem, and each is treated as a user with only these
samples would treat it: a margin is over the subset's own reference mean, and the correction is the half-sample
jackknife on the subset's own responses. The standard deviation over subsets tells how lambda* scatters among them; as
subsets of the same samples overlap, it understates that of fresh samples, the more the larger the subset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from pipeline.baselines.palette import SERIES
from pipeline.contracts.errors import InputError
from pipeline.report.style import GREY, INK, new_figure, paper_style
from stage1_dual.dual import (
    DualProblem,
    InfeasibleError,
    NotCertifiedError,
    SampleBlock,
    SampleScores,
    climb_ladder,
    solve_dual,
)

SAMPLE_SIZES = pa.schema(
    [
        pa.field("varied", pa.string(), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
        pa.field("n_prompts", pa.int64(), nullable=False),
        pa.field("n_responses", pa.int64(), nullable=False),
        pa.field("n_subsets", pa.int64(), nullable=False),
        pa.field("infeasible_share", pa.float64(), nullable=False),
        pa.field("not_certified_share", pa.float64(), nullable=False),
        pa.field("corrected_share", pa.float64(), nullable=False),
        pa.field("plug_in_mean", pa.float64()),
        pa.field("plug_in_sd", pa.float64()),
        pa.field("corrected_mean", pa.float64()),
        pa.field("corrected_sd", pa.float64()),
        pa.field("ess_median", pa.float64()),
    ]
)
"""One row for each size and margin.

``varied`` is "responses" (at all prompts) or "prompts" (at all responses); the row of all samples occurs in both.
``n_responses`` is the median per prompt. Means are over the subsets that have a value, null where none has: where
``infeasible_share`` is not 0, only the luckier subsets speak. ``corrected_share`` is that of the subsets whose
correction is trustworthy by the rule of stage 1. Standard deviations are null for fewer than two values. lambda* is in
reward per score unit; ``ess_median`` is the mean over subsets of the median effective sample size of a prompt.
"""

SMALLEST_RESPONSES = 8
PROMPT_SIZES = (50, 100, 200, 400, 800, 1600)


@dataclass(frozen=True)
class _Size:
    """How many prompts and responses a subset has; None is all."""

    varied: str
    n_prompts: int | None
    n_responses: int | None


@dataclass(frozen=True)
class _Found:
    """What one subset says about one margin."""

    status: str
    plug_in: float = np.nan
    corrected: float = np.nan
    ess: float = np.nan


def sample_size_table(
    problem: DualProblem,
    *,
    margins: Sequence[float],
    n_draws: int,
    rng: np.random.Generator,
    prompt_sizes: Sequence[int] = PROMPT_SIZES,
) -> pa.Table:
    """Lambda* of random subsets of the samples, for several margins.

    Responses double from 8 up to all, at all prompts; prompts take the sizes given and all, at all responses. A prompt
    with fewer responses than asked for keeps those it has. Infeasible subsets are counted, not dropped.

    Args:
        problem: the scored samples and beta; its own threshold is not used.
        margins: over the reference mean of the subset, score units, higher is better.
        n_draws: subsets of each size; all samples are one.
        rng: draws them.
        prompt_sizes: numbers of prompts; those not below the problem's are left out.

    Returns:
        Rows of ``SAMPLE_SIZES``.

    Raises:
        InputError: the problem has not one constraint, no margin is given, or ``n_draws`` is not positive.
    """
    if problem.n_constraints != 1:
        raise InputError(f"`problem` has {problem.n_constraints} constraints; the table is for one")
    if not margins or n_draws < 1:
        raise InputError(f"`margins` is {list(margins)} and `n_draws` {n_draws}; both must have at least one")
    samples = _Samples.gather(problem)
    rows: list[dict[str, Any]] = []
    for size in _sizes(samples, prompt_sizes):
        n_subsets = 1 if size.n_prompts is None and size.n_responses is None else n_draws
        subsets = [samples.draw(rng, size) for _ in range(n_subsets)]
        n_prompts = subsets[0].n_prompts
        n_responses = round(float(np.median([np.median(subset.samples.counts_p) for subset in subsets])))
        for margin in margins:
            found = [_solve(subset, margin) for subset in subsets]
            rows.append(
                {
                    "varied": size.varied,
                    "margin": float(margin),
                    "n_prompts": n_prompts,
                    "n_responses": n_responses,
                    **_summarise(found),
                }
            )
    return pa.Table.from_pylist(rows, schema=SAMPLE_SIZES)


def sample_size_figure(table: pa.Table) -> Figure:
    """Lambda* against the number of responses, and of prompts, with bars of one standard deviation over subsets.

    Filled marks are plug-in, hollow ones corrected. The dashed line of a margin is its answer from all samples:
    corrected where there is a correction. A cross at the top says that some subsets of that size are infeasible.

    Args:
        table: rows of ``SAMPLE_SIZES``.
    """
    margins = sorted(set(table["margin"].to_pylist()))
    with paper_style():
        figure = new_figure(height_inches=4.4)
        panels = figure.subplots(2, 1, sharey=True)
        for axes, varied in zip(panels, ("responses", "prompts"), strict=True):
            rows = table.filter(pc.equal(table["varied"], varied))
            sizes = sorted(set(rows[f"n_{varied}"].to_pylist()))
            for place, margin in enumerate(margins):
                _draw_margin(axes, rows.filter(pc.equal(rows["margin"], margin)), varied, place, len(margins))
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(sizes, [f"{size}" for size in sizes])
            axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
            axes.set_ylabel("λ* (reward per score)")
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        top = panels[0].get_ylim()[1]
        panels[0].set_ylim(-0.02 * top, top)
        panels[0].set_xlabel(f"responses per prompt ({_largest(table, 'prompts')} prompts)")
        panels[1].set_xlabel(f"prompts ({_largest(table, 'responses')} responses each)")
        _legend(figure, margins, has_infeasible=pc.max(table["infeasible_share"]).as_py() > 0)
    return figure


@dataclass(frozen=True, eq=False)
class _Samples:
    """All rows of a problem, prompt by prompt: reward and score, shape (n,); responses of each prompt, shape (p,)."""

    problem: DualProblem
    reward_n: np.ndarray
    score_n: np.ndarray
    counts_p: np.ndarray

    @classmethod
    def gather(cls, problem: DualProblem) -> _Samples:
        parts = list(problem.samples.map(_raw_rows))
        reward_n, score_n, counts_p = (np.concatenate([part[place] for part in parts]) for place in range(3))
        return cls(problem, reward_n, score_n, counts_p)

    def draw(self, rng: np.random.Generator, size: _Size) -> DualProblem:
        """The problem of a random subset; its threshold is meaningless."""
        n_prompts = len(self.counts_p)
        prompts = np.arange(n_prompts)
        if size.n_prompts is not None:
            prompts = np.sort(rng.choice(n_prompts, size=size.n_prompts, replace=False))
        starts_p = np.cumsum(self.counts_p) - self.counts_p
        chosen = [starts_p[p] + _places(rng, int(self.counts_p[p]), size.n_responses) for p in prompts]
        rows = np.concatenate(chosen)
        samples = SampleScores.in_memory(
            self.reward_n[rows],
            self.score_n[rows, np.newaxis],
            np.array([len(places) for places in chosen], dtype=np.int64),
        )
        return self.problem.with_samples(samples)


def _raw_rows(block: SampleBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts_p = block.segments.counts_p
    reward_n = block.reward_n + np.repeat(block.reward_shift_p, counts_p)
    return reward_n, block.scores_mn[0] + np.repeat(block.score_shift_mp[0], counts_p), counts_p


def _places(rng: np.random.Generator, n_responses: int, wanted: int | None) -> np.ndarray:
    """Which responses of a prompt a subset keeps, in their own order: the correction deals them out by it."""
    return np.arange(n_responses) if wanted is None else np.sort(rng.permutation(n_responses)[:wanted])


def _sizes(samples: _Samples, prompt_sizes: Sequence[int]) -> Iterator[_Size]:
    n_responses = SMALLEST_RESPONSES
    while n_responses < np.median(samples.counts_p):
        yield _Size("responses", None, n_responses)
        n_responses *= 2
    yield _Size("responses", None, None)
    for n_prompts in sorted(set(prompt_sizes)):
        if n_prompts < len(samples.counts_p):
            yield _Size("prompts", n_prompts, None)
    yield _Size("prompts", None, None)


def _solve(subset: DualProblem, margin: float) -> _Found:
    problem = subset.with_thresholds(subset.reference_means_m + margin)
    try:
        solution = solve_dual(problem)
    except InfeasibleError:
        return _Found("infeasible")
    except NotCertifiedError:
        return _Found("not certified")
    corrected_m = climb_ladder(problem, solution).corrected_multipliers_m
    return _Found(
        "certified",
        plug_in=float(solution.multipliers[0]),
        corrected=np.nan if corrected_m is None else float(corrected_m[0]),
        ess=float(np.median(solution.ess_p)),
    )


def _summarise(found: Sequence[_Found]) -> dict[str, Any]:
    n_subsets = len(found)
    corrected = [one.corrected for one in found if not np.isnan(one.corrected)]
    plug_in = [one.plug_in for one in found if one.status == "certified"]
    return {
        "n_subsets": n_subsets,
        "infeasible_share": sum(one.status == "infeasible" for one in found) / n_subsets,
        "not_certified_share": sum(one.status == "not certified" for one in found) / n_subsets,
        "corrected_share": len(corrected) / n_subsets,
        "plug_in_mean": _mean(plug_in),
        "plug_in_sd": _sd(plug_in),
        "corrected_mean": _mean(corrected),
        "corrected_sd": _sd(corrected),
        "ess_median": _mean([one.ess for one in found if one.status == "certified"]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _largest(table: pa.Table, counted: str) -> int:
    return int(pc.max(table[f"n_{counted}"]).as_py())


def _draw_margin(axes: Axes, rows: pa.Table, varied: str, place: int, n_margins: int) -> None:
    rows = rows.sort_by(f"n_{varied}")
    color, marker = SERIES[place % len(SERIES)]
    whole = rows.slice(rows.num_rows - 1).to_pylist()[0]
    answer = whole["plug_in_mean"] if whole["corrected_mean"] is None else whole["corrected_mean"]
    if answer is not None:
        axes.axhline(answer, color=color, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    # Side by side, or the bars of two estimators and of neighbouring margins hide one another.
    sizes = rows[f"n_{varied}"].to_numpy().astype(np.float64)
    width = 0.02 * np.log(1.25**2 * sizes[-1] / sizes[0])
    centre = 2.2 * width * (place - (n_margins - 1) / 2)
    for name, shift, face in (("plug_in", -width / 2, color), ("corrected", width / 2, "white")):
        mean, sd = (_floats(rows[f"{name}_{figure}"]) for figure in ("mean", "sd"))
        axes.errorbar(
            sizes * np.exp(centre + shift),
            mean,
            yerr=np.nan_to_num(sd),
            fmt=marker,
            color=color,
            markerfacecolor=face,
            markersize=3.5,
            elinewidth=0.8,
            capsize=1.5,
            zorder=4,
        )
    lost = sizes[rows["infeasible_share"].to_numpy() > 0] * np.exp(centre)
    axes.scatter(lost, np.full_like(lost, 0.97), s=14, c=color, marker="x", transform=axes.get_xaxis_transform())


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)


def _legend(figure: Figure, margins: Sequence[float], *, has_infeasible: bool) -> None:
    """Margins by colour, estimators by filling; above the panels."""
    mark = partial(Line2D, [], [], linestyle="", markersize=4)
    entries = []
    for place, margin in enumerate(margins):
        color, marker = SERIES[place % len(SERIES)]
        entries.append(mark(color=color, marker=marker, label=f"margin {margin:g}"))
    entries.append(mark(color=GREY, marker="o", label="plug-in (sd)"))
    entries.append(mark(color=GREY, marker="o", markerfacecolor="white", label="corrected (sd)"))
    entries.append(Line2D([], [], color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), label="from all samples"))
    if has_infeasible:
        entries.append(mark(color=INK, marker="x", label="some infeasible"))
    figure.legend(handles=entries, loc="outside upper center", ncols=3)
