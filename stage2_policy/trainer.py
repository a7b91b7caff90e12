"""The one training run of stage 2, on the Trainer of transformers."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import str_to_bool
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
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
from stage2_policy.adapters import (
    ADAPTER_FOLDER,
    AdapterSettings,
    attach_adapter,
    continue_adapter,
    load_reference,
    merge_adapter,
    start_from,
    validate_reference,
)
from stage2_policy.callbacks import ProgressBar, StopOnDivergence
from stage2_policy.data import (
    GroupedRow,
    Responses,
    Skipped,
    StepSampler,
    TrainingData,
    read_training_data,
    skip_negligible,
)
from stage2_policy.export import read_provenance, save_policy, write_model_card
from stage2_policy.held_out import HeldOutEstimate, estimate_held_out
from stage2_policy.logprobs import SequenceBatch, build_batch, can_share_prompts, score_sequences, sequence_logp
from stage2_policy.objectives import Objective, Targets, read_objective
from stage2_policy.reference import ReferenceLogp, arithmetic, reference_store, score_reference
from stage2_policy.settings import TrainSettings, validate_settings
from stage2_policy.stretch import WIDEST, matching_factor, stretch_policy

Policy = PreTrainedModel | PeftModel
TRAINING_LOG = "training_log.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainResult:
    """What the run did.

    Attributes:
        steps: optimisation steps taken.
        best_step: step of the checkpoint that was kept.
        stop_reason: why the run ended.
        held_out: estimate of the checkpoint that was kept, before it was stretched.
        held_out_reference: the same for the reference policy.
        stretch: factor by which the kept policy was moved along the ray from the reference; 1 where not asked for.
        n_train_prompts: prompts trained on.
        n_held_out_pairs: pairs of a data set that were not trained on, because their prompt is held out.
        n_held_out_prompts: prompts that chose the checkpoint.
        n_responses: responses trained on, each once an epoch.
        skipped: what was left out for its negligible weight.
        sampler_gap: mean |log pi_ref by training arithmetic - by the sampler's|, nats per response, held-out prompts.
        wall_seconds: of this call.
        identities: identity of each artifact read, by name.
    """

    steps: int
    best_step: int
    stop_reason: str
    held_out: HeldOutEstimate
    held_out_reference: HeldOutEstimate
    stretch: float
    n_train_prompts: int
    n_held_out_pairs: int
    n_held_out_prompts: int
    n_responses: int
    skipped: Skipped
    sampler_gap: float
    wall_seconds: float
    identities: Mapping[str, str]

    @property
    def falls_short_of_prediction(self) -> bool:
        """Whether the policy was moved as far as it may be, and the prediction is further."""
        return self.stretch in (WIDEST, 1 / WIDEST)


class TiltedTrainer(Trainer):
    """A Trainer whose batches are responses with tilted weights, and whose evaluation is held-out optimality.

    Args:
        model: the policy, initialised from the reference.
        args: ordinary training arguments; ``gradient_accumulation_steps`` must be this process's share of
            ``sampler.microbatches_per_step``.
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
        model: Policy,
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
        # nn.DataParallel would cut prompts and completions alike: several devices are a matter of the launcher.
        args._n_gpu = min(args.n_gpu, 1)
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
        # Layers that are computed anew keep no cache, and sharded weights are gathered once a microbatch: elsewhere
        # a prompt goes through the model once for all its responses of a microbatch.
        self._share_prompts = can_share_prompts(model) and not (
            args.gradient_checkpointing or self.is_fsdp_enabled or self.is_deepspeed_enabled
        )

    @override
    def get_train_dataloader(self) -> DataLoader[GroupedRow]:
        """Microbatches in the sampler's order, which has dealt them to the processes already."""
        loader: DataLoader[GroupedRow] = DataLoader(
            self._train,
            batch_sampler=self._sampler,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[GroupedRow] = prepare_data_loader(
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def _collate(self, items: list[GroupedRow]) -> dict[str, torch.Tensor]:
        rows = [row for row, _ in items]
        return {
            **vars(build_batch([self._train.sequences[row] for row in rows], share_prompts=self._share_prompts)),
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

        The mean over the microbatches of an epoch, those of all processes, is exactly the mean over prompts of the sum
        over their responses.
        """
        batch = SequenceBatch(**{name: inputs[name] for name in SequenceBatch.__dataclass_fields__})
        targets = Targets(
            **{name: inputs[name] for name in self._targets},
            group=inputs["group"],
            beta=torch.tensor(self._beta),
        )
        losses = self._objective.row_loss(sequence_logp(model, batch), targets)
        n_microbatches = self._sampler.n_steps * self._sampler.microbatches_per_step
        return losses.sum() * (n_microbatches / len(self._train.prompt_ids))

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out estimates of the policy as it is now."""
        with arithmetic("bfloat16" if self.args.bf16 else "float32", self.accelerator.device):
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
    initial: Path | None = None,
    pairs: Path | None = None,
    reference_logp: Path | None = None,
    chat_template: str | None = None,
) -> TrainResult:
    """Fine-tune the reference policy once, on the tilted samples or on pairs of a data set, and save it.

    The policy is an ordinary checkpoint.

    A killed run, called again with the same arguments, continues from its last checkpoint with the same order of
    responses and optimiser state. Under a launcher such as ``accelerate launch`` every process calls this; the steps
    are those of one process, and only the first writes.

    Args:
        reference: folder of the checkpoint the samples were drawn from.
        samples: folder of the samples table.
        tilted: folder of the tilted table.
        dual: folder of dual.json, which gives lam* and beta.
        output: folder of the policy; also gets the loss curve, and checkpoints while training. An adapter is kept in
            ``adapter/`` beside the merged weights.
        settings: of the run.
        show_progress: show progress bars.
        initial: policy that training starts from: a checkpoint of the reference's architecture, or with an adapter one
            whose ``adapter/`` is of the same shape; the reference itself where not given.
        pairs: holds ``samples`` and ``tilted`` tables of pairs to train on, instead of the samples; the samples still
            choose the checkpoint.
        reference_logp: folder that keeps log pi_ref for the next training run on the same samples.
        chat_template: by which the samples' prompts were rendered, where it is not the tokenizer's own; saved with the
            policy.

    Raises:
        InputError: inputs that do not belong together, or a setting out of range; see
            :func:`stage2_policy.data.read_training_data`.
        MissingExtraError: the setting ``adapter`` needs a package that is not installed.
        TrainingDivergedError: the loss is no longer a number.
    """
    started = time.monotonic()
    validate_settings(settings, on_pairs=pairs is not None)
    if settings.match_prediction and _weights_are_sharded():
        raise InputError(
            "training setting `match_prediction` is true, which needs whole weights in each process; it must be false "
            "under FSDP and DeepSpeed"
        )
    validate_reference(reference, adapter=settings.adapter)
    data = read_training_data(
        reference=reference,
        samples=samples,
        tilted=tilted,
        dual=dual,
        held_out_fraction=settings.held_out_fraction,
        pairs=pairs,
    )
    processes = PartialState(cpu=not torch.accelerator.is_available())
    show_progress = show_progress and processes.is_main_process
    set_seed(settings.seed)
    base = load_reference(reference, adapter=settings.adapter, dtype=settings.dtype, device=processes.device)
    ref_logp = score_reference(
        base,
        data,
        settings=settings,
        show_progress=show_progress,
        store=None if reference_logp is None else reference_store(reference_logp, data, settings),
    )
    train, skipped = skip_negligible(data.train, mass=settings.negligible_mass)
    if skipped.n_responses:  # of an objective that reads no reference: there are only zeros to leave out
        ref_logp = replace(ref_logp, train=np.zeros(len(train)))
    model: Policy = base
    if initial is not None and settings.adapter == "none":
        start_from(base, initial)
    if settings.adapter != "none":
        model = attach_adapter(
            base,
            AdapterSettings(
                r=settings.lora_r,
                alpha=settings.lora_alpha,
                target_modules=settings.lora_target_modules,
                seed=settings.seed,
                dropout=settings.lora_dropout,
            ),
        )
        if initial is not None:
            _require_same_reference(initial, data.identities["reference"])
            continue_adapter(model, initial / ADAPTER_FOLDER)
    fit = fit_policy(
        model,
        replace(data, train=train),
        ref_logp=ref_logp,
        settings=settings,
        checkpoints=output / _CHECKPOINTS,
        show_progress=show_progress,
    )
    stretch = 1.0
    if settings.match_prediction:
        with arithmetic(settings.dtype, processes.device):
            held_out_logp = score_sequences(
                model, data.held_out.sequences, token_budget=settings.tokens_per_microbatch, show_progress=False
            )
        stretch = matching_factor(data.held_out, held_out_logp - ref_logp.held_out)
        stretch_policy(
            model,
            load_reference(reference, adapter="none", dtype=settings.dtype, device=torch.device("cpu"))
            if settings.adapter == "none"
            else base,
            stretch,
        )
        fit = replace(fit, weights=model.state_dict())
    result = TrainResult(
        steps=fit.steps,
        best_step=fit.best_step,
        stop_reason=fit.stop_reason,
        held_out=fit.held_out,
        held_out_reference=fit.held_out_reference,
        stretch=stretch,
        n_train_prompts=len(set(train.prompt_ids)),
        n_held_out_pairs=data.n_held_out_pairs,
        n_held_out_prompts=len(data.held_out.prompt_ids),
        n_responses=len(train),
        skipped=skipped,
        sampler_gap=float(np.mean(np.abs(ref_logp.held_out - data.held_out.sampler_logp))),
        wall_seconds=time.monotonic() - started,
        identities=data.identities,
    )
    if processes.is_main_process:
        write_json(output / TRAINING_LOG, fit.curve)
        _save(fit, model, reference=reference, output=output, chat_template=chat_template)
        write_model_card(
            output, dual=data.dual, evaluation=None, identities=data.identities, training=_card_rows(settings, result)
        )
        shutil.rmtree(output / _CHECKPOINTS)  # last: a run killed before this line still continues
    processes.wait_for_everyone()
    return result


def _require_same_reference(initial: Path, reference: str) -> None:
    """An adapter says nothing without the weights it was trained beside."""
    recorded = read_provenance(initial)["identities"].get("reference")
    if recorded != reference:
        raise InputError(
            f"training setting `initial` is {initial}, whose adapter was trained on another reference "
            f"({str(recorded)[:12]}) than the one sampled ({reference[:12]})"
        )


def _weights_are_sharded() -> bool:
    """Whether the launcher asks for FSDP or DeepSpeed."""
    return any(str_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "false")) for name in ("FSDP", "DEEPSPEED"))


