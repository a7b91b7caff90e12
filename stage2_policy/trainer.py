"""The one training run of stage 2, on the Trainer of transformers."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from typing_extensions import override

from pipeline.contracts.artifacts import write_json
from pipeline.contracts.errors import InputError
from stage2_policy.callbacks import ProgressBar, StopOnDivergence
from stage2_policy.data import GroupedRow, Responses, StepSampler, TrainingData, read_training_data
from stage2_policy.export import save_policy, write_model_card
from stage2_policy.held_out import HeldOutEstimate, estimate_held_out
from stage2_policy.logprobs import SequenceBatch, build_batch, score_sequences, sequence_logp
from stage2_policy.objectives import Objective, Targets, read_objective

TRAINING_LOG = "training_log.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainSettings:
    """The one fine-tuning run. There is no lambda and no beta here: they come from dual.json.

    Attributes:
        objective: name in :data:`stage2_policy.objectives.OBJECTIVES`, or several names with their weights.
        learning_rate: peak rate of AdamW.
        epochs: passes over the training responses.
        tokens_per_step: tokens an optimisation step reads, prompt and response, about.
        tokens_per_microbatch: tokens in memory at once; affects speed and memory only.
        responses_per_group: how many responses of a prompt are compared with each other, about.
        warmup_ratio: share of the steps over which the rate rises; after it, it falls to zero on a cosine.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        held_out_fraction: share of the train prompts that choose the checkpoint instead of training it.
        evaluations: held-out evaluations, and checkpoints, over the run.
        patience: stop after so many evaluations without a better one.
        dtype: of the arithmetic; weights and optimiser stay in float32.
        seed: of the order of the responses, of drawn labels, and of dropout where a model has it.
    """

    objective: str | Mapping[str, float] = "tilted_pairwise"
    learning_rate: float = 2e-4
    epochs: float = 1.0
    tokens_per_step: int = 16384
    tokens_per_microbatch: int = 8192
    responses_per_group: int = 8
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    held_out_fraction: float = 0.1
    evaluations: int = 12
    patience: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What the run did.

    Attributes:
        steps: optimisation steps taken.
        best_step: step of the checkpoint that was kept.
        stop_reason: why the run ended.
        held_out: estimate of the checkpoint that was kept.
        held_out_reference: the same for the reference policy.
        n_train_prompts: prompts trained on.
        n_held_out_prompts: prompts that chose the checkpoint.
        n_responses: responses trained on, each once an epoch.
        sampler_gap: mean |log pi_ref by training arithmetic - by the sampler's|, nats per response, held-out prompts.
        wall_seconds: of this call.
        identities: identity of each artifact read, by name.
    """

    steps: int
    best_step: int
    stop_reason: str
    held_out: HeldOutEstimate
    held_out_reference: HeldOutEstimate
    n_train_prompts: int
    n_held_out_prompts: int
    n_responses: int
    sampler_gap: float
    wall_seconds: float
    identities: Mapping[str, str]


