"""How certain lam* and the predictions are: prompts are the independent units.

Everything follows from sums by prompt at lam*. With psi_p the slack of prompt p (its tilted mean of g minus the
threshold, and minus its share of the reference mean where the threshold is a margin over that mean), lam* solves
mean_p psi_p(lam) = 0 on the active set: an M-estimator. The bootstrap draws prompts with replacement and in every
replicate takes a Newton step from lam* under lam >= 0, corrected once by the third derivative of the dual; what the
policy then does is expanded to second order as well. Under a KL budget beta moves too
(:mod:`stage1_dual.dual.budget_steps`), and every replicate spends the budget. The error is of third order in the step,
p**-1.5 against the p**-0.5 of the interval: a plain Newton step and a linear KL were measured to move the ends of
intervals for KL by half a standard error at 150 prompts. The sandwich is the delta method for the same estimator,
active set held fixed.

Two kinds of interval, because two questions are asked:

- *of the optimum*: the sample is redrawn and solved again. Its target is the population's lam*, and its reward,
  constraints and KL at that optimum. The constraints of an active absolute threshold have no width here: each
  re-solve meets the threshold.
- *of the policy*: lam* is held fixed. Its target is what the policy tilted by exactly this lam* does in the
  population, hence what an evaluation of that policy will find.

Both kinds are about which prompts were drawn. That each prompt has finitely many responses biases what they are
centred on; :class:`ResponseBias` moves them.

References: Efron and Tibshirani, An Introduction to the Bootstrap (1993), for percentile intervals; van der Vaart,
Asymptotic Statistics (1998), section 5.3 for M-estimators; Schucany and Wang (1991) for one-step bootstraps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pipeline.contracts.errors import InputError
from stage1_dual.dual.arguments import require_level, require_prompts
from stage1_dual.dual.budget_steps import BudgetMoments
from stage1_dual.dual.display import Display, interval
from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.prompt_sums import PromptSums, PromptUnits, gather_units
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.solver import newton_step


@dataclass(frozen=True, eq=False)
class Estimates:
    """A reward, constraint scores and a KL with the shape of what they were computed for.

    Attributes:
        reward: reward units.
        constraints: score units, last axis m.
        kl: nats per prompt.
        slack: score units, last axis m; its threshold moves with the reference mean where it is a margin over it.
    """

    reward: FloatArray
    constraints: FloatArray
    kl: FloatArray
    slack: FloatArray


@dataclass(frozen=True, eq=False)
class ResponseBias:
    """What the finite number of responses adds to estimates, about (:mod:`stage1_dual.dual.response_ladder`).

    Attributes:
        multipliers: reward per score unit, shape (m,).
        beta: of the beta that a KL budget finds, reward per nat; 0 where beta was given.
        optimum: of the re-solved optimum; reward (), constraints (m,), kl (), slack (m,).
        policy: of the policy tilted by lam* as it is; same shapes.
    """

    multipliers: FloatArray
    beta: float
    optimum: Estimates
    policy: Estimates


@dataclass(frozen=True, eq=False)
class BootstrapIntervals:
    """Percentile intervals over replicates; the last axis of an interval is (low, high). Printed, it is a table.

    Attributes:
        constraint_names: one name per constraint.
        level: nominal coverage.
        n_replicates: number of replicates.
        multipliers: shape (m, 2), reward per score unit.
        beta: of the beta that a KL budget finds, reward per nat, shape (2,); None where beta was given.
        optimum: of the re-solved optimum; reward (2,), constraints (m, 2), kl (2,), slack (m, 2).
        policy: of the policy tilted by lam* as it is; same shapes.
        multiplier_replicates_bm: lam of every replicate, shape (replicates, m); infinite where the replicate's
            prompts cannot reach its threshold of that constraint, even with the best response to each, and minus
            infinite where they cannot come down to that of an equality.
        infeasible_fraction: share of the replicates in which that is so for some constraint.
    """

    constraint_names: tuple[str, ...]
    level: float
    n_replicates: int
    multipliers: FloatArray
    beta: FloatArray | None
    optimum: Estimates
    policy: Estimates
    multiplier_replicates_bm: FloatArray
    infeasible_fraction: float

    def __repr__(self) -> str:
        """A table of the constraints' intervals."""
        return self._display().text()

    def _repr_html_(self) -> str:
        """The same table as HTML, for notebooks."""
        return self._display().html()

    def _display(self) -> Display:
        columns = (self.multipliers, self.optimum.constraints, self.policy.constraints, self.policy.slack)
        return Display(
            f"BootstrapIntervals: {self.level:.6g} of {self.n_replicates:,} replicates",
            [
                ("reward of the optimum", interval(self.optimum.reward)),
                ("reward of the policy", interval(self.policy.reward)),
                ("KL of the optimum", interval(self.optimum.kl)),
                ("KL of the policy", interval(self.policy.kl)),
                *([] if self.beta is None else [("beta", interval(self.beta))]),
                ("infeasible replicates", f"{self.infeasible_fraction:.1%}"),
            ],
            ("constraint", "multiplier", "optimum", "policy", "slack of the policy"),
            [(name, *map(interval, values)) for name, *values in zip(self.constraint_names, *columns, strict=True)],
        )


