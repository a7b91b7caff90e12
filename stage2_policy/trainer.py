"""The one training run of stage 2, on the Trainer of transformers."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from pipeline.contracts.artifacts import write_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.training_verdict import TrainingVerdict
from pipeline.networks import quiet, write_merged
from stage2_policy.adapters import (
    ADAPTER_FOLDER,
    AdapterSettings,
    attach_adapter,
    continue_adapter,
    load_reference,
    start_from,
    validate_reference,
)
from stage2_policy.data import Skipped, TrainingData, read_training_data, skip_negligible
from stage2_policy.fit import Fit, fit_policy
from stage2_policy.foresight import Forecast, forecast
from stage2_policy.held_out import HeldOutEstimate, rounding_cost
from stage2_policy.mapped_files import remove_mapped
from stage2_policy.matching import Matched, match_prediction
from stage2_policy.natural_gradient import fit_natural_gradient
from stage2_policy.reference import ReferenceLogp, arithmetic, reference_store, score_reference
from stage2_policy.saving import read_provenance, save_policy, write_model_card
from stage2_policy.settings import TrainSettings, require_comparison, require_no_start, require_trackers
from stage2_policy.stretch import WIDEST
from stage2_policy.tilted_trainer import Policy
from stage2_policy.verdict import judge_training

log = logging.getLogger("dualign")

TRAINING_LOG = "training_log.json"
_CHECKPOINTS = "checkpoints"
_MUCH_ROUNDING = 0.05
"""Of the closed fraction: as large as the 95% interval of an evaluation on some 160 prompts."""
_MAPPED = "mapped"


@dataclass(frozen=True)
class TrainResult:
    """What the run did.

    Attributes:
        steps: optimisation steps taken.
        best_step: step of the checkpoint that was kept.
        stop_reason: why the run ended.
        held_out: estimate of the checkpoint that was kept, before it was stretched.
        held_out_reference: the same for the reference policy.
        verdict: whether training paid, of the same checkpoint.
        forecast: what was known before training of what it may reach.
        stretch: factor by which the kept policy was moved along the ray from the reference; 1 where not asked for.
        part_factors: of each part of the change beside it, where several constraints are to be met.
        factors: of the change for each score, where each was given one.
        reached: share of the gains that the constraints require on held-out prompts that these factors reach.
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
    verdict: TrainingVerdict
    forecast: Forecast | None
    stretch: float
    part_factors: Mapping[str, float]
    factors: Mapping[str, float]
    reached: float
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


