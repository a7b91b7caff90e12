"""How many prompts and how many responses a demand needs, by what a pilot says of slacks to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stage1_dual.dual.pilot import FEWEST_RESPONSES, Pilot
from stage1_dual.dual.pilot_moments import nearest_covariance
from stage1_dual.dual.plan_trust import pilot_reasons, size_reasons, unsure_that_nothing_binds
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.slack_prediction import FEWEST_PROMPTS, MOST_PROMPTS, Prediction
from stage1_dual.dual.tightening import Z_INTERVAL

# Where numbers of responses are looked for.
_RESPONSES = (FEWEST_RESPONSES, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# Of what is allowed, the share that the bias may take where the number of responses is chosen; what a plan is not
# trusted beyond (``plan_trust``) has its error in it too.
_WANTED_BIAS_SHARE = 0.2


Outcome = Literal["planned", "nothing binds", "out of reach", "not trusted"]


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """A number of prompts and of responses, and what is expected of them. Units are those of the columns.

    What is reckoned is reckoned whatever the outcome, so that it can be held to the truth: but where the outcome is
    not ``planned`` nobody is to be told it.

    Attributes:
        outcome: ``planned``; ``nothing binds``, where lam* is 0 and the pilot shows that it is, so that no run is
            needed to find it; ``out of reach``, where no sizes within the limits will do; ``not trusted``, where
            nothing that follows from the pilot is to be trusted.
        reasons: why there is no plan; empty where it is ``planned``.
        n_prompts: prompts that determine lam*; None where no number of them will do with the responses there may be.
        n_responses: responses to each.
        miss: probability that some slack is off the demand by more than is allowed.
        errors_m: standard errors of the slacks, shape (m,).
        offset_m: expected slacks, shape (m,): what few responses leave on the safe side, or the room of what does not
            bind.
        reward_cost: reward that is given away by the number of responses being finite, reward units.
        evaluation_prompts: prompts of the final evaluation; None where no number of them will do.
        evaluation_responses: responses to each.
        room_m: what is then to be asked beyond the demand, shape (m,).
        instead: prompts and responses that would do without the limits, where these are why nothing does.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    n_prompts: int | None
    n_responses: int
    miss: float
    errors_m: FloatArray
    offset_m: FloatArray
    reward_cost: float
    evaluation_prompts: int | None
    evaluation_responses: int
    room_m: FloatArray
    instead: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class SizeRequest:
    """What a plan is asked for.

    Attributes:
        within_m: how far a slack may be from the demand, units of the columns, shape (m,), positive.
        confidence: with which probability all are, between 0 and 1.
        evaluation_responses: responses a prompt of the final evaluation; None for as many as the plan has.
        room_m: how much more than the demand may be asked for so that the evaluation says *satisfied*, shape (m,).
        n_responses: fixed number of responses, or None.
        n_prompts: fixed number of prompts, or None.
        most_prompts: prompts there are, or None.
        most_responses: responses at most, or None.
        drawn_prompts: prompts that are there already, which a plan has at least.
        drawn_responses: responses a prompt that are there already.
    """

    within_m: FloatArray
    confidence: float
    evaluation_responses: int | None
    room_m: FloatArray
    n_responses: int | None = None
    n_prompts: int | None = None
    most_prompts: int | None = None
    most_responses: int | None = None
    drawn_prompts: int = 0
    drawn_responses: int = 0

    @property
    def prompt_limit(self) -> int | None:
        """As many prompts as there may be; None where there may be any number."""
        return self.n_prompts or self.most_prompts

    def without_limits(self) -> SizeRequest:
        """The same with any number of prompts and of responses."""
        return replace(self, n_responses=None, n_prompts=None, most_prompts=None, most_responses=None)


def plan_sizes(pilot: Pilot, request: SizeRequest) -> SamplePlan:
    """The cheapest N x K with which every slack is within, of those that are to be trusted; else why there is none.

    Args:
        pilot: what was measured.
        request: what is asked for.
    """
    distrust = pilot_reasons(pilot)
    if not pilot.is_active_m.any():
        return _nothing_binds(pilot, request, [*distrust, *unsure_that_nothing_binds(pilot, request.confidence)])
    outcome: Outcome
    n_prompts: int | None
    reasons, instead = distrust, None
    found = _cheapest(pilot, request, _trusted_counts(pilot, request))
    if found is not None:
        outcome, (n_prompts, chosen) = "planned", found
    else:
        outcome, (n_prompts, chosen) = "out of reach", _nearest(pilot, request)
        if not distrust:
            reasons, free = _why_none_will_do(pilot, request), request.without_limits()
            if (elsewhere := _cheapest(pilot, free, _trusted_counts(pilot, free))) is not None:
                instead = (elsewhere[0], elsewhere[1].n_responses)
    n_reckoned = MOST_PROMPTS if n_prompts is None else n_prompts
    return SamplePlan(
        outcome="not trusted" if distrust else outcome,
        reasons=tuple(reasons),
        n_prompts=n_prompts,
        n_responses=chosen.n_responses,
        miss=chosen.miss(n_reckoned, request.within_m),
        errors_m=chosen.errors_m(n_reckoned),
        offset_m=chosen.offset_m,
        reward_cost=reward_cost(pilot, chosen.n_responses),
        evaluation_prompts=None if n_prompts is None else _evaluation_prompts(pilot, request, chosen, n_prompts),
        evaluation_responses=request.evaluation_responses or chosen.n_responses,
        room_m=request.room_m,
        instead=instead,
    )


