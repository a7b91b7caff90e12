"""Constraints on the mean of the worst responses: the conditional value at risk.

    CVaR_a(g) >= b ,   CVaR_a(g) = max_t  E u_t ,   u_t = t - (t - g)_+ / a

is a bound on the mean of the worst share a of all responses to all prompts (Rockafellar and Uryasev, Optimization of
conditional value-at-risk, 2000). For a fixed t it is an ordinary constraint on the mean of u_t, and a policy that
meets that one meets the CVaR, whatever t is. But the CVaR is convex in the policy: policies that meet the bound need
not mix to one that does, and minimising the dual over t and lam together gives too low a value. The value P(t) of the
problem at t is *maximised* over t instead. Its slope is lam (1 - P_pi(g < t) / a), 0 where t is the a-quantile of the
tilted policy, but it can have several maxima.

The largest one is found by branching and bounding. The best t is the a-quantile of the best policy, hence at most that
of the policy that always takes the best response, and where it lies in (l, h] the best policy meets

    E v >= b ,   v = h - (h - g) / a  where g <= l ,  h  where g > l ,

because with F the distribution of g, CVaR = E u_l + int_l^t (1 - F(s) / a) ds <= E u_l + (h - l)(1 - F(l) / a) = E v.
So the problem with v for u bounds the value of every t in (l, h]; v is at most (h - l) / a above u_h, and only for
responses with g between l and h: the bound closes with the square of h - l, and is exact where no score lies between.
Several such constraints are branched on together, in boxes of their levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pipeline.contracts.errors import InputError
from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.errors import InfeasibleError, KlBudgetError, NotCertifiedError
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.samples import SampleScores
from stage1_dual.dual.segments import FloatArray, IntArray
from stage1_dual.dual.solver import solve_dual
from stage1_dual.dual.tilting import weigh_block

# The search ends where no other t can give more than this, in the scale of the problem: the larger of beta and the
# standard deviation of the reward within prompts. Far below what any interval can tell.
_CLOSED = 1e-3
# Problems solved at most; what then remains of the bound is said.
_MOST_SOLVES = 200
# From a policy to its own quantile and on to the best policy for that, so many times.
_ASCENTS = 3
# A CVaR that falls short by no more than this many standard deviations is met: what certificates allow.
_ROUNDING = 1e-8
# A tail of fewer responses than this, in the sense of their effective number, is not one. Over 1,200 draws from a
# world of 600,000 responses the 95% interval of the slack covered 81% below 6 of them, 88% from 6 to 15, 92% from 15
# to 50.
_FEWEST_IN_TAIL = 10.0


@dataclass(frozen=True)
class Tail:
    """A constraint of a problem that bounds the mean of the worst responses, not of all.

    Attributes:
        place: which of the problem's constraints; its column is the score itself, its threshold the bound.
        level: the share of responses that are the worst, between 0 and 1.
    """

    place: int
    level: float

    def __post_init__(self) -> None:
        if not 0.0 < self.level < 1.0:
            raise InputError(f"the level of a CVaR is {self.level!r}; it must lie between 0 and 1")


@dataclass(frozen=True, eq=False)
class TailSolution:
    """The best solution over the levels t, for the best that was found.

    Attributes:
        problem: the problem at these t: the scores of its tails are u_t, and means of them.
        solution: its solution, certified: its policy's CVaR is at least what is predicted.
        at_c: t of each tail, score units, shape (c,).
        largest_gain: what another choice of t could add to the optimal value at most, reward units.
        tail_responses_c: effective number of responses in each tail under the tilted policy, over all prompts.
        n_solves: problems that were solved on the way.
    """

    problem: DualProblem
    solution: DualSolution
    at_c: FloatArray
    largest_gain: float
    tail_responses_c: FloatArray
    n_solves: int


def reference_tail(samples: SampleScores, place: int, level: float) -> tuple[float, float]:
    """The quantile t of a score over all responses, prompts counting the same, and its CVaR, score units."""
    scores = _SortedScores.gather(samples, place)
    counts_p = samples.counts_p
    weights_n = np.repeat(1.0 / counts_p, counts_p)
    at = scores.quantile(weights_n, level)
    return at, at - scores.mean_below(weights_n, at) / level


def fix_tails(problem: DualProblem, tails: Sequence[Tail], at_c: FloatArray) -> DualProblem:
    """The problem at fixed t, shape (c,): the score of each tail becomes u_t, whose mean the threshold bounds."""
    return _with_columns(problem, _columns(tails, at_c, at_c))


def maximise_over_tails(problem: DualProblem, tails: Sequence[Tail]) -> TailSolution:
    """The solution with the largest value over all t, with a bound on what is left.

    Args:
        problem: the scores themselves, with the bounds on their CVaR for thresholds of the ``tails``.
        tails: which constraints are on the worst responses; at least one.

    Raises:
        InputError: a tail's place is not one of the constraints or its constraint an equality, or a tail of the policy
            found holds too few responses to have a mean.
        InfeasibleError: no policy on the samples meets the bounds, whatever t.
        KlBudgetError: the KL budget is out of reach.
        NotCertifiedError: float64 does not suffice.
    """
    _require_tails(problem, tails)
    search = _BoxSearch(problem, tails)
    solution = search.run()
    at_c = search.best_at_c
    responses_c = np.array([_tail_responses(problem, tails, at_c, solution, c) for c in range(len(tails))])
    for tail, at, count in zip(tails, at_c, responses_c, strict=True):
        if count < _FEWEST_IN_TAIL:
            raise InputError(
                f"the worst {tail.level:g} of {problem.constraint_names[tail.place]} under the tilted policy, below "
                f"{at:.6g}, are {count:.1f} responses in effect over all {problem.n_prompts} prompts, and a mean of "
                f"them needs {_FEWEST_IN_TAIL:g}: use more prompts, draw more responses, or raise the level"
            )
    return TailSolution(
        problem=fix_tails(problem, tails, at_c).with_beta(solution.beta),
        solution=solution,
        at_c=at_c,
        largest_gain=search.largest_gain,
        tail_responses_c=responses_c,
        n_solves=search.n_solves,
    )


def _tail_responses(
    problem: DualProblem, tails: Sequence[Tail], at_c: FloatArray, solution: DualSolution, c: int
) -> float:
    """The effective number of responses at or below a tail's level, over all prompts."""
    weights_n = _policy_weights(problem, _columns(tails, at_c, at_c), solution)
    raw_n = np.concatenate(list(problem.samples.map(partial(_raw_scores, place=tails[c].place))))
    tail_n = weights_n[raw_n <= at_c[c]]
    return float(tail_n.sum() ** 2 / (tail_n @ tail_n))


