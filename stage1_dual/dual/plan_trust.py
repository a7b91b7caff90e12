"""When a plan of sample sizes is not to be trusted, and why: limits on the pilot, and on what its responses leave."""

from __future__ import annotations

import math

from stage1_dual.dual.pilot import FEWEST_RESPONSES, Pilot
from stage1_dual.dual.problem import LARGEST_KL_SHARE
from stage1_dual.dual.segments import FloatArray
from stage1_dual.dual.tightening import Z_INTERVAL

# benchmarks/plan_validation.py has the cases that these are drawn from.
FEWEST_PILOT_PROMPTS = 30
FEWEST_PILOT_RESPONSES = 8
LARGEST_PILOT_KL_SHARE = 0.5
LARGEST_COLLAPSED_SHARE = 0.1
FEWEST_DEGREES = 12.0
LARGEST_BIAS_SHARE = 0.35
"""Of what is allowed, the share that the bias with its standard error may take: a few prompts with a strong tilt make
most of it, and a pilot may have none of them."""


def pilot_reasons(pilot: Pilot) -> list[str]:
    """Why nothing that follows from this pilot is to be trusted."""
    reasons = []
    for j, name in enumerate(pilot.names):
        if pilot.is_active_m[j] and not pilot.is_equality_m[j]:
            value, error = pilot.multipliers_m[j], pilot.multiplier_errors_m[j]
            if value < Z_INTERVAL * error:
                reasons.append(
                    f"{name}: lambda* is {value:.3g} with a standard error of {error:.2g} on the pilot: it may be 0, "
                    "and the demand met by the reward alone"
                )
        if pilot.counting_m[j] == 0:
            reasons.append(
                f"{name}: no prompt of the pilot has responses that differ in it, and nothing says how often others "
                "do; where none ever will, leave the constraint out"
            )
        elif pilot.counting_m[j] < FEWEST_PILOT_PROMPTS:
            reasons.append(
                f"{name}: {pilot.counting_m[j]} prompts of the pilot have responses that differ in it; "
                f"{FEWEST_PILOT_PROMPTS} are needed to say how prompts differ"
            )
        if pilot.is_active_m[j] and pilot.degrees_m[j] < FEWEST_DEGREES:
            reasons.append(
                f"{name}: a few prompts of the pilot carry how prompts differ ({pilot.degrees_m[j]:.0f} degrees of "
                f"freedom in effect, {FEWEST_DEGREES:.0f} are needed); more prompts"
            )
    if pilot.n_responses < FEWEST_PILOT_RESPONSES:
        reasons.append(
            f"the median prompt of the pilot has {pilot.n_responses:.0f} responses; "
            f"{FEWEST_PILOT_RESPONSES} are needed"
        )
    share = pilot.kl / math.log(pilot.n_responses)
    if share > LARGEST_PILOT_KL_SHARE:
        reasons.append(
            f"the KL of {pilot.kl:.2f} nats is {share:.0%} of the log of the pilot's {pilot.n_responses:.0f} "
            f"responses: a pilot of {math.ceil(math.exp(pilot.kl / LARGEST_PILOT_KL_SHARE))} a prompt would show it"
        )
    if pilot.collapsed_share > LARGEST_COLLAPSED_SHARE:
        reasons.append(
            f"{pilot.collapsed_share:.0%} of the pilot's prompts lean on fewer than 2 responses in effect: more "
            "responses a prompt, or a larger beta"
        )
    return reasons


def unsure_that_nothing_binds(pilot: Pilot, confidence: float) -> list[str]:
    """Why a pilot on which no constraint binds does not show that none does.

    Args:
        pilot: what was measured.
        confidence: with which the slacks are to be known to be positive, beside that of an interval.
    """
    from scipy.special import ndtri

    limit = max(Z_INTERVAL, float(ndtri(confidence)))
    return [
        f"{name}: on the pilot the reward alone meets the demand, by {room:.3g} with a standard error of {error:.2g}: "
        "it may bind"
        for name, room, error, differs in zip(
            pilot.names, pilot.moments.room_m, pilot.room_errors_m, pilot.counting_m, strict=True
        )
        if room <= limit * error and differs
    ]


def size_reasons(pilot: Pilot, n_responses: int, within_m: FloatArray) -> list[str]:
    """Why no number of prompts with so many responses each is to be planned for.

    Args:
        pilot: what was measured.
        n_responses: responses a prompt.
        within_m: how far a slack may be from the demand, units of the columns, shape (m,).
    """
    fewest = pilot.fewest_responses()
    if n_responses < fewest:
        # What so few leave the slacks off by is beyond the terms that are known of it, and not told.
        because = (
            "a plan has"
            if fewest == FEWEST_RESPONSES
            else f"the KL of {pilot.kl:.2f} nats needs exp(KL / {LARGEST_KL_SHARE:g}),"
        )
        return [f"{n_responses:,} responses a prompt are too few: {because} at least {fewest:,}"]
    reasons = []
    chosen = pilot.predict(n_responses)
    for j, name in enumerate(pilot.names):
        if not pilot.is_active_m[j]:
            continue
        bias, error = pilot.bias_at(n_responses)[j], chosen.offset_errors_m[j]
        if abs(bias) + error > LARGEST_BIAS_SHARE * within_m[j]:
            reasons.append(
                f"{name}: {n_responses:,} responses a prompt leave the policy {bias:+.3g} off its demand, whatever "
                f"the number of prompts, with a standard error of {error:.2g}: with it more than "
                f"{LARGEST_BIAS_SHARE:g} of the {within_m[j]:g} that is allowed; more responses a prompt"
            )
    return reasons
