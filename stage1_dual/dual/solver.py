"""Minimise the dual over lam >= 0, or over any lam_j where constraint j is an equality.

Newton's method on a convex, smooth, low-dimensional function: each step minimises the exact quadratic model under
the bounds (a non-negative least-squares problem, so the active set is found by the subproblem), and a line search on
slopes makes it globally convergent. The work is done in the dimensionless multipliers lam_j s_j / beta, in which the
reference Hessian has a unit diagonal, so that units of scores and rewards do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_dual.dual.arguments import validate_multipliers
from stage1_dual.dual.certificate import Certificate, certify, require_certified
from stage1_dual.dual.dual_function import evaluate_dual
from stage1_dual.dual.dual_solution import DualSolution, build_solution
from stage1_dual.dual.feasibility import AttainableMeans, require_feasible
from stage1_dual.dual.kl_budget import spend_budget
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray, IntArray

MAX_EVALUATIONS = 300
"""Newton's method gives up after this many evaluations of the dual; those on the way from larger betas not counted."""

# A start either converges quickly or was not close enough to help.
_WARM_EVALUATIONS = 20
# Room, in standard deviations of a score, that proves thresholds strictly feasible: far above the KKT tolerance.
_ROOM = 1e-4
# Beyond this many nats per standard deviation of a score the infimum is hardly attained, and Newton's steps into the
# distance would only meet underflow.
_RUNAWAY = 100.0
# The expansion of the dual around the reference says nothing of steps of more standard deviations than this.
_EXPANSION_REACH = 3.0
# With more values than this, times the square of the betas on the way, Newton starts from the minimum over the larger
# of so many prompts and a share of them: below, calls cost more than the arithmetic they save. It ends where few
# prompts stop speaking for all.
_SKETCH_VALUES = 1_000_000
_SKETCH_PROMPTS = 100
_SKETCH_SHARE = 32
_SKETCH_TARGET = 2e-2
_SKETCH_EVALUATIONS = 60
# Where Newton from nothing needs few steps, in standard deviations of the reward within prompts; the factor between
# one beta and the next, and how well the minimum is found on the way. Measured: 4 and 0.01 use the fewest evaluations.
_EASY_BETA = 0.3
_BETA_FACTOR = 4.0
_PATH_TARGET = 1e-2
# Newton converges quadratically: below this the next step would only meet rounding.
_RESIDUAL_TARGET = 1e-12
# Where rounding of ill-scaled data stops earlier than the target, this still counts as converged.
_RESIDUAL_ACCEPTED = 1e-10
# Convergence is quadratic, at a rate the step before tells: a step foreseen to end so many times below what is
# accepted need not be evaluated.
_CAUTION = 10.0
# A start with so small a residual was predicted, and its prediction worked.
_NEAR = 1e-5
# One step lets a multiplier grow by this factor at most, or to this many standard deviations.
_GROWTH = 10.0
# A line search that has come down to this fraction of its step is lost in rounding.
_SHORTEST = 1e-14
# A slope this much smaller than at the start ends a line search; Newton's own step nearly always does better.
_SLOPE_DECREASE = 0.5


@dataclass(frozen=True, eq=False)
class DualMinimum:
    """What the iteration found, certified by nothing yet.

    Attributes:
        lam_m: multipliers, reward per score unit, shape (m,).
        residual: KKT residual there; after a last step that was not evaluated, what it is foreseen to be at most.
        n_evaluations: evaluations of the dual on all samples, those of easier duals on the way included.
    """

    lam_m: FloatArray
    residual: float
    n_evaluations: int

    @property
    def is_converged(self) -> bool:
        """Whether the residual is small enough for a certificate to be worth its pass."""
        return self.residual <= _RESIDUAL_ACCEPTED


@dataclass(frozen=True, eq=False)
class _Point:
    """The dual at one dimensionless multiplier mu = lam s / beta; gradient and Hessian with respect to mu."""

    mu: FloatArray
    value: float
    gradient: FloatArray
    hessian: FloatArray
    residual: float


