"""Whether training paid: the kept policy against the reference on held-out prompts, with advice in numbers.

The closed fraction of the kept checkpoint is a ratio of means over prompts; its standard error is that of the delta
method, clustered by prompt. The checkpoint is the best of several on the same prompts, which flatters it, so the
interval is widened until the intervals of all of them hold together with 95% (Bonferroni). Then:

- ``paid``: the whole interval lies above 0, the reference.
- ``did not pay``: the estimate is not above 0. It is the best of all checkpoints: none beat the reference.
- ``undecided``: the estimate is above 0, and 0 lies inside the interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from scipy.special import stdtrit

from pipeline.contracts.training_verdict import TrainingVerdict
from stage2_policy.foresight import Forecast
from stage2_policy.settings import TrainSettings

_ERROR_RATE = 0.05

# Beyond these the advice is no advice: another factor of the rate, and a plan for prompts nobody has.
_RATE_FACTOR = 3.0
_MOST_TIMES_PROMPTS = 100

_HARDLY_MOVED = 0.01
"""KL over the gap to the tilted optimum, both in nats, below which a policy is still the reference."""


def judge_training(
    curve: Sequence[Mapping[str, Any]],
    *,
    best_step: int,
    settings: TrainSettings,
    n_train_prompts: int,
    n_responses: int,
    n_held_out_prompts: int,
    forecast: Forecast | None = None,
) -> TrainingVerdict:
    """Judge a finished run by the rule of this module.

    Args:
        curve: the log of the run, the reference at step 0 first.
        best_step: step of the checkpoint that was kept.
        settings: of the run.
        n_train_prompts: prompts trained on.
        n_responses: responses trained on.
        n_held_out_prompts: prompts that chose the checkpoint.
        forecast: made before training, where one was.
    """
    reference, *checkpoints = [entry for entry in curve if "eval_loss" in entry]
    kept = next(entry for entry in checkpoints if entry["step"] == best_step)
    fraction = float(kept["eval_closed_fraction"])
    # Absent with a single held-out prompt, and in the log of a run that an older version began.
    error = kept.get("eval_closed_fraction_error")
    ends = None
    if error is not None:
        half = float(stdtrit(n_held_out_prompts - 1, 1 - _ERROR_RATE / 2 / len(checkpoints))) * error
        ends = (fraction - half, fraction + half)
    outcome: Literal["paid", "undecided", "did not pay"] = "undecided"
    if fraction <= 0:
        outcome = "did not pay"
    elif ends is not None and ends[0] > 0:
        outcome = "paid"
    found = f"{fraction:.3f}{'' if ends is None else f' [{ends[0]:.3f}, {ends[1]:.3f}]'}"
    where = f"on {_count(n_held_out_prompts, 'held-out prompt')}"
    finding = {
        "paid": f"the kept checkpoint (step {best_step}) closed {found} of the way to the tilted optimum {where}",
        "undecided": (
            f"the best checkpoint (step {best_step}) cannot be told from the reference {where}: closed fraction "
            f"{found}"
        ),
        "did not pay": (
            f"no checkpoint beat the reference {where}: closed fraction {found} at best, at step {best_step}"
        ),
    }[outcome]
    reasons: tuple[str, ...] = (finding,)
    advice: tuple[str, ...] = ()
    if outcome != "paid":
        cause, remedies = _explain(
            reference, checkpoints, settings=settings, best_step=best_step, n_train_prompts=n_train_prompts
        )
        reasons += (cause, _tried(curve, settings, n_train_prompts=n_train_prompts, n_responses=n_responses))
        if forecast is not None:
            reasons += (f"Before training, {forecast.sentence}",)
        advice = (*remedies, *_advise_on_prompts(fraction, ends, n_held_out_prompts))
    return TrainingVerdict(
        verdict=outcome,
        closed_fraction=fraction,
        closed_fraction_ci95=ends,
        n_checkpoints=len(checkpoints),
        n_prompts=n_held_out_prompts,
        reasons=reasons,
        advice=advice,
    )


def _tried(
    curve: Sequence[Mapping[str, Any]], settings: TrainSettings, *, n_train_prompts: int, n_responses: int
) -> str:
    weights = "all weights" if settings.adapter == "none" else f"{settings.adapter} of rank {settings.lora_r}"
    data = f"{n_train_prompts} prompts with {n_responses / n_train_prompts:.0f} responses each"
    if settings.optimizer == "natural_gradient":
        return f"Tried: one step of the natural gradient, {weights}, {data}"
    return (
        f"Tried: {settings.objective} at a learning_rate of {settings.learning_rate:.2g}, {weights}, "
        f"{_count(curve[-1]['step'], 'step')} of {_count(settings.epochs, 'epoch')}, "
        f"{data}"
    )


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _explain(
    reference: Mapping[str, Any],
    checkpoints: Sequence[Mapping[str, Any]],
    *,
    settings: TrainSettings,
    best_step: int,
    n_train_prompts: int,
) -> tuple[str, tuple[str, ...]]:
    """What the curve shows, and what to do about it."""
    rate, epochs = settings.learning_rate, settings.epochs
    spent = max(float(entry["eval_kl"]) for entry in checkpoints)
    available = float(reference["eval_loss"])
    cost = f"a KL of {spent:.2g} nats where {available:.2g} could be gained"
    if settings.optimizer == "natural_gradient":
        return f"The score functions of the adapter explain too little of the scores ({cost})", (
            f"train on about {4 * n_train_prompts} prompts instead of {n_train_prompts}",
            f"or give the adapter a higher rank than {settings.lora_r}, or more layers",
        )
    if spent < _HARDLY_MOVED * available:
        return f"The policy hardly moved ({cost})", (
            f"raise learning_rate from {rate:.2g} to {rate * _RATE_FACTOR:.2g}",
            f"or epochs from {epochs:g} to {epochs * _RATE_FACTOR:.2g}",
        )
    if len(checkpoints) > 1 and checkpoints[-1]["step"] == best_step and checkpoints[-1]["eval_loss"] < available:
        return f"The held-out gap was still falling when training ended ({cost})", (
            f"raise epochs from {epochs:g} to {epochs * 2:.2g}",
        )
    shorter = _shorter_way(reference, checkpoints)
    if shorter is None:
        slower = f"lower learning_rate from {rate:.2g} to {rate / _RATE_FACTOR:.2g}"
    else:
        factor, fraction = shorter
        slower = (
            f"lower learning_rate from {rate:.2g} to about {rate * factor:.2g}: on its way, {factor:.2g} of it "
            f"would have closed {fraction:.2g}"
        )
    return f"The policy moved ({cost}) to where held-out prompts gain nothing", (
        slower,
        f"or train on about {4 * n_train_prompts} prompts instead of {n_train_prompts}",
    )


def _shorter_way(reference: Mapping[str, Any], checkpoints: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """How much shorter a way would have been best, and what it would have closed; None where none would.

    To second order in the log-ratios a share a of the way gains a G and costs a^2 KL, with G what
    E[r + <lam*, g - b>] / beta gained on all of it, nats: a = G / (2 KL) is best, and gains G^2 / (4 KL).
    """
    available = float(reference["eval_loss"])
    ways = []
    for entry in checkpoints:
        spent = float(entry["eval_kl"])
        gained = float(entry["eval_closed_fraction"]) * available + spent
        if 0 < gained < spent:
            ways.append((gained / (2 * spent), gained**2 / (4 * spent * available)))
    return max(ways, key=lambda way: way[1], default=None)


def _advise_on_prompts(fraction: float, ends: tuple[float, float] | None, n_prompts: int) -> Iterator[str]:
    """How many held-out prompts would decide, were the estimate the truth."""
    if fraction <= 0:
        return
    if ends is None:
        yield f"hold out more prompts than {n_prompts}: one gives no interval"
        return
    needed = math.ceil(n_prompts * ((ends[1] - ends[0]) / 2 / fraction) ** 2)
    if needed <= _MOST_TIMES_PROMPTS * n_prompts:
        yield f"to decide, hold out about {needed} prompts instead of {n_prompts} (held_out_fraction, or more prompts)"
