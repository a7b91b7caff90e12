"""The optimisation: from a policy and training data to the best policy on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments

from pipeline.contracts.errors import writing_failure
from stage2_policy.callbacks import ProgressBar, StopOnDivergence
from stage2_policy.checkpointing import SealCheckpoints, last_checkpoint
from stage2_policy.data import TrainingData
from stage2_policy.held_out import HeldOutEstimate
from stage2_policy.objectives import find_objective
from stage2_policy.reference import ReferenceLogp
from stage2_policy.settings import TrainSettings
from stage2_policy.step_sampler import StepSampler, count_all_steps
from stage2_policy.tilted_trainer import Policy, TiltedTrainer


@dataclass(frozen=True)
class Fit:
    """What the optimisation did; the model holds the weights that were kept.

    Attributes:
        curve: the log of the run, the reference at step 0 first.
        steps: optimisation steps taken.
        best_step: step of the weights that were kept.
        stop_reason: why the run ended.
        held_out: estimate of the policy that was kept.
        held_out_reference: the same for the reference policy.
        weights: the weights that were kept, by name, on the CPU where they were sharded; of an adapter, its own too.
        factors: of the change for each score, where each was given one (:func:`stage2_policy.tangent.choose_factors`).
        reached: share of the gains that the constraints require on held-out prompts that these factors reach.
    """

    curve: Sequence[Mapping[str, Any]]
    steps: int
    best_step: int
    stop_reason: str
    held_out: HeldOutEstimate
    held_out_reference: HeldOutEstimate
    weights: Mapping[str, torch.Tensor]
    factors: Mapping[str, float] = field(default_factory=dict)
    reached: float = 1.0


def fit_policy(
    model: Policy,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
    seed: int,
    checkpoints: Path,
    show_progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> Fit:
    """Train a model, the reference policy or one to go on from; it ends as the best policy on held-out prompts.

    Args:
        model: the reference policy; trained in place.
        data: what is trained on.
        ref_logp: the reference's log-probabilities of it.
        settings: of the run.
        seed: of the order of the responses, of drawn labels, and of dropout where a model has it.
        checkpoints: folder of checkpoints; a run that left some there is continued.
        show_progress: show a progress bar.
        callbacks: of transformers, beside those that stop the run.

    Raises:
        TrainingDivergedError: the loss is no longer a number.
    """
    trainer = _build_trainer(
        model,
        data,
        ref_logp=ref_logp,
        settings=settings,
        seed=seed,
        checkpoints=checkpoints,
        callbacks=[*callbacks, *([ProgressBar()] if show_progress else [])],
    )
    start = trainer.estimate(ref_logp.held_out)
    with PartialState().main_process_first():
        last = last_checkpoint(checkpoints)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = writing_failure(error, place=checkpoints)
        if failure is None:
            raise
        raise failure from error
    state = trainer.state
    curve = [
        {"step": 0, "epoch": 0.0, **start.metrics("eval")},
        *_curve(state.log_history, steps=state.global_step),
    ]
    assert state.best_global_step is not None  # every run evaluates at least once, at a finite loss
    best = next(entry for entry in curve if entry["step"] == state.best_global_step and "eval_loss" in entry)
    return Fit(
        curve=curve,
        steps=state.global_step,
        best_step=state.best_global_step,
        stop_reason=(
            "all epochs done"
            if state.global_step >= state.max_steps
            else f"the held-out gap has not fallen in {settings.patience} evaluations"
        ),
        held_out=HeldOutEstimate.from_metrics(best, "eval"),
        held_out_reference=start,
        weights=trainer.accelerator.get_state_dict(trainer.model_wrapped),
    )


def _build_trainer(
    model: Policy,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
    seed: int,
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback],
) -> TiltedTrainer:
    processes = PartialState()
    sampler = StepSampler(
        data.train.lengths,
        data.train.prompt_p,
        tokens_per_step=settings.tokens_per_step,
        tokens_per_microbatch=settings.tokens_per_microbatch,
        responses_per_group=settings.responses_per_group,
        seed=seed,
        process=processes.process_index,
        n_processes=processes.num_processes,
    )
    steps = count_all_steps(sampler.n_steps, epochs=settings.epochs)
    interval = max(1, math.ceil(steps / settings.evaluations))
    args = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        gradient_accumulation_steps=sampler.microbatches_per_step // processes.num_processes,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bfloat16",
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # patience goes on where a killed run left it
        logging_steps=_logging_steps(steps, interval),
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        seed=seed,
    )
    trainer = TiltedTrainer(
        model,
        args,
        row_loss=find_objective(settings.objective).load_row_loss(),
        train=data.train,
        ref_logp=ref_logp.train,
        held_out=data.held_out,
        held_out_ref_logp=ref_logp.held_out,
        sampler=sampler,
        beta=data.beta,
        label_seed=seed,
        token_budget=settings.tokens_per_microbatch,
        callbacks=[
            SealCheckpoints(),
            StopOnDivergence(),
            EarlyStoppingCallback(early_stopping_patience=settings.patience),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _logging_steps(steps: int, interval: int) -> int:
    """About a hundred logged losses a run, at steps among which are those of all checkpoints.

    A continued run then logs the same means as an undisturbed one.
    """
    return max(step for step in range(1, max(1, steps // 100) + 1) if interval % step == 0)


def _curve(log_history: Sequence[Mapping[str, Any]], *, steps: int) -> list[dict[str, Any]]:
    """The log of the run without the summary of transformers, and ours in its place.

    Theirs has times, which would make equal policies different artifacts, and a mean loss that counts only the steps
    of the last call; ours is the mean over all steps, each logged interval by its length.
    """
    curve = [dict(entry) for entry in log_history if "train_runtime" not in entry]
    total, before = 0.0, 0
    for entry in curve:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = entry["step"]
    if before:
        curve.append({"step": steps, "epoch": curve[-1]["epoch"], "train_loss": total / before})
    return curve