def _save(fit: Fit, model: Policy, *, reference: Path, output: Path, chat_template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if isinstance(model, PeftModel):
        model.save_pretrained(str(output / ADAPTER_FOLDER), state_dict=fit.weights)
        save_policy(merge_adapter(reference, output / ADAPTER_FOLDER), tokenizer, output)
        (output / ADAPTER_FOLDER / "README.md").unlink()  # an empty template; the policy's card stands beside it
    else:
        save_policy(model, tokenizer, output, weights=fit.weights)


def _card_rows(settings: TrainSettings, result: TrainResult) -> dict[str, Any]:
    """Settings and outcome, for the model card."""
    rows = asdict(settings)
    if settings.adapter == "none":
        rows = {name: value for name, value in rows.items() if not name.startswith("lora_")}
    of_pairs = {
        "pairs of a data set trained on": f"{result.n_responses // 2}, of {result.n_train_prompts} prompts",
        "pairs left out, of held-out prompts": result.n_held_out_pairs,
    }
    return {
        **rows,
        "responses trained on": result.n_responses,
        **(of_pairs if "pairs/samples" in result.identities else {}),
        "responses skipped for their weight": (
            f"{result.skipped.n_responses}, of tilted weight {result.skipped.mass_mean:.2g} a prompt in the mean, "
            f"{result.skipped.mass_max:.2g} at most"
        ),
        "step kept": f"{result.best_step} of {result.steps} ({result.stop_reason})",
        "closed fraction of that step, estimated on held-out prompts": f"{result.held_out.closed_fraction:.3f}",
        "moved along the ray from the reference by": f"{result.stretch:.3f}",
        "mean difference of log pi_ref, training against sampler": f"{result.sampler_gap:.2g} nats a response",
    }


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
    """

    curve: Sequence[Mapping[str, Any]]
    steps: int
    best_step: int
    stop_reason: str
    held_out: HeldOutEstimate
    held_out_reference: HeldOutEstimate
    weights: Mapping[str, torch.Tensor]


def fit_policy(
    model: Policy,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
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
        checkpoints: folder of checkpoints; a run that left some there is continued.
        show_progress: show a progress bar.
        callbacks: of transformers, beside those that stop the run.

    Raises:
        InputError: a setting out of range.
        TrainingDivergedError: the loss is no longer a number.
    """
    trainer = _build_trainer(
        model,
        data,
        ref_logp=ref_logp,
        settings=settings,
        checkpoints=checkpoints,
        callbacks=[*callbacks, *([ProgressBar()] if show_progress else [])],
    )
    start = trainer.estimate(ref_logp.held_out)
    with PartialState().main_process_first():
        last = _last_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=last)
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
        weights=trainer.accelerator.get_state_dict(trainer.model_wrapped),
    )


def _build_trainer(
    model: Policy,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback],
) -> TiltedTrainer:
    processes = PartialState()
    sampler = StepSampler(
        data.train,
        tokens_per_step=settings.tokens_per_step,
        tokens_per_microbatch=settings.tokens_per_microbatch,
        responses_per_group=settings.responses_per_group,
        seed=settings.seed,
        process=processes.process_index,
        n_processes=processes.num_processes,
    )
    steps = math.ceil(settings.epochs * sampler.n_steps)
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
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
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
            *callbacks,
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