def _require_tails(problem: DualProblem, tails: Sequence[Tail]) -> None:
    places = [tail.place for tail in tails]
    if not places or len(set(places)) < len(places) or not set(places) <= set(range(problem.n_constraints)):
        raise InputError(
            f"the places of the tails are {places}; they must be distinct constraints, of 0 to "
            f"{problem.n_constraints - 1}"
        )
    for place in places:
        if problem.is_equality_m[place]:
            raise InputError(
                f"{problem.constraint_names[place]}: a CVaR can be bounded below, not fixed; its policies do not mix"
            )


def _quantile(values_n: FloatArray, weights_n: FloatArray, level: float) -> float:
    order_n = np.argsort(values_n, kind="stable")
    return _SortedScores(order_n, values_n[order_n]).quantile(weights_n, level)


@dataclass(frozen=True, eq=False)
class _Column:
    """What stands for the score g of a tail: high - (high - g) / level where g <= low, and high above.

    With ``low`` equal to ``high`` it is u_t at t = ``high``.
    """

    place: int
    level: float
    low: float
    high: float

    def values(self, raw_n: FloatArray) -> FloatArray:
        return np.where(raw_n <= self.low, self.high - (self.high - raw_n) / self.level, self.high)


def _columns(tails: Sequence[Tail], low_c: FloatArray, high_c: FloatArray) -> list[_Column]:
    ends = zip(tails, low_c, high_c, strict=True)
    return [_Column(tail.place, tail.level, float(low), float(high)) for tail, low, high in ends]


@dataclass(frozen=True, eq=False)
class _Box:
    """Levels t in (low, high] of every tail.

    Attributes:
        low_c: shape (c,).
        high_c: shape (c,).
        bound: no t in the box gives more, reward units.
        at_c: quantiles of the policy that attains the bound, shape (c,).
        missing_c: by how much that policy's own CVaR falls short of its bound, in standard deviations of the score
            within prompts, shape (c,).
    """

    low_c: FloatArray
    high_c: FloatArray
    bound: float
    at_c: FloatArray
    missing_c: FloatArray