class TiltedTrainer(Trainer):
    """A Trainer whose batches are responses with tilted weights, and whose evaluation is held-out optimality.

    Args:
        model: the policy, initialised from the reference.
        args: ordinary training arguments; ``gradient_accumulation_steps`` must be ``sampler.microbatches_per_step``.
        objective: what is minimised.
        train: responses trained on.
        ref_logp: log pi_ref of them, nats, shape (n,).
        held_out: responses that choose the checkpoint.
        held_out_ref_logp: log pi_ref of them, nats.
        sampler: rows of each microbatch.
        beta: KL strength, reward per nat.
        label_seed: of the noise of drawn labels.
        token_budget: tokens of a held-out batch.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        objective: Objective,
        train: Responses,
        ref_logp: np.ndarray,
        held_out: Responses,
        held_out_ref_logp: np.ndarray,
        sampler: StepSampler,
        beta: float,
        label_seed: int,
        token_budget: int,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(model, args, train_dataset=train, eval_dataset=held_out, callbacks=list(callbacks))
        self._policy = model
        self._objective = objective
        self._train = train
        self._targets = {
            "ref_logp": torch.from_numpy(ref_logp).float(),
            "weight": torch.from_numpy(train.weight).float(),
            "score": torch.from_numpy(train.tilt / beta).float(),
            "label_noise": torch.from_numpy(np.random.default_rng(label_seed).gumbel(size=len(train))).float(),
            "n_samples": torch.from_numpy(train.n_samples),
            "largest_ratio": torch.from_numpy(train.largest_ratio).float(),
        }
        self._held_out = held_out
        self._held_out_ref_logp = held_out_ref_logp
        self._sampler = sampler
        self._beta = beta
        self._token_budget = token_budget

    @override
    def get_train_dataloader(self) -> DataLoader[GroupedRow]:
        """Microbatches in the sampler's order."""
        loader: DataLoader[GroupedRow] = DataLoader(
            self._train,
            batch_sampler=self._sampler,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[GroupedRow] = self.accelerator.prepare(loader)
        return prepared

    def _collate(self, items: list[GroupedRow]) -> dict[str, torch.Tensor]:
        rows = [row for row, _ in items]
        return {
            **vars(build_batch([self._train.sequences[row] for row in rows])),
            **{name: values[rows] for name, values in self._targets.items()},
            "group": torch.tensor([group for _, group in items]),
        }

    @override
    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Unbiased estimate of the objective from one microbatch, nats.

        The mean over the microbatches of an epoch is exactly the mean over prompts of the sum over their responses.
        """
        batch = SequenceBatch(**{name: inputs[name] for name in SequenceBatch.__dataclass_fields__})
        targets = Targets(
            **{name: inputs[name] for name in self._targets},
            group=inputs["group"],
            beta=torch.tensor(self._beta),
        )
        losses = self._objective.row_loss(sequence_logp(model, batch), targets)
        return losses.sum() * (len(self._sampler) / len(self._train.prompt_ids))

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out estimates of the policy as it is now."""
        with self.compute_loss_context_manager():
            logp = score_sequences(
                self._policy, self._held_out.sequences, token_budget=self._token_budget, show_progress=False
            )
        metrics = self.estimate(logp).metrics(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def estimate(self, logp: np.ndarray) -> HeldOutEstimate:
        """Held-out estimates of a policy with these log-probabilities, nats, shape (n,)."""
        return estimate_held_out(
            self._held_out,
            logp=logp,
            ref_logp=self._held_out_ref_logp,
            beta=self._beta,
        )


def train_policy(
    *,
    reference: Path,
    samples: Path,
    tilted: Path,
    dual: Path,
    output: Path,
    settings: TrainSettings,
    show_progress: bool,
) -> TrainResult:
    """Fine-tune the reference policy once on the tilted samples and save it as an ordinary checkpoint.

    A killed run, called again with the same arguments, continues from its last checkpoint with the same order of
    responses and optimiser state.

    Args:
        reference: folder of the checkpoint the samples were drawn from.
        samples: folder of the samples table.
        tilted: folder of the tilted table.
        dual: folder of dual.json, which gives lam* and beta.
        output: folder of the policy; also gets the loss curve, and checkpoints while training.
        settings: of the run.
        show_progress: show progress bars.

    Raises:
        InputError: inputs that do not belong together, or a setting out of range; see
            :func:`stage2_policy.data.read_training_data`.
        TrainingDivergedError: the loss is no longer a number.
    """
    started = time.monotonic()
    _validate(settings)
    data = read_training_data(
        reference=reference, samples=samples, tilted=tilted, dual=dual, held_out_fraction=settings.held_out_fraction
    )
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    torch.nn.Module.to(model, PartialState().device)
    ref_logp = score_reference(model, data, settings=settings, show_progress=show_progress)
    fit = fit_policy(
        model,
        data,
        ref_logp=ref_logp,
        settings=settings,
        checkpoints=output / _CHECKPOINTS,
        show_progress=show_progress,
    )
    write_json(output / TRAINING_LOG, fit.curve)
    save_policy(model, AutoTokenizer.from_pretrained(reference), output)
    write_model_card(output, dual=data.dual, evaluation=None, identities=data.identities, training=asdict(settings))
    shutil.rmtree(output / _CHECKPOINTS)  # last: a run killed before this line still continues
    return TrainResult(
        steps=fit.steps,
        best_step=fit.best_step,
        stop_reason=fit.stop_reason,
        held_out=fit.held_out,
        held_out_reference=fit.held_out_reference,
        n_train_prompts=len(data.train.prompt_ids),
        n_held_out_prompts=len(data.held_out.prompt_ids),
        n_responses=len(data.train),
        sampler_gap=float(np.mean(np.abs(ref_logp.held_out - data.held_out.sampler_logp))),
        wall_seconds=time.monotonic() - started,
        identities=data.identities,
    )


@dataclass(frozen=True)
class ReferenceLogp:
    """Log pi_ref of the responses, nats, by the arithmetic of training.

    Attributes:
        train: of those trained on, shape (n,); zeros where the objective does not read them.
        held_out: of those that choose the checkpoint, shape (h,).
    """

    train: np.ndarray
    held_out: np.ndarray


def score_reference(
    model: PreTrainedModel, data: TrainingData, *, settings: TrainSettings, show_progress: bool
) -> ReferenceLogp:
    """Log-probabilities of the responses under the reference policy, once for the whole run.

    Args:
        model: the reference policy.
        data: the responses.
        settings: of the run.
        show_progress: show progress bars.
    """
    parts = {
        "train": data.train if read_objective(settings.objective).uses_reference else None,
        "held_out": data.held_out,
    }
    return ReferenceLogp(
        **{
            name: np.zeros(len(data.train))
            if responses is None
            else score_sequences(
                model,
                responses.sequences,
                token_budget=settings.tokens_per_microbatch,
                show_progress=show_progress,
                description=f"reference, {name} responses",
            )
            for name, responses in parts.items()
        }
    )


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
    """

    curve: Sequence[Mapping[str, Any]]
    steps: int
    best_step: int
    stop_reason: str
    held_out: HeldOutEstimate
    held_out_reference: HeldOutEstimate


def fit_policy(
    model: PreTrainedModel,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
    checkpoints: Path,
    show_progress: bool,
) -> Fit:
    """Train a model that starts as the reference policy; it ends as the best policy on held-out prompts.

    Args:
        model: the reference policy; trained in place.
        data: what is trained on.
        ref_logp: the reference's log-probabilities of it.
        settings: of the run.
        checkpoints: folder of checkpoints; a run that left some there is continued.
        show_progress: show a progress bar.

    Raises:
        InputError: a setting out of range.
        TrainingDivergedError: the loss is no longer a number.
    """
    trainer = _build_trainer(
        model, data, ref_logp=ref_logp, settings=settings, checkpoints=checkpoints, show_progress=show_progress
    )
    start = trainer.estimate(ref_logp.held_out)
    trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    state = trainer.state
    curve = [{"step": 0, "epoch": 0.0, **start.metrics("eval")}, *state.log_history]
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
        held_out=HeldOutEstimate(**{name: best[f"eval_{name}"] for name in HeldOutEstimate.__dataclass_fields__}),
        held_out_reference=start,
    )


def _build_trainer(
    model: PreTrainedModel,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
    checkpoints: Path,
    show_progress: bool,
) -> TiltedTrainer:
    sampler = StepSampler(
        data.train,
        tokens_per_step=settings.tokens_per_step,
        tokens_per_microbatch=settings.tokens_per_microbatch,
        responses_per_group=settings.responses_per_group,
        seed=settings.seed,
    )
    steps = math.ceil(settings.epochs * sampler.n_steps)
    interval = max(1, math.ceil(steps / settings.evaluations))
    args = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        gradient_accumulation_steps=sampler.microbatches_per_step,
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
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    trainer = TiltedTrainer(
        model,
        args,
        objective=read_objective(settings.objective),
        train=data.train,
        ref_logp=ref_logp.train,
        held_out=data.held_out,
        held_out_ref_logp=ref_logp.held_out,
        sampler=sampler,
        beta=data.beta,
        label_seed=settings.seed,
        token_budget=settings.tokens_per_microbatch,
        callbacks=[
            StopOnDivergence(),
            EarlyStoppingCallback(early_stopping_patience=settings.patience),
            *([ProgressBar()] if show_progress else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half-written ones are deleted.

    trainer_state.json is the last file of a checkpoint.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            complete.append(path)
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _validate(settings: TrainSettings) -> None:
    objective = read_objective(settings.objective)
    positive = (
        "learning_rate",
        "epochs",
        "tokens_per_step",
        "tokens_per_microbatch",
        "responses_per_group",
        "evaluations",
        "patience",
    )
    for name in positive:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"training setting `{name}` is {value}; it must be a positive number")
    if objective.uses_groups and settings.responses_per_group < 2:
        raise InputError(
            f"training setting `responses_per_group` is {settings.responses_per_group}; the objective "
            "compares responses of a prompt and needs at least 2"
        )
    for name in ("warmup_ratio", "weight_decay", "max_grad_norm"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"training setting `{name}` is {value}; it must be a number of at least 0")
    if not 0 < settings.held_out_fraction < 1:
        raise InputError(f"training setting `held_out_fraction` is {settings.held_out_fraction}; it must be in (0, 1)")
    if settings.dtype not in ("float32", "bfloat16"):
        raise InputError(f"training setting `dtype` is `{settings.dtype}`; it must be float32 or bfloat16")
