"""The settings of the training run, and what they must satisfy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers.integrations.integration_utils import get_available_reporting_integrations

from pipeline.contracts.errors import InputError
from stage2_policy.objectives import read_objective


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
        negligible_mass: share of the tilted weight of a prompt that may be skipped, least weights first; only for
            objectives that weigh responses by it alone.
        match_prediction: after training, move along the ray from the reference until the policy's mean score on
            held-out prompts is what the tilted weights predict (:mod:`stage2_policy.stretch`).
        dtype: of the arithmetic; weights that are trained, and the optimiser, stay in float32.
        gradient_checkpointing: compute activations anew in the backward pass; affects speed and memory only.
        adapter: train all weights (``none``), or low-rank updates of fixed ones (``lora``), of ones in 4 bits
            (``qlora``). The reference is the model with the adapter off.
        lora_r: rank of the updates.
        lora_alpha: the updates are scaled by ``lora_alpha / lora_r``.
        lora_dropout: share of what enters an update that is dropped in training, at random.
        lora_target_modules: names of the layers that get one, or ``all-linear``: all but the head.
        report_to: trackers, by the names of transformers; affects nothing else.
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
    negligible_mass: float = 0.0
    match_prediction: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    adapter: Literal["none", "lora", "qlora"] = "none"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: str | Sequence[str] = "all-linear"
    report_to: Sequence[str] = ()
    seed: int = 0


def validate_settings(settings: TrainSettings, *, on_pairs: bool = False) -> None:
    """Check every setting before any work.

    Args:
        settings: of the run.
        on_pairs: whether it trains on pairs of a data set, which are not draws of the reference.

    Raises:
        InputError: a setting is out of range, or does not go with another.
    """
    objective = read_objective(settings.objective)
    positive = (
        "learning_rate",
        "epochs",
        "tokens_per_step",
        "tokens_per_microbatch",
        "responses_per_group",
        "evaluations",
        "patience",
        "lora_r",
        "lora_alpha",
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
    if on_pairs and not objective.any_source:
        raise InputError(
            f"training setting `objective` is {settings.objective}, which takes the responses for draws of the "
            "reference; on pairs of a data set it must be one that compares two responses, such as `dpo` or "
            "`tilted_pairwise`"
        )
    for name in ("warmup_ratio", "weight_decay", "max_grad_norm"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"training setting `{name}` is {value}; it must be a number of at least 0")
    if not 0 < settings.held_out_fraction < 1:
        raise InputError(f"training setting `held_out_fraction` is {settings.held_out_fraction}; it must be in (0, 1)")
    for name, known in (("dtype", ("float32", "bfloat16")), ("adapter", ("none", "lora", "qlora"))):
        if getattr(settings, name) not in known:
            raise InputError(
                f"training setting `{name}` is `{getattr(settings, name)}`; it must be one of {', '.join(known)}"
            )
    for name in ("negligible_mass", "lora_dropout"):
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(f"training setting `{name}` is {getattr(settings, name)}; it must be in [0, 1)")
    if settings.negligible_mass > 0 and not objective.may_skip:
        raise InputError(
            f"training setting `negligible_mass` is {settings.negligible_mass}, but the objective "
            f"{settings.objective} reads responses of little weight as much as others, to keep the policy from giving "
            "them; it must be 0"
        )
    available = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in settings.report_to:
        if name not in available:
            raise InputError(
                f"training setting `report_to` names `{name}`, which is not installed; there is "
                f"{', '.join(available) or 'no tracker'}"
            )