class _ScaledDual:
    """D / beta as a function of mu over the constraints that vary; counts its evaluations."""

    def __init__(self, problem: DualProblem) -> None:
        self._problem = problem
        # Nearly always all of them, and then views will do.
        self._varying: slice | IntArray = slice(None)
        self._block: tuple[slice | IntArray, ...] = (slice(None), slice(None))
        if problem.is_constant_m.any():
            self._varying = np.flatnonzero(~problem.is_constant_m)
            self._block = np.ix_(self._varying, self._varying)
        self._scale = problem.score_scale_m[self._varying]
        self._unit = problem.beta / np.outer(self._scale, self._scale)
        self.is_free = problem.is_equality_m[self._varying]
        self.n_evaluations = 0

    def to_mu(self, lam_m: FloatArray) -> FloatArray:
        return lam_m[self._varying] * (self._scale / self._problem.beta)

    def to_lam(self, mu: FloatArray) -> FloatArray:
        # A constraint no policy can change gets the multiplier 0: any other value changes nothing.
        lam_m = np.zeros(self._problem.n_constraints)
        lam_m[self._varying] = mu * (self._problem.beta / self._scale)
        return lam_m

    def clip(self, mu: FloatArray) -> FloatArray:
        return np.where(self.is_free, mu, np.maximum(mu, 0.0))

    def at(self, mu: FloatArray) -> _Point:
        self.n_evaluations += 1
        evaluation = evaluate_dual(self._problem, self.to_lam(mu))
        gradient = evaluation.slack_m[self._varying] / self._scale
        with np.errstate(under="ignore"):
            hessian = evaluation.hess_mm[self._block] * self._unit
        return _Point(
            mu=mu,
            value=evaluation.centred_value / self._problem.beta,
            gradient=gradient,
            hessian=hessian,
            residual=float(np.abs(np.where(self.is_free, gradient, np.minimum(mu, gradient))).max(initial=0.0)),
        )

    def expansion_minimum(self) -> FloatArray:
        """The lam that minimises D to second order in all scores, shape (m,); costs nothing.

        log E exp(X) is E X + Var X / 2 up to the third cumulant of X, which is zero where scores are jointly Gaussian.
        """
        facts = self._problem.samples.facts
        varying = self._varying
        with np.errstate(over="ignore"):
            margin = (self._problem.thresholds_m - facts.reference_means_m)[varying] / self._scale
            tilted_by_reward = facts.correlation_ii[1:, 0][varying] * (facts.reward_scale / self._problem.beta)
            gradient = np.clip(tilted_by_reward - margin, -_EXPANSION_REACH, _EXPANSION_REACH)
        correlation = facts.correlation_ii[1:, 1:][self._block]
        mu = newton_step(np.zeros(len(self._scale)), gradient, correlation, self.is_free)
        # Plus zero: a minus sign of it would be written into artifacts.
        return self.to_lam(np.clip(mu, -_EXPANSION_REACH, _EXPANSION_REACH) + 0.0)

    def minimum(self, point: _Point) -> DualMinimum:
        return DualMinimum(self.to_lam(point.mu), point.residual, self.n_evaluations)


def solve_dual(problem: DualProblem, *, initial_multipliers: ArrayLike | None = None) -> DualSolution:
    """Solve the dual and certify the answer; where the problem has a KL budget, find the beta that spends it.

    A minimum exists where the thresholds are strictly feasible. That is decided first, unless Newton's method finds at
    once a certified policy that can be moved to meet them with room, which proves it too. The dual is convex, hence a
    minimum global; code independent of the solver checks it. A solution returned always has ``kkt_residual <= 1e-8``.

    Args:
        problem: the samples, thresholds and beta or KL budget.
        initial_multipliers: start of the iteration, reward per score unit, shape (m,); by default the solver finds
            one. With a KL budget the problem's beta is then a start too.

    Returns:
        The solution. With a KL budget its beta is the one found: ``problem.with_beta(solution.beta)`` is the problem
        whose tilted policy it describes, and one certificate holds for both multipliers.

    Raises:
        InputError: ``initial_multipliers`` is not m finite numbers, non-negative except of an equality.
        InfeasibleError: no policy on the samples meets the thresholds, or only in the limit of infinite multipliers.
        KlBudgetError: the constraints take more than the KL budget, or the best policy on the samples spends less.
        NotCertifiedError: float64 does not suffice for this problem.
    """
    start_m = None
    if initial_multipliers is not None:
        start_m = validate_multipliers("initial_multipliers", initial_multipliers, problem.is_equality_m)
    if problem.kl_budget is None:
        return _solve_at_beta(problem, start_m)
    counted: list[int] = []

    def solve(beta: float, start_m: FloatArray | None) -> DualSolution:
        found = _solve_at_beta(problem.with_kl_budget(None).with_beta(beta), start_m)
        counted.append(found.n_evaluations)
        return found

    found = spend_budget(problem, solve, start_m)
    spent = problem.with_beta(found.beta)
    certificate = certify(spent, found.multipliers)
    require_certified(spent, certificate)
    return build_solution(spent, found.multipliers, certificate, n_evaluations=sum(counted))