class _BoxSearch:
    """Best first: the box with the largest bound is split, and the levels its policy points to are tried."""

    def __init__(self, problem: DualProblem, tails: Sequence[Tail]) -> None:
        self._problem = problem
        self._tails = tails
        self._scores = [_SortedScores.gather(problem.samples, tail.place) for tail in tails]
        self._near: DualSolution | None = None
        self._blocking: InfeasibleError | KlBudgetError | None = None
        self._tried: set[tuple[float, ...]] = set()
        self.best: DualSolution | None = None
        self.best_at_c = np.zeros(len(tails))
        self.largest_gain = math.inf
        self.n_solves = 0

    def run(self) -> DualSolution:
        """The best solution, of the levels ``best_at_c``."""
        closed = _CLOSED * max(self._problem.beta, self._problem.reward_scale)
        low_c, high_c = np.transpose([self._range(c) for c in range(len(self._tails))])
        boxes = self._bound(low_c, high_c, None)
        while boxes and self.n_solves < _MOST_SOLVES:
            boxes.sort(key=lambda box: box.bound)
            if self._gain(boxes) <= closed:
                break
            boxes.extend(self._split(boxes.pop()))
        if self.best is not None:
            self.largest_gain = self._gain(boxes)
            return self.best
        if self._blocking is not None and not boxes:
            raise self._blocking
        names = " and ".join(self._problem.constraint_names[tail.place] for tail in self._tails)
        raise NotCertifiedError(
            f"after {self.n_solves} problems no level t is known at which the CVaR of {names} can be met, nor a proof "
            f"that there is none: lower its threshold, or draw more responses per prompt"
        )

    def _gain(self, boxes: Sequence[_Box]) -> float:
        if self.best is None:
            return math.inf
        return max([0.0, *(box.bound - self.best.primal_value for box in boxes)])

    def _range(self, c: int) -> tuple[float, float]:
        """Between what levels, (low, high], the best t lies: those at which the best responses meet the bound."""
        tail = self._tails[c]
        threshold = self._problem.thresholds_m[tail.place]
        best_p = np.concatenate(list(self._problem.samples.map(partial(_best_scores, place=tail.place))))
        high = _quantile(best_p, np.ones(len(best_p)), tail.level)

        def attained(at: float) -> float:
            return at - float(np.mean(np.maximum(at - best_p, 0.0))) / tail.level

        if attained(high) <= threshold:
            # The largest CVaR that any policy has: here it is said, with a proof, that it falls short.
            self._solve([_Column(tail.place, tail.level, high, high)])
        # Below the bound itself no t meets it. From there up to the best t more and more of them do.
        low, met = min(threshold, high), high
        for _ in range(100):
            middle = 0.5 * (low + met)
            low, met = (low, middle) if attained(middle) >= threshold else (middle, met)
        return low - abs(met - low) - np.spacing(abs(low)), high

    def _split(self, box: _Box) -> list[_Box]:
        """The halves of a box that may hold more than is known."""
        self._ascend(box.at_c)
        c = int(np.argmax(box.missing_c))
        cut = 0.5 * (box.low_c[c] + box.high_c[c])
        if box.missing_c[c] <= _ROUNDING or not box.low_c[c] < cut < box.high_c[c]:
            # The policy that attains the bound meets every CVaR, at the levels just tried.
            return []
        is_cut = np.arange(len(self._tails)) == c
        halves = [
            *self._bound(box.low_c, np.where(is_cut, cut, box.high_c), box),
            *self._bound(np.where(is_cut, cut, box.low_c), box.high_c, box),
        ]
        return [half for half in halves if self.best is None or half.bound > self.best.primal_value]

    def _bound(self, low_c: FloatArray, high_c: FloatArray, around: _Box | None) -> list[_Box]:
        """The box with its bound, or nothing where it holds no feasible level."""
        columns = _columns(self._tails, low_c, high_c)
        try:
            relaxed = self._solve(columns)
        except InfeasibleError as error:
            self._blocking = self._blocking or error
            return []
        except KlBudgetError as error:
            if error.attainable_kl < error.kl_budget:
                raise
            self._blocking = self._blocking or error
            return []
        except NotCertifiedError:
            if around is None:
                raise
            return [replace(around, low_c=low_c, high_c=high_c)]
        weights_n = _policy_weights(self._problem, columns, relaxed)
        at_c = self._quantiles(weights_n)
        missing_c = [
            (self._problem.thresholds_m[tail.place] - at + scores.mean_below(weights_n, at) / tail.level)
            / self._problem.score_scale_m[tail.place]
            for scores, tail, at in zip(self._scores, self._tails, at_c, strict=True)
        ]
        bound = relaxed.primal_value if around is None else min(relaxed.primal_value, around.bound)
        return [_Box(low_c, high_c, bound, at_c, np.array(missing_c))]

    def _ascend(self, at_c: FloatArray) -> None:
        """Try levels, then the quantiles of the policies they lead to: no step of it loses."""
        for _ in range(_ASCENTS):
            solution = self._try(at_c)
            if solution is None:
                return
            at_c = self._quantiles(_policy_weights(self._problem, _columns(self._tails, at_c, at_c), solution))

    def _try(self, at_c: FloatArray) -> DualSolution | None:
        """The solution at fixed levels; None where there is none, or they were tried before."""
        if tuple(at_c) in self._tried:
            return None
        self._tried.add(tuple(at_c))
        try:
            solution = self._solve(_columns(self._tails, at_c, at_c))
        except (InfeasibleError, KlBudgetError, NotCertifiedError):
            return None
        if self.best is None or solution.primal_value > self.best.primal_value:
            self.best, self.best_at_c = solution, at_c
        return solution

    def _solve(self, columns: Sequence[_Column]) -> DualSolution:
        self.n_solves += 1
        problem, near = _with_columns(self._problem, columns), self._near
        if near is None:
            self._near = solve_dual(problem)
        else:
            self._near = solve_dual(problem.with_beta(near.beta), initial_multipliers=near.multipliers)
        return self._near

    def _quantiles(self, weights_n: FloatArray) -> FloatArray:
        pairs = zip(self._scores, self._tails, strict=True)
        return np.array([scores.quantile(weights_n, tail.level) for scores, tail in pairs])