def why_not_so_many(pilot: Pilot, request: SizeRequest, n_responses: int) -> str | None:
    """In some words why a number of responses is not to be planned with; None where it may be."""
    if n_responses < pilot.fewest_responses():
        return "too few for the KL"
    return "off by too much whatever the prompts" if size_reasons(pilot, n_responses, request.within_m) else None


def _nothing_binds(pilot: Pilot, request: SizeRequest, distrust: Sequence[str]) -> SamplePlan:
    """No run is needed for a lam* of 0: what the reward alone leaves of each slack, and what would prove it."""
    responses = request.evaluation_responses or round(pilot.n_responses)
    errors_m, room_m = pilot.room_errors_m, pilot.moments.room_m
    return SamplePlan(
        outcome="not trusted" if distrust else "nothing binds",
        reasons=tuple(distrust),
        n_prompts=None,
        n_responses=responses,
        miss=0.0,
        errors_m=errors_m,
        offset_m=room_m,
        reward_cost=0.0,
        evaluation_prompts=_test_prompts(
            _spread_m(pilot, responses, responses), errors_m, room_m, confidence=request.confidence
        ),
        evaluation_responses=responses,
        room_m=room_m,
    )


def top_up(pilot: Pilot, request: SizeRequest) -> tuple[int, int] | None:
    """The numbers of prompts and responses to go on to from those that are drawn, which are the pilot.

    The cheapest that will do, but no more than four times as many of either at once: what is drawn says it better than
    what was drawn before. Where nothing within the limits will do, twice as many of both.

    Args:
        pilot: what was measured on all that is drawn.
        request: what is asked for, with ``drawn_prompts``, ``drawn_responses``, ``most_prompts``, ``most_responses``.

    Returns:
        Prompts and responses; None where the limits are reached.
    """
    now = (request.drawn_prompts, request.drawn_responses)
    most = (request.most_prompts or MOST_PROMPTS, request.most_responses or _RESPONSES[-1])
    found = _cheapest(pilot, request, _of_low_bias(pilot, request, _response_counts(pilot, request)))
    wanted = (2 * now[0], 2 * now[1]) if found is None else (found[0], found[1].n_responses)
    sizes = tuple(max(drawn, min(one, 4 * drawn, limit)) for one, drawn, limit in zip(wanted, now, most, strict=True))
    return None if sizes == now else (sizes[0], sizes[1])


def _cheapest(pilot: Pilot, request: SizeRequest, counts: Sequence[int]) -> tuple[int, Prediction] | None:
    """The smallest N x K within the limits with which every slack is within, of some K, or None."""
    candidates = [
        (needed, prediction)
        for prediction in map(pilot.predict, counts)
        if (needed := _enough_prompts(prediction, request)) is not None
    ]
    return min(candidates, key=lambda one: (one[0] * one[1].n_responses, one[0])) if candidates else None


def _trusted_counts(pilot: Pilot, request: SizeRequest) -> Sequence[int]:
    """Numbers of responses within the limits that may be planned with; where some leave little bias, those."""
    counts = _response_counts(pilot, request)
    return _of_low_bias(pilot, request, [one for one in counts if not size_reasons(pilot, one, request.within_m)])


def _of_low_bias(pilot: Pilot, request: SizeRequest, counts: Sequence[int]) -> Sequence[int]:
    """Those of some numbers of responses that leave little bias; all of them where none does."""
    return [count for count in counts if _bias_share(pilot, request, count) <= _WANTED_BIAS_SHARE] or counts


def _bias_share(pilot: Pilot, request: SizeRequest, n_responses: int) -> float:
    """The largest bias of a constraint that binds, as a share of what is allowed."""
    shares_m = np.abs(pilot.bias_at(n_responses)) / request.within_m
    return float(np.max(shares_m[pilot.is_active_m], initial=0.0))


def reward_cost(pilot: Pilot, n_responses: int) -> float:
    """Reward that is given away because the policy, on so few responses, ends C / K beyond its demand."""
    return float(-pilot.reward_slope_m @ pilot.bias_at(n_responses))