@dataclass(frozen=True, eq=False)
class StandardErrors:
    """Sandwich standard errors, clustered by prompt.

    Attributes:
        multipliers: shape (m,), reward per score unit; 0 for an inactive constraint.
        beta: of the beta that a KL budget finds, reward per nat; None where beta was given.
        optimum: of the re-solved optimum; reward (), constraints (m,), kl (), slack (m,).
        policy: of the policy tilted by lam* as it is; same shapes.
    """

    multipliers: FloatArray
    beta: float | None
    optimum: Estimates
    policy: Estimates


@dataclass(frozen=True, eq=False)
class _Resolved:
    """Replicates that were solved again, to second order.

    Attributes:
        multipliers_bm: reward per score unit, shape (b, m).
        beta_b: reward per nat, shape (b,); None where beta was given.
        reward_b: reward units, shape (b,).
        moved_bm: what the tilted means of the scores gain, score units, shape (b, m).
        kl_b: nats per prompt, shape (b,).
    """

    multipliers_bm: FloatArray
    beta_b: FloatArray | None
    reward_b: FloatArray
    moved_bm: FloatArray
    kl_b: FloatArray


@dataclass(frozen=True, eq=False)
class PromptSample:
    """The prompts at lam*, gathered in one pass: what every interval is drawn from.

    Attributes:
        problem: the problem solved, with the beta of the solution.
        solution: its solution.
        units: what is drawn with replacement.
    """

    problem: DualProblem
    solution: DualSolution
    units: PromptUnits

    @classmethod
    def gather(
        cls, problem: DualProblem, solution: DualSolution, *, thresholds_are_relative_m: ArrayLike | None = None
    ) -> PromptSample:
        """Gather the prompts.

        Args:
            problem: the problem solved.
            solution: its solution.
            thresholds_are_relative_m: shape (m,), true where the threshold is a margin over the reference mean: that
                mean is then estimated again in every replicate. The default is absolute thresholds throughout.

        Raises:
            InputError: fewer than two prompts, or a mask of the wrong shape.
        """
        require_prompts(problem.n_prompts)
        spent = problem.with_beta(solution.beta)
        return cls(spent, solution, gather_units(spent, solution, thresholds_are_relative_m))

    def bootstrap_intervals(
        self,
        *,
        rng: np.random.Generator,
        n_replicates: int = 1_000,
        level: float = 0.95,
        bias: ResponseBias | None = None,
    ) -> BootstrapIntervals:
        """Percentile intervals by a corrected Newton step per replicate; see :func:`bootstrap_intervals`.

        Raises:
            InputError: fewer than two replicates, or a level outside (0, 1).
        """
        if n_replicates < 2:
            raise InputError(f"`n_replicates` is {n_replicates}; it must be at least 2")
        require_level(level)
        means = self.units.replicate_means(rng, n_replicates)
        found = self._resolve(means)
        multipliers_bm, beta_b = found.multipliers_bm, found.beta_b
        beyond_bm = self._beyond(means)
        # Complementary slackness is exact knowledge: a replicate's active constraints meet its thresholds.
        slack_bm = np.where(self.problem.is_active_m(multipliers_bm), 0.0, means.psi_pm + found.moved_bm)
        optimum = Estimates(
            reward=found.reward_b,
            constraints=means.scores_pm - means.psi_pm + slack_bm,
            kl=np.maximum(found.kl_b, 0.0),
            slack=slack_bm,
        )
        policy = Estimates(reward=means.reward_p, constraints=means.scores_pm, kl=means.kl_p, slack=means.psi_pm)
        multipliers_bm = np.where(beyond_bm == 0, multipliers_bm, beyond_bm)
        if bias is not None:
            multipliers_bm = self.problem.clip_multipliers(multipliers_bm - bias.multipliers)
            beta_b = None if beta_b is None else np.maximum(beta_b - bias.beta, 0.0)
            optimum, policy = _moved(optimum, bias.optimum), _moved(policy, bias.policy)
        return BootstrapIntervals(
            constraint_names=self.problem.constraint_names,
            level=level,
            n_replicates=n_replicates,
            multipliers=_percentiles(multipliers_bm, level),
            beta=None if beta_b is None else _percentiles(beta_b, level),
            optimum=_percentile_estimates(optimum, level),
            policy=_percentile_estimates(policy, level),
            multiplier_replicates_bm=multipliers_bm,
            infeasible_fraction=float(np.mean(np.any(beyond_bm != 0, axis=1))),
        )

    def _resolve(self, means: PromptSums) -> _Resolved:
        problem, multipliers, kl_budget = self.problem, self.solution.multipliers, self.problem.kl_budget
        if kl_budget is None:
            step_bm = _replicate_steps(problem, multipliers, means)
            return _Resolved(
                multipliers_bm=problem.clip_multipliers(multipliers + step_bm),
                beta_b=None,
                reward_b=means.reward_p + _expand(means.reward_slope_pm, means.reward_bend_pmm, step_bm),
                moved_bm=_expand(means.scores_slope_pmm, means.scores_bend_pmmm, step_bm),
                kl_b=means.kl_p + _expand(means.kl_slope_pm, means.kl_bend_pmm, step_bm),
            )
        moments = BudgetMoments.gather(problem, multipliers, means, kl_budget)
        step_bz = moments.steps()
        gained_bi = moments.expand(moments.moves(step_bz))
        multipliers_bm = np.zeros_like(means.scores_pm)
        multipliers_bm[:, moments.varying] = (moments.start_z + step_bz)[:, 1:] * (problem.beta / moments.scale_v)
        return _Resolved(
            multipliers_bm=problem.clip_multipliers(multipliers_bm),
            beta_b=problem.beta * (1.0 + step_bz[:, 0]),
            reward_b=means.reward_p + gained_bi[:, 0],
            moved_bm=gained_bi[:, 1:],
            # Every replicate spends its budget.
            kl_b=np.full_like(means.kl_p, kl_budget),
        )

    def _beyond(self, means: PromptSums) -> FloatArray:
        """Infinite, of the multiplier's sign, where a replicate cannot reach its threshold, else 0, shape (b, m)."""
        beyond_bm = np.where(means.reach_pm <= 0, np.inf, 0.0)
        equal = np.flatnonzero(self.problem.is_equality_m)
        beyond_bm[:, equal] = np.where(means.depth_pe >= 0, -np.inf, beyond_bm[:, equal])
        beyond_bm[:, self.problem.is_constant_m] = 0.0
        return beyond_bm

    def standard_errors(self) -> StandardErrors:
        """Standard errors by the delta method; see :func:`sandwich_standard_errors`."""
        if self.problem.kl_budget is not None:
            return self._standard_errors_within(self.problem.kl_budget)
        units, hess_mm = self.units, self.solution.hessian
        means, off = units.means(), units.deviations()
        free = self.problem.is_active_m(self.solution.multipliers) & ~self.problem.is_constant_m
        influence_um = np.zeros_like(off.psi_pm)
        if bool(np.any(free)):
            # The pseudo-inverse leaves out directions that dependent constraints do not determine.
            inverse = np.linalg.pinv(hess_mm[np.ix_(free, free)], rcond=1e-10, hermitian=True)
            influence_um[:, free] = -off.psi_pm[:, free] @ inverse
        moved_um = influence_um @ hess_mm
        return StandardErrors(
            multipliers=units.standard_error(influence_um),
            beta=None,
            optimum=Estimates(
                reward=units.standard_error(off.reward_p + influence_um @ means.reward_slope_pm[0]),
                constraints=units.standard_error(off.scores_pm + moved_um),
                kl=units.standard_error(off.kl_p + influence_um @ means.kl_slope_pm[0]),
                slack=units.standard_error(off.psi_pm + moved_um),
            ),
            policy=self._policy_errors(off),
        )

    def _standard_errors_within(self, kl_budget: float) -> StandardErrors:
        """The same where beta moves with the multipliers, so that the KL stays the budget."""
        units, lam_m = self.units, self.solution.multipliers
        off = units.deviations()
        moments = BudgetMoments.gather(self.problem, lam_m, units.means(), kl_budget)
        varying, scale_v = moments.varying, moments.scale_v
        gradient_uz = np.column_stack([-off.kl_p, off.psi_pm[:, varying] / scale_v])
        free = np.append(True, self.problem.is_active_m(lam_m)[varying])
        influence_uz = np.zeros_like(gradient_uz)
        # The pseudo-inverse leaves out directions that dependent constraints do not determine.
        inverse = np.linalg.pinv(moments.hessian_bzz[0][np.ix_(free, free)], rcond=1e-10, hermitian=True)
        influence_uz[:, free] = -gradient_uz[:, free] @ inverse
        gained_ui = influence_uz @ moments.turn_iz.T @ moments.covariance_bii[0]
        errors_m = np.zeros_like(lam_m)
        errors_m[varying] = units.standard_error(influence_uz[:, 1:]) * (self.problem.beta / scale_v)
        return StandardErrors(
            multipliers=errors_m,
            beta=self.problem.beta * float(units.standard_error(influence_uz[:, 0])),
            optimum=Estimates(
                reward=units.standard_error(off.reward_p + gained_ui[:, 0]),
                constraints=units.standard_error(off.scores_pm + gained_ui[:, 1:]),
                kl=np.zeros(()),
                slack=units.standard_error(off.psi_pm + gained_ui[:, 1:]),
            ),
            policy=self._policy_errors(off),
        )

    def _policy_errors(self, off: PromptSums) -> Estimates:
        return Estimates(
            reward=self.units.standard_error(off.reward_p),
            constraints=self.units.standard_error(off.scores_pm),
            kl=self.units.standard_error(off.kl_p),
            slack=self.units.standard_error(off.psi_pm),
        )