def train_policy(
    *,
    reference: Path,
    samples: Path,
    tilted: Path,
    dual: Path,
    output: Path,
    settings: TrainSettings,
    seed: int,
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
        output: folder of the policy; also gets the loss curve, and while training checkpoints and the files that the
            processes map (``mapped/``). An adapter is kept in ``adapter/`` beside the merged weights.
        settings: of the run.
        seed: of the order of the responses, of drawn labels, of an adapter's first weights and of dropout.
        show_progress: show progress bars.
        initial: policy that training starts from: a checkpoint of the reference's architecture, or with an adapter one
            whose ``adapter/`` is of the same shape; the reference itself where not given.
        pairs: holds ``samples`` and ``tilted`` tables of pairs to train on, instead of the samples; the samples still
            choose the checkpoint.
        reference_logp: folder that keeps log pi_ref for the next training run on the same samples.
        chat_template: by which the samples' prompts were rendered, where it is not the tokenizer's own; saved with the
            policy.

    Raises:
        InputError: inputs that do not belong together, or settings that do not go with them; see
            :func:`stage2_policy.data.read_training_data`.
        MissingExtraError: the setting ``adapter`` needs a package that is not installed.
        TrainingDivergedError: the loss is no longer a number.
        pydantic.ValidationError: a copy of settings was changed to what they cannot be.
    """
    started = time.monotonic()
    # Checked when they were made; a changed copy (``model_copy``) is not, by itself.
    settings = TrainSettings.model_validate(settings.model_dump(include=set(TrainSettings.model_fields)))
    _require_trainable(settings, reference=reference, on_pairs=pairs is not None, initial=initial)
    data = read_training_data(
        reference=reference,
        samples=samples,
        tilted=tilted,
        dual=dual,
        held_out_fraction=settings.held_out_fraction,
        pairs=pairs,
        mapped=output / _MAPPED,
    )
    processes = PartialState(cpu=not torch.accelerator.is_available())
    show_progress = show_progress and processes.is_main_process
    set_seed(seed)
    base = load_reference(reference, adapter=settings.adapter, dtype=settings.dtype, device=processes.device)
    ref_logp = score_reference(
        base,
        data,
        settings=settings,
        show_progress=show_progress,
        store=None if reference_logp is None else reference_store(reference_logp, data, settings),
    )
    cost = rounding_cost(data.held_out, ref_logp=ref_logp.held_out, beta=data.beta)
    if settings.dtype != "float32" and cost > _MUCH_ROUNDING and processes.is_main_process:
        log.warning(
            "train: in %s the log-probabilities of a response have an error that alone takes %.2f of the closed "
            "fraction from whatever is judged with it, or trained by it; `training.dtype: float32` has a smaller one",
            settings.dtype,
            cost,
        )
    with arithmetic(settings.dtype, processes.device):
        foreseen = forecast(base, data, token_budget=settings.tokens_per_microbatch, show_progress=show_progress)
    if foreseen is not None and processes.is_main_process:
        log.info("train: forecast: %s", foreseen.sentence)
    train, skipped = skip_negligible(data.train, mass=settings.negligible_mass)
    if skipped.n_responses:  # of an objective that reads no reference: there are only zeros to leave out
        ref_logp = replace(ref_logp, train=np.zeros(len(train)))
    model = _build_policy(
        base, settings=settings, seed=seed, initial=initial, reference_identity=data.identities["reference"]
    )
    fit = fit_by_optimizer(
        model,
        replace(data, train=train),
        ref_logp=ref_logp,
        settings=settings,
        seed=seed,
        checkpoints=output / _CHECKPOINTS,
        show_progress=show_progress,
    )
    matched = Matched(1.0, {})
    if settings.match_prediction and settings.optimizer == "adamw":
        matched = match_prediction(
            model,
            data,
            ref_logp=ref_logp.held_out,
            settings=settings,
            reference=reference,
            show_progress=show_progress,
        )
        fit = replace(fit, weights=model.state_dict())
    n_train_prompts, n_held_out_prompts = len(set(train.prompt_ids)), len(data.held_out.prompt_ids)
    verdict = judge_training(
        fit.curve,
        best_step=fit.best_step,
        settings=settings,
        n_train_prompts=n_train_prompts,
        n_responses=len(train),
        n_held_out_prompts=n_held_out_prompts,
        forecast=foreseen,
    )
    result = TrainResult(
        steps=fit.steps,
        best_step=fit.best_step,
        stop_reason=fit.stop_reason,
        held_out=fit.held_out,
        held_out_reference=fit.held_out_reference,
        verdict=verdict,
        forecast=foreseen,
        stretch=matched.stretch,
        part_factors=matched.part_factors,
        factors=fit.factors,
        reached=fit.reached,
        n_train_prompts=n_train_prompts,
        n_held_out_pairs=data.n_held_out_pairs,
        n_held_out_prompts=n_held_out_prompts,
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
            output,
            dual=data.dual,
            evaluation=None,
            identities=data.identities,
            training=_card_rows(settings, seed, result),
            doubt="" if verdict.verdict == "paid" else verdict.sentence,
        )
        remove_mapped(output / _MAPPED)
        shutil.rmtree(output / _CHECKPOINTS)  # last: a run killed before this line still continues
    processes.wait_for_everyone()
    return result


def fit_by_optimizer(
    model: Policy,
    data: TrainingData,
    *,
    ref_logp: ReferenceLogp,
    settings: TrainSettings,
    seed: int,
    checkpoints: Path,
    show_progress: bool,
) -> Fit:
    """Train a model by the optimizer of the settings; arguments and errors as of :func:`stage2_policy.fit.fit_policy`
    and :func:`stage2_policy.natural_gradient.fit_natural_gradient`, of which it calls one.
    """
    if settings.optimizer == "natural_gradient":
        assert isinstance(model, PeftModel)  # the settings ask for an adapter
        return fit_natural_gradient(
            model,
            data,
            ref_logp=ref_logp,
            settings=settings,
            seed=seed,
            folder=checkpoints,
            show_progress=show_progress,
        )
    return fit_policy(
        model,
        data,
        ref_logp=ref_logp,
        settings=settings,
        seed=seed,
        checkpoints=checkpoints,
        show_progress=show_progress,
    )


def _require_trainable(settings: TrainSettings, *, reference: Path, on_pairs: bool, initial: Path | None) -> None:
    """What settings need of this machine, this launcher and these inputs; before anything is loaded."""
    if on_pairs:
        require_comparison(settings.objective)
    require_trackers(settings.report_to)
    if settings.match_prediction and _weights_are_sharded():
        raise InputError(
            "training setting `match_prediction` is true, which needs whole weights in each process; it must be false "
            "under FSDP and DeepSpeed"
        )
    if settings.optimizer == "natural_gradient":
        require_no_start(None if initial is None else str(initial))
        if PartialState(cpu=not torch.accelerator.is_available()).num_processes > 1:
            raise InputError("training setting `optimizer` is natural_gradient, which takes its step in one process")
    validate_reference(reference, adapter=settings.adapter)


def _build_policy(
    base: PreTrainedModel, *, settings: TrainSettings, seed: int, initial: Path | None, reference_identity: str
) -> Policy:
    """The policy as training starts: the loaded reference, with an adapter or the weights of ``initial``, in place."""
    if settings.adapter == "none":
        if initial is not None:
            start_from(base, initial)
        return base
    policy = attach_adapter(
        base,
        AdapterSettings(
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            target_modules=settings.lora_target_modules,
            seed=seed,
            dropout=settings.lora_dropout,
        ),
    )
    if initial is not None:
        _require_same_reference(initial, reference_identity)
        continue_adapter(policy, initial / ADAPTER_FOLDER)
    return policy


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
        with quiet():
            model.save_pretrained(str(output / ADAPTER_FOLDER), state_dict=fit.weights)
        write_merged(reference, output / ADAPTER_FOLDER, output, what="the trained adapter", dtype=torch.float32)
        tokenizer.save_pretrained(output)
        (output / ADAPTER_FOLDER / "README.md").unlink()  # an empty template; the policy's card stands beside it
    else:
        save_policy(model, tokenizer, output, weights=fit.weights)


def _card_rows(settings: TrainSettings, seed: int, result: TrainResult) -> dict[str, Any]:
    """Settings and outcome, for the model card."""
    rows = {**settings.model_dump(mode="json"), "seed": seed}
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
        "forecast before training": "none" if result.forecast is None else result.forecast.sentence,
        "whether training paid": f"{result.verdict.verdict}: {result.verdict.reasons[0]}",
        **(
            {
                "factor of the change for each score": "; ".join(
                    f"{name} {factor:.3f}" for name, factor in result.factors.items()
                )
            }
            if result.factors
            else {"moved along the ray from the reference by": f"{result.stretch:.3f}"}
        ),
        **(
            {
                "and each part of the change by": "; ".join(
                    f"{part} {factor:.3f}" for part, factor in result.part_factors.items()
                )
            }
            if result.part_factors
            else {}
        ),
        "mean difference of log pi_ref, training against sampler": f"{result.sampler_gap:.2g} nats a response",
    }