@dataclass(frozen=True, eq=False)
class _SortedScores:
    """A score over all responses, ascending.

    Attributes:
        order_n: place of each among the responses as they are read, shape (n,).
        scores_n: score units, shape (n,).
    """

    order_n: IntArray
    scores_n: FloatArray

    @classmethod
    def gather(cls, samples: SampleScores, place: int) -> _SortedScores:
        scores_n = np.concatenate(list(samples.map(partial(_raw_scores, place=place))))
        order_n = np.argsort(scores_n, kind="stable")
        return cls(order_n, scores_n[order_n])

    def quantile(self, weights_n: FloatArray, level: float) -> float:
        """The smallest score at or below which lies a share ``level`` of the weights, shape (n,), as read."""
        mass_n = np.cumsum(weights_n[self.order_n])
        return float(self.scores_n[np.searchsorted(mass_n, level * mass_n[-1] * (1.0 - 1e-12))])

    def mean_below(self, weights_n: FloatArray, at: float) -> float:
        """The weighted mean of (at - g)_+; weights of shape (n,), as read."""
        last = np.searchsorted(self.scores_n, at)
        return float(weights_n[self.order_n[:last]] @ (at - self.scores_n[:last]) / np.sum(weights_n))


def _with_columns(problem: DualProblem, columns: Sequence[_Column]) -> DualProblem:
    return problem.with_samples(problem.samples.derive(partial(_replace_columns, columns=tuple(columns))))


def _replace_columns(block: SampleBlock, *, columns: tuple[_Column, ...]) -> SampleBlock:
    for column in columns:
        values_n = column.values(_raw_scores(block, place=column.place))
        block = block.with_scores(column.place, values_n)
    return block


def _raw_scores(block: SampleBlock, *, place: int) -> FloatArray:
    """A score of all responses of a block, score units, shape (n,)."""
    return np.asarray(
        block.scores_mn[place] + np.repeat(block.score_shift_mp[place], block.segments.counts_p), dtype=np.float64
    )


def _best_scores(block: SampleBlock, *, place: int) -> FloatArray:
    return block.segments.max(_raw_scores(block, place=place))


def _policy_weights(problem: DualProblem, columns: Sequence[_Column], solution: DualSolution) -> FloatArray:
    """Weights of all responses, as they are read, under the policy tilted by columns: sums to 1 in a prompt, (n,)."""
    function = partial(_weigh, columns=tuple(columns), lam_m=solution.multipliers, beta=solution.beta)
    return np.concatenate(list(problem.samples.map(function)))


def _weigh(block: SampleBlock, *, columns: tuple[_Column, ...], lam_m: FloatArray, beta: float) -> FloatArray:
    return weigh_block(_replace_columns(block, columns=columns), lam_m=lam_m, beta=beta)