def bootstrap_intervals(
    problem: DualProblem,
    solution: DualSolution,
    *,
    rng: np.random.Generator,
    n_replicates: int = 1_000,
    level: float = 0.95,
    thresholds_are_relative_m: ArrayLike | None = None,
    bias: ResponseBias | None = None,
) -> BootstrapIntervals:
    """Cluster bootstrap over prompts by a corrected Newton step per replicate, without solving again.

    Args:
        problem: the problem solved.
        solution: its solution.
        rng: source of the resampling.
        n_replicates: number of replicates, at least 2.
        level: nominal coverage, between 0 and 1.
        thresholds_are_relative_m: as in :meth:`PromptSample.gather`.
        bias: what the finite number of responses adds to the estimates: the intervals are moved by it. Drawing prompts
            says nothing of it, and where prompts are many it is the larger of the two errors.

    Raises:
        InputError: fewer than two prompts or replicates, a level outside (0, 1), or a mask of the wrong shape.
    """
    sample = PromptSample.gather(problem, solution, thresholds_are_relative_m=thresholds_are_relative_m)
    return sample.bootstrap_intervals(rng=rng, n_replicates=n_replicates, level=level, bias=bias)


def sandwich_standard_errors(
    problem: DualProblem, solution: DualSolution, *, thresholds_are_relative_m: ArrayLike | None = None
) -> StandardErrors:
    """Standard errors by the delta method with the active set of ``solution`` held fixed.

    Args:
        problem: the problem solved.
        solution: its solution.
        thresholds_are_relative_m: as in :meth:`PromptSample.gather`.

    Raises:
        InputError: fewer than two prompts, or a mask of the wrong shape.
    """
    sample = PromptSample.gather(problem, solution, thresholds_are_relative_m=thresholds_are_relative_m)
    return sample.standard_errors()


