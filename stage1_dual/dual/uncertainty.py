"""How certain a solution is, before and after the correction for finitely many responses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from stage1_dual.dual.inference import BootstrapIntervals, PromptSample, ResponseBias, StandardErrors
from stage1_dual.dual.response_ladder import ResponseLadder, climb_ladder
from stage1_dual.dual.tightening import TightenedSolution, correct_response_bias


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """A solution, corrected or as it was, and how certain it is.

    Attributes:
        tightened: the problem solved and its solution.
        ladder: over the number of responses, of the solution before any correction.
        intervals: by the bootstrap. Those of lam* and beta are about what was asked, for the solution that was asked
            for, and those of the policy about the policy of ``tightened``.
        errors: by the sandwich, of ``tightened``.
        bias: what the intervals of the policy were moved by, so that a point may be moved with them; None where they
            were not.
    """

    tightened: TightenedSolution
    ladder: ResponseLadder
    intervals: BootstrapIntervals
    errors: StandardErrors
    bias: ResponseBias | None


def quantify_uncertainty(
    tightened: TightenedSolution,
    *,
    thresholds_are_relative_m: ArrayLike,
    corrects_response_bias: bool,
    n_replicates: int,
    rng: np.random.Generator,
) -> Uncertainty:
    """Climb the ladder, correct lam* for finitely many responses where that is asked for and possible, draw intervals.

    Args:
        tightened: the problem solved and its solution.
        thresholds_are_relative_m: as in :meth:`PromptSample.gather`.
        corrects_response_bias: take the corrected multipliers where the ladder has them.
        n_replicates: bootstrap replicates over prompts.
        rng: source of the bootstrap.

    Raises:
        InputError: fewer than two prompts or two replicates.
        NotCertifiedError: float64 does not suffice for the corrected problem.
    """
    ladder = climb_ladder(tightened.problem, tightened.solution)
    prompts = PromptSample.gather(
        tightened.problem, tightened.solution, thresholds_are_relative_m=thresholds_are_relative_m
    )
    bias = ladder.bias
    intervals = prompts.bootstrap_intervals(rng=rng, n_replicates=n_replicates, bias=bias)
    if corrects_response_bias and ladder.bias is not None:
        tightened = correct_response_bias(tightened, ladder)
        prompts = PromptSample.gather(
            tightened.problem, tightened.solution, thresholds_are_relative_m=thresholds_are_relative_m
        )
        bias = climb_ladder(tightened.problem, tightened.solution).bias or ladder.bias
        # Those of lam* and beta stay: they are about what was asked, which the corrected ones are estimates for.
        intervals = replace(
            prompts.bootstrap_intervals(rng=rng, n_replicates=n_replicates, bias=bias),
            multipliers=intervals.multipliers,
            beta=intervals.beta,
        )
    return Uncertainty(tightened, ladder, intervals, prompts.standard_errors(), bias)
