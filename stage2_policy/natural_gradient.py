"""Training by one step of the natural gradient, for a few thousand responses, of which small steps learn little.

The gradient of a log-ratio objective at the reference is a policy gradient: each response pulls all its tokens by the
whole of its score, and an optimiser that moves every weight by its rate spends the KL on that noise. One step of least
squares (:mod:`stage2_policy.tangent`) weighs the directions by what they explain, and has no rate to miss.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from accelerate import PartialState
from peft import PeftModel

from stage2_policy.data import TrainingData
from stage2_policy.fit import Fit
from stage2_policy.held_out import estimate_held_out
from stage2_policy.logprobs import score_sequences
from stage2_policy.reference import ReferenceLogp, arithmetic
from stage2_policy.score_functions import AdapterWeights, write_score_functions
from stage2_policy.settings import TrainSettings, require_solvable
from stage2_policy.tangent import Judging, choose_factors, fit_tangent

log = logging.getLogger("dualign")


def fit_natural_gradient(
    model: PeftModel,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
    seed: int,
    folder: Path,
    show_progress: bool,
) -> Fit:
    """Take the step; the model ends as the policy.

    Args:
        model: the reference with an adapter that is 0; its B is set in place.
        data: what is trained on.
        ref_logp: the reference's log-probabilities of it.
        settings: of the run. With ``match_prediction`` each score has a factor of its own, so that the policy gains in
            each constraint what the tilted weights gain on held-out prompts.
        seed: of the adapter's A, which the score functions depend on.
        folder: of the score functions, of which a killed run keeps those that are done.
        show_progress: show progress bars.

    Raises:
        InputError: a single prompt, too many responses, or a disk without room for their score functions.
    """
    require_solvable(n_prompts=len(data.train.prompt_ids), n_responses=len(data.train))
    device = PartialState().device
    with arithmetic(settings.dtype, device):
        functions = write_score_functions(
            model,
            data.train,
            folder=folder,
            key={**data.identities, "seed": seed, "adapter": _adapter(settings)},
            token_budget=settings.tokens_per_microbatch,
            show_progress=show_progress,
        )
    columns = data.columns("train", np.arange(len(data.train)))
    tangent = fit_tangent(functions, columns, data.train.prompt_p, nats=data.nats)
    log.info(
        "train: least squares on the score functions of %s weights explains %.3f of the variance of s on prompts left "
        "out (penalty %.2g)",
        f"{functions.shape[1]:,}",
        tangent.explained,
        tangent.penalty,
    )
    weights = AdapterWeights(model)
    steps = tangent.changes * data.nats[:, None].astype(np.float32)

    def log_ratio(change: np.ndarray, *, of: str) -> np.ndarray:
        weights.set(change)
        with arithmetic(settings.dtype, device):
            logp = score_sequences(
                model,
                data.held_out.sequences,
                token_budget=settings.tokens_per_microbatch,
                show_progress=show_progress,
                description=f"held-out responses, {of}",
            )
        return np.asarray(logp - ref_logp.held_out)

    names = (data.solution.reward.name, *data.solution.names)
    factors, reached = np.ones(len(steps)), 1.0
    if settings.match_prediction:
        ratios = [
            log_ratio(step, of=f"change for {name}") if step.any() else np.zeros(len(data.held_out))
            for name, step in zip(names, steps, strict=True)
        ]
        chosen = choose_factors(_judging(data, np.stack(ratios, axis=1)))
        factors, reached = chosen.factors, chosen.reached
    logp = ref_logp.held_out + log_ratio(factors.astype(np.float32) @ steps, of="policy")
    start, end = (
        estimate_held_out(data.held_out, logp=one, ref_logp=ref_logp.held_out, beta=data.beta)
        for one in (ref_logp.held_out, logp)
    )
    return Fit(
        curve=[{"step": step, "epoch": float(step), **one.metrics("eval")} for step, one in enumerate((start, end))],
        steps=1,
        best_step=1,
        stop_reason="one step of the natural gradient",
        held_out=end,
        held_out_reference=start,
        weights=model.state_dict(),
        factors=dict(zip(names, factors.tolist(), strict=True)) if settings.match_prediction else {},
        reached=reached,
    )


def _adapter(settings: TrainSettings) -> list[object]:
    """What of the settings decides the score functions."""
    modules = settings.lora_target_modules
    return [
        settings.adapter,
        settings.dtype,
        settings.lora_r,
        settings.lora_alpha,
        modules if isinstance(modules, str) else list(modules),
    ]


def _judging(data: TrainingData, log_ratios: np.ndarray) -> Judging:
    """A policy must gain as much as the tilted weights in a constraint that binds, in another what it demands."""
    held_out, solution = data.held_out, data.solution
    columns = data.columns("held_out", np.arange(len(held_out)))
    n_prompts = len(held_out.prompt_ids)
    even = 1.0 / held_out.n_samples
    tilted = (held_out.weight - even) @ columns[:, 1:] / n_prompts
    demanded = solution.turned_thresholds_m - even @ columns[:, 1:] / n_prompts
    binds = solution.multipliers_m != 0
    kl = float(np.sum(held_out.weight * np.log(np.maximum(held_out.weight / even, 1e-300)))) / n_prompts
    return Judging(
        log_ratios=log_ratios,
        columns=columns,
        prompt_n=held_out.prompt_p,
        reward_nats=1.0 / data.beta,
        required=np.where(binds, tilted, np.minimum(demanded, tilted)),
        is_equality=np.array([one.direction == "=" for one in solution.constraints]),
        most_kl=np.inf if solution.kl_budget is None else kl,
    )