def _solve_at_beta(problem: DualProblem, start_m: FloatArray | None) -> DualSolution:
    if start_m is None:
        start_m = _find_start(problem)
    n_evaluations = 0
    if start_m is not None:
        minimum = continue_minimum(problem, start_m)
        if minimum.is_converged:
            minimum, certificate = certify_minimum(problem, minimum)
            if not proves_feasibility(problem, certificate):
                require_feasible(problem, AttainableMeans(problem))
            if certificate.is_valid:
                return build_solution(problem, minimum.lam_m, certificate, n_evaluations=minimum.n_evaluations)
        n_evaluations = minimum.n_evaluations
    require_feasible(problem, AttainableMeans(problem))
    minimum, certificate = certify_minimum(problem, minimise_dual(problem))
    require_certified(problem, certificate)
    n_evaluations += minimum.n_evaluations
    return build_solution(problem, minimum.lam_m, certificate, n_evaluations=n_evaluations)


def certify_minimum(problem: DualProblem, minimum: DualMinimum) -> tuple[DualMinimum, Certificate]:
    """The certificate of a minimum, improved first where a last step was not evaluated and led astray."""
    certificate = certify(problem, minimum.lam_m)
    if not minimum.is_converged or certificate.kkt_residual <= _RESIDUAL_ACCEPTED:
        return minimum, certificate
    better = continue_minimum(problem, minimum.lam_m, looks_ahead=False)
    better = replace(better, n_evaluations=minimum.n_evaluations + better.n_evaluations)
    return better, certify(problem, better.lam_m)


def proves_feasibility(problem: DualProblem, certificate: Certificate) -> bool:
    """Whether a certificate shows that its thresholds are strictly feasible; False says nothing.

    Tilting the certified policy w once more, to w (1 + <d, g - E_w[g]>), adds Cov_w[g] d to the means it attains. That
    is a policy where no |<d, g - E_w[g]>| exceeds 1, and it meets the thresholds with room for d = Cov^-1 room. Along
    an equality the means must be able to move both ways.
    """
    varying = np.flatnonzero(~problem.is_constant_m)
    room = _ROOM * problem.score_scale_m[varying]
    covariance = problem.beta * certificate.hess_mm[np.ix_(varying, varying)]
    is_equality = problem.is_equality_m[varying]
    # One move for all bounds together, then one along each equality.
    moves = np.column_stack([np.where(is_equality, 0.0, room), np.diag(room)[:, is_equality]])
    # Least squares: dependent constraints leave the covariance singular.
    tilts = np.linalg.lstsq(covariance, moves, rcond=1e-10)[0]
    is_policy = 2.0 * np.abs(tilts).sum(axis=1) @ problem.samples.facts.largest_score_m[varying] <= 1.0
    missed = covariance @ tilts - moves
    # More room than asked for is no miss of a bound.
    missed[:, 0] = np.where(is_equality, missed[:, 0], np.minimum(missed[:, 0], 0.0))
    return certificate.is_valid and bool(is_policy and np.all(np.abs(missed).sum(axis=1) <= 0.5 * room))