def _expand(slope_b: FloatArray, bend_b: FloatArray, step_bm: FloatArray) -> FloatArray:
    """<slope, step> + step' bend step / 2 for every replicate; slopes (b, ..., m), bends (b, ..., m, m)."""
    linear_b: FloatArray = np.einsum("b...m,bm->b...", slope_b, step_bm)
    quadratic_b: FloatArray = np.einsum("b...ij,bi,bj->b...", bend_b, step_bm, step_bm)
    return linear_b + 0.5 * quadratic_b


def _replicate_steps(problem: DualProblem, lam_m: FloatArray, means: PromptSums) -> FloatArray:
    """Newton's step in every replicate, then again with the third derivative at that step added to the gradient."""
    first_bm = _newton_steps(problem, lam_m, means.psi_pm, means.scores_slope_pmm)
    bent_bm = 0.5 * np.einsum("bkij,bi,bj->bk", means.scores_bend_pmmm, first_bm, first_bm)
    return _newton_steps(problem, lam_m, means.psi_pm + bent_bm, means.scores_slope_pmm)


def _newton_steps(
    problem: DualProblem, lam_m: FloatArray, gradient_bm: FloatArray, hess_bmm: FloatArray
) -> FloatArray:
    """One step under lam + step >= 0 for every replicate, in the scaled multipliers of the solver."""
    step_bm = np.zeros_like(gradient_bm)
    varying = np.flatnonzero(~problem.is_constant_m)
    if len(varying) == 0:
        return step_bm
    unit = problem.beta / problem.score_scale_m[varying]
    mu = lam_m[varying] / unit
    scale, is_free = problem.score_scale_m[varying], problem.is_equality_m[varying]
    hessians = hess_bmm[:, varying[:, np.newaxis], varying] * (unit[:, np.newaxis] / scale)
    for replicate, (gradient, hessian) in enumerate(zip(gradient_bm[:, varying] / scale, hessians, strict=True)):
        step_bm[replicate, varying] = unit * newton_step(mu, gradient, hessian, is_free)
    return step_bm


def _moved(replicates: Estimates, bias: Estimates) -> Estimates:
    return Estimates(
        reward=replicates.reward - bias.reward,
        constraints=replicates.constraints - bias.constraints,
        kl=np.maximum(replicates.kl - bias.kl, 0.0),
        slack=replicates.slack - bias.slack,
    )


def _percentile_estimates(replicates: Estimates, level: float) -> Estimates:
    return Estimates(
        reward=_percentiles(replicates.reward, level),
        constraints=_percentiles(replicates.constraints, level),
        kl=_percentiles(replicates.kl, level),
        slack=_percentiles(replicates.slack, level),
    )


def _percentiles(replicates_b: FloatArray, level: float) -> FloatArray:
    """The interval of the replicates, shape (b, ...) to (..., 2)."""
    tail = (1.0 - level) / 2
    # An order statistic, not an interpolation between two: replicates may be infinite.
    return np.moveaxis(np.quantile(replicates_b, [tail, 1.0 - tail], axis=0, method="inverted_cdf"), 0, -1)
