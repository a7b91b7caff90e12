"""How many prompts and how many responses a demand needs, by what a pilot says of slacks to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stage1_dual.dual.pilot import FEWEST_RESPONSES, Pilot
from stage1_dual.dual.pilot_moments import nearest_covariance
from stage1_dual.dual.plan_trust import pilot_reasons, size_reasons
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.slack_prediction import MOST_PROMPTS, Prediction
from stage1_dual.dual.tightening import Z_INTERVAL

# Where numbers of responses are looked for.
_RESPONSES = (FEWEST_RESPONSES, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# Of what is allowed, the share that the bias may take where the number of responses is chosen; what a plan is not
# trusted beyond (``plan_trust``) has its error in it too.
_WANTED_BIAS_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """A number of prompts and of responses, and what is expected of them. Units are those of the columns.

    Attributes:
        n_prompts: prompts that determine lam*; None where no number of them will do with the responses there may be.
        n_responses: responses to each.
        miss: probability that some slack is off the demand by more than is allowed.
        errors_m: standard errors of the slacks, shape (m,).
        offset_m: expected slacks, shape (m,): what few responses leave on the safe side, or the room of what does not
            bind.
        reward_cost: reward that is given away by the number of responses being finite, reward units.
        evaluation_prompts: prompts of the final evaluation; None where no number of them will do.
        room_m: what is then to be asked beyond the demand, shape (m,).
        reasons: why the plan is not to be trusted; empty where it is.
    """

    n_prompts: int | None
    n_responses: int
    miss: float
    errors_m: FloatArray
    offset_m: FloatArray
    reward_cost: float
    evaluation_prompts: int | None
    room_m: FloatArray
    reasons: tuple[str, ...]


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


def plan_sizes(pilot: Pilot, request: SizeRequest) -> SamplePlan:
    """The cheapest N x K with which every slack is within; where none is, the best there is, and why it is not.

    Args:
        pilot: what was measured.
        request: what is asked for.
    """
    reasons = pilot_reasons(pilot)
    found = _cheapest(pilot, request)
    n_prompts: int | None
    if found is not None:
        n_prompts, chosen = found
    else:
        n_prompts, chosen, reason = _best_there_is(pilot, request)
        reasons.append(reason)
    reasons += size_reasons(pilot, chosen, request.within_m)
    n_reckoned = MOST_PROMPTS if n_prompts is None else n_prompts
    evaluation_prompts = None if n_prompts is None else _evaluation_prompts(pilot, request, chosen, n_prompts)
    return SamplePlan(
        n_prompts=n_prompts,
        n_responses=chosen.n_responses,
        miss=chosen.miss(n_reckoned, request.within_m),
        errors_m=chosen.errors_m(n_reckoned),
        offset_m=chosen.offset_m,
        reward_cost=reward_cost(pilot, chosen.n_responses),
        evaluation_prompts=evaluation_prompts,
        room_m=request.room_m,
        reasons=tuple(reasons),
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
    found = _cheapest(pilot, request)
    wanted = (2 * now[0], 2 * now[1]) if found is None else (found[0], found[1].n_responses)
    sizes = tuple(max(drawn, min(one, 4 * drawn, limit)) for one, drawn, limit in zip(wanted, now, most, strict=True))
    return None if sizes == now else (sizes[0], sizes[1])


def _cheapest(pilot: Pilot, request: SizeRequest) -> tuple[int, Prediction] | None:
    """The smallest N x K within the limits with which every slack is within, or None."""
    counts = _response_counts(pilot, request)
    # Where no number of responses leaves so little bias, all are candidates, and the plan says so.
    counts = [count for count in counts if _bias_share(pilot, request, count) <= _WANTED_BIAS_SHARE] or counts
    candidates = [
        (needed, prediction)
        for prediction in map(pilot.predict, counts)
        if (needed := _enough_prompts(prediction, request)) is not None
    ]
    return min(candidates, key=lambda one: (one[0] * one[1].n_responses, one[0])) if candidates else None


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


def _best_there_is(pilot: Pilot, request: SizeRequest) -> tuple[int | None, Prediction, str]:
    """Where nothing within the limits will do: the sizes that come nearest, and what would be needed."""
    n_prompts = request.n_prompts or request.most_prompts
    n_reckoned = MOST_PROMPTS if n_prompts is None else n_prompts
    tried = [pilot.predict(count) for count in _response_counts(pilot, request)]
    chosen = min(tried, key=lambda one: (one.miss(n_reckoned, request.within_m), one.n_responses))
    miss = chosen.miss(n_reckoned, request.within_m)
    prompts = "prompts without end" if n_prompts is None else f"{n_prompts:,} prompts"
    reason = (
        f"with {prompts} and at most {tried[-1].n_responses:,} responses each the demand is missed by more than is "
        f"allowed with probability {miss:.1%}, where {1 - request.confidence:.1%} is asked for"
    )
    needed = chosen.prompts(request.within_m, confidence=request.confidence)
    if n_prompts is not None and needed is not None:
        reason += f"; {needed:,} prompts of {chosen.n_responses:,} responses would do"
    return n_prompts, chosen, reason


def _evaluation_prompts(pilot: Pilot, request: SizeRequest, chosen: Prediction, n_prompts: int) -> int | None:
    """Prompts with which the evaluation says *satisfied* of each constraint with the confidence asked for.

    The rule of ``assurance`` (:mod:`stage1_dual.dual.tightening`), t = z_{0.975} e + z_a sqrt(e^2 + s^2), solved for
    the prompts in e at t = ``room_m``, of the constraints that bind.
    """
    from scipy.special import ndtri

    z = float(ndtri(request.confidence))
    responses = request.evaluation_responses or chosen.n_responses
    between_m = np.diag(nearest_covariance(pilot.moments.between_mm))
    variance_m = between_m + pilot.sampled_m / responses + pilot.reference_m / chosen.n_responses
    needed = 2.0
    for j in np.flatnonzero(pilot.is_active_m):
        spread, own, room = float(variance_m[j]), float(chosen.errors_m(n_prompts)[j]), float(request.room_m[j])

        def asked(count: float, spread: float = spread, own: float = own) -> float:
            error = math.sqrt(spread / count)
            return Z_INTERVAL * error + z * math.hypot(error, own)

        if z * own >= room:
            return None
        low, high = 1.0, 2.0
        while asked(high) > room:
            low, high = high, high * 2
        while high - low > 0.5:
            middle = (low + high) / 2
            low, high = (middle, high) if asked(middle) > room else (low, middle)
        needed = max(needed, high)
    return math.ceil(needed)