def _response_counts(pilot: Pilot, request: SizeRequest) -> Sequence[int]:
    if request.n_responses is not None:
        return [request.n_responses]
    lowest = max(pilot.fewest_responses(), request.drawn_responses)
    highest = request.most_responses or max(_RESPONSES[-1], lowest)
    inside = [count for count in _RESPONSES if lowest <= count <= highest]
    return sorted({*inside, *([lowest] if lowest <= highest else [highest])})


def _enough_prompts(prediction: Prediction, request: SizeRequest) -> int | None:
    if request.n_prompts is not None:
        within = prediction.miss(request.n_prompts, request.within_m) <= 1 - request.confidence
        return request.n_prompts if within else None
    needed = prediction.prompts(request.within_m, confidence=request.confidence)
    if needed is None or needed > (request.most_prompts or needed):
        return None
    return max(needed, request.drawn_prompts)


def _nearest(pilot: Pilot, request: SizeRequest) -> tuple[int | None, Prediction]:
    """Where nothing is to be planned: what would be if its bias were trusted, or what misses least."""
    counts = _response_counts(pilot, request)
    found = _cheapest(pilot, request, _of_low_bias(pilot, request, counts))
    return (request.prompt_limit, _least_missed(pilot, request, counts)) if found is None else found


def _why_none_will_do(pilot: Pilot, request: SizeRequest) -> list[str]:
    """In sentences, of the numbers of responses that may be planned with; of the most there may be where none may."""
    trusted = _trusted_counts(pilot, request)
    if not trusted:
        return size_reasons(pilot, max(_response_counts(pilot, request)), request.within_m)
    n_reckoned = request.prompt_limit or MOST_PROMPTS
    best = _least_missed(pilot, request, trusted)
    prompts = "prompts without end" if request.prompt_limit is None else f"{request.prompt_limit:,} prompts"
    reach = best.reach(n_reckoned, request.within_m, confidence=request.confidence)
    missed = best.miss(n_reckoned, request.within_m)
    return [
        (
            f"with {prompts} of {best.n_responses:,} responses each, the best within the limits, the slacks are "
            f"within {reach:.3g} times what is allowed at the confidence asked for, and within what is allowed with "
            f"probability {1 - missed:.1%}"
        )
    ]


def _least_missed(pilot: Pilot, request: SizeRequest, counts: Sequence[int]) -> Prediction:
    """Of some numbers of responses, with as many prompts as there may be."""
    n_prompts = request.prompt_limit or MOST_PROMPTS
    return min(map(pilot.predict, counts), key=lambda one: (one.miss(n_prompts, request.within_m), one.n_responses))


def _evaluation_prompts(pilot: Pilot, request: SizeRequest, chosen: Prediction, n_prompts: int) -> int | None:
    """Prompts with which the evaluation says *satisfied* of each constraint with the confidence asked for.

    What does not bind may have more room by itself than ``assurance`` may ask for.
    """
    responses = request.evaluation_responses or chosen.n_responses
    room_m = np.where(pilot.is_active_m, request.room_m, np.maximum(request.room_m, chosen.offset_m))
    spread_m = _spread_m(pilot, responses, chosen.n_responses)
    return _test_prompts(spread_m, chosen.errors_m(n_prompts), room_m, confidence=request.confidence)


def _spread_m(pilot: Pilot, responses: int, reference_responses: int) -> FloatArray:
    """The variance of an evaluation's slacks, times the number of its prompts, shape (m,)."""
    between_m = np.diag(nearest_covariance(pilot.moments.between_mm.first))
    return np.asarray(between_m + pilot.sampled_m / responses + pilot.reference_m / reference_responses)


def _test_prompts(spread_m: FloatArray, errors_m: FloatArray, room_m: FloatArray, *, confidence: float) -> int | None:
    """The rule of ``assurance`` (:mod:`stage1_dual.dual.tightening`), solved for the prompts in the error e.

    t = z_{0.975} e + z_a sqrt(e^2 + s^2), with s the error of where the slack lies, at t = ``room_m``. As of the
    prompts of a run there are some at least: below, an interval over prompts is none.
    """
    from scipy.special import ndtri

    z = float(ndtri(confidence))
    needed = float(FEWEST_PROMPTS)
    for spread, own, room in zip(spread_m.tolist(), errors_m.tolist(), room_m.tolist(), strict=True):

        def asked(count: float, spread: float = spread, own: float = own) -> float:
            error = math.sqrt(spread / count)
            return Z_INTERVAL * error + z * math.hypot(error, own)

        if z * own >= room:
            return None
        low, high = 1.0, 2.0
        while asked(high) > room:
            low, high = high, high * 2
            if high > MOST_PROMPTS:
                return None
        while high - low > 0.5:
            middle = (low + high) / 2
            low, high = (middle, high) if asked(middle) > room else (low, middle)
        needed = max(needed, high)
    return math.ceil(needed)