def _find_start(problem: DualProblem) -> FloatArray | None:
    """Where Newton's method is quick, shape (m,): the minimum over a share of the prompts where there are many, else
    that of the dual's expansion unless beta is far below the spread of the rewards.
    """
    n_betas = len(_path_betas(problem))
    samples = None
    if problem.n_samples * (1 + problem.n_constraints) * n_betas**2 >= _SKETCH_VALUES:
        samples = problem.samples.sketch(max(_SKETCH_PROMPTS, problem.n_prompts // _SKETCH_SHARE))
    if samples is not None:
        # Margins, not thresholds: the reference differs between prompts far more than what the tilt adds to it.
        margins_m = problem.thresholds_m - problem.reference_means_m
        sketch = problem.with_samples(samples).with_thresholds(samples.facts.reference_means_m + margins_m)
        found = minimise_dual(sketch, target=_SKETCH_TARGET, max_evaluations=_SKETCH_EVALUATIONS)
        if found.residual <= _SKETCH_TARGET:
            return found.lam_m
    return _ScaledDual(problem).expansion_minimum() if n_betas == 1 else None


def _path_betas(problem: DualProblem) -> list[float]:
    """The betas from the one asked for up to one that is easy, a constant factor apart."""
    betas = [problem.beta]
    while betas[-1] * _BETA_FACTOR < _EASY_BETA * problem.reward_scale:
        betas.append(betas[-1] * _BETA_FACTOR)
    return betas


def minimise_dual(
    problem: DualProblem, *, target: float = _RESIDUAL_TARGET, max_evaluations: int | None = None
) -> DualMinimum:
    """Minimise from what the moments of the scores tell; certifies nothing.

    Far below the spread of the rewards the dual is almost piecewise linear and Newton's model is good only near the
    answer. There the minimum is followed down from a larger beta, a factor at a time: each beta starts from the
    extrapolation of the last two minima, which is close because lam* is nearly linear in beta as beta goes to 0.
    """
    betas = _path_betas(problem)
    limit = MAX_EVALUATIONS if max_evaluations is None else max_evaluations
    n_evaluations = 0
    path: list[tuple[float, FloatArray]] = []
    lam_m = _ScaledDual(problem.with_beta(betas[-1])).expansion_minimum()
    for beta in reversed(betas[1:]):
        dual = _ScaledDual(problem.with_beta(beta))
        start_m = problem.clip_multipliers(_extrapolate(path, beta, lam_m))
        point = _newton(dual, start_m, target=_PATH_TARGET, max_evaluations=limit // len(betas))
        lam_m = dual.to_lam(point.mu)
        path.append((beta, lam_m))
        n_evaluations += dual.n_evaluations
    dual = _ScaledDual(problem)
    start_m = problem.clip_multipliers(_extrapolate(path, problem.beta, lam_m))
    minimum = dual.minimum(_newton(dual, start_m, target=target, max_evaluations=limit))
    return replace(minimum, n_evaluations=n_evaluations + minimum.n_evaluations)


def continue_minimum(problem: DualProblem, start_m: FloatArray, *, looks_ahead: bool = True) -> DualMinimum:
    """Newton's method from ``start_m``, shape (m,), for as long as it converges quickly; certifies nothing.

    Without ``looks_ahead`` every step is evaluated.
    """
    dual = _ScaledDual(problem)
    point = _newton(
        dual,
        start_m,
        target=_RESIDUAL_TARGET,
        max_evaluations=_WARM_EVALUATIONS,
        longest=_RUNAWAY,
        looks_ahead=looks_ahead,
    )
    return dual.minimum(point)


def _extrapolate(path: list[tuple[float, FloatArray]], beta: float, lam_m: FloatArray) -> FloatArray:
    if len(path) < 2:
        return lam_m
    (beta_0, lam_0), (beta_1, lam_1) = path[-2:]
    return lam_1 + (lam_1 - lam_0) * ((beta - beta_1) / (beta_1 - beta_0))


def _newton(
    dual: _ScaledDual,
    start_m: FloatArray,
    *,
    target: float,
    max_evaluations: int,
    longest: float = math.inf,
    looks_ahead: bool = True,
) -> _Point:
    """Best point by residual after Newton steps from ``start_m``, until ``target`` or rounding stops progress.

    Gives up beyond ``longest`` nats per standard deviation of a score. With ``looks_ahead``, a last step foreseen to
    end well is taken without an evaluation where it leads.
    """
    best = point = dual.at(dual.to_mu(start_m))
    # No step before tells the rate of convergence; so near, it is taken as one.
    before = math.sqrt(best.residual) if best.residual <= _NEAR else best.residual
    stalled = 0
    while best.residual > target and stalled < 3 and dual.n_evaluations < max_evaluations:
        if float(np.max(np.abs(point.mu), initial=0.0)) > longest:
            break
        step = newton_step(point.mu, point.gradient, point.hessian, dual.is_free)
        foreseen = _CAUTION * point.residual * (point.residual / before) ** 2
        if looks_ahead and foreseen <= max(target, _RESIDUAL_ACCEPTED):
            return replace(point, mu=dual.clip(point.mu + step), residual=foreseen)
        before = point.residual
        point = _search(dual, point, step, max_evaluations)
        stalled = 0 if point.residual < 0.5 * best.residual else stalled + (point.residual < 1e-6)
        if point.residual < best.residual:
            best = point
    return best


def newton_step(mu: FloatArray, gradient: FloatArray, hessian: FloatArray, is_free: NDArray[np.bool_]) -> FloatArray:
    """Minimiser d of <gradient, d> + d' hessian d / 2 subject to mu + d >= 0 except where ``is_free``, shape (m,)."""
    if len(mu) == 0:
        return np.zeros(0)
    tiny = np.finfo(np.float64).tiny
    lowest = np.where(is_free, -np.inf, -mu)
    if len(mu) == 1:
        # A curvature that has underflown must not make the step infinite.
        curvature = np.maximum(hessian[0], 1e-150 * np.maximum(1.0, np.abs(gradient)))
        return np.asarray(np.maximum(lowest, -gradient / curvature), dtype=np.float64)
    # The ridge picks one of many minimisers when constraints are dependent, and is far below what slows Newton down.
    diagonal = np.diag(hessian)
    ridge = 1e-10 * diagonal + 1e-13 * float(np.max(diagonal)) + tiny
    regular = hessian + np.diag(ridge)
    unbounded = np.asarray(np.linalg.solve(regular, -gradient), dtype=np.float64)
    if bool(np.all((mu + unbounded >= 0) | is_free)) and float(gradient @ unbounded) <= 0:
        return unbounded
    # Imported where it is used: it takes as long to import as a solve, and most steps do without it.
    from scipy.optimize import nnls

    eigenvalues, eigenvectors = np.linalg.eigh(regular)
    if eigenvalues[0] <= 0:
        # Rounding of a variance that has collapsed outweighs the ridge: uphill would pass for a minimum.
        eigenvalues = np.maximum(eigenvalues, float(np.min(ridge)) - 2.0 * eigenvalues[0])
        regular = (eigenvectors * eigenvalues) @ eigenvectors.T
    root = np.sqrt(np.maximum(eigenvalues, float(np.min(ridge))))
    factor = root[:, np.newaxis] * eigenvectors.T
    target = factor @ mu - (eigenvectors.T @ gradient) / root
    free = is_free.copy()
    if is_free.any():
        # Those without a bound take up all that lies in their columns: what is left decides on the others.
        beyond = np.linalg.qr(factor[:, is_free], mode="complete").Q[:, np.count_nonzero(is_free) :]
        factor, target = beyond.T @ factor[:, ~is_free], beyond.T @ target
    if not is_free.all():
        free[~is_free] = nnls(factor, target)[0] > 0
    # mu + d loses digits when d is small against mu: solve for d itself once the free set is known.
    step = -mu.copy()
    step[free] = np.linalg.solve(
        regular[np.ix_(free, free)], -gradient[free] - regular[np.ix_(free, ~free)] @ step[~free]
    )
    return np.asarray(np.maximum(step, lowest), dtype=np.float64)


def _search(dual: _ScaledDual, start: _Point, step: FloatArray, max_evaluations: int) -> _Point:
    """Move along ``step`` until the slope has dropped enough; a convex function needs only slopes for a bracket."""
    # Far from the minimum the Hessian can be arbitrarily small: let one step grow mu by a factor, not without bound.
    longest = float(np.max(np.abs(step)))
    allowed = _GROWTH * max(1.0, float(np.max(np.abs(start.mu))))
    if longest > allowed:
        step = step * (allowed / longest)
    slope_start = float(start.gradient @ step)
    fraction, longest_left = 1.0, 1.0
    rounding = 1e-12 * (1.0 + abs(start.value))
    while True:
        trial = dual.at(dual.clip(start.mu + fraction * step))
        slope = float(trial.gradient @ step)
        # Still descending here means descending all the way, by convexity; no descent at the start is rounding.
        accepted = slope <= 0 or slope_start >= 0
        accepted |= slope <= _SLOPE_DECREASE * -slope_start and trial.value <= start.value + rounding
        if accepted or longest_left <= _SHORTEST or dual.n_evaluations >= max_evaluations:
            return trial
        # Overshot: the minimum along the step lies between 0 and here. Newton on the slope from here; where that leads
        # out, the secant, kept near the middle: from plateau to plateau slopes do not tell where the cliff between is.
        longest_left = fraction
        with np.errstate(under="ignore"):
            curvature = float(step @ trial.hessian @ step)
        proposal = fraction - slope / curvature if curvature > 0 else 0.0
        if not 0.0 < proposal < fraction:
            secant = fraction * slope_start / (slope_start - slope)
            proposal = min(max(secant, 0.4 * longest_left), 0.8 * longest_left)
        fraction = min(max(proposal, 0.05 * longest_left), 0.9 * longest_left)
