"""The settings of the training run, declared once: a recipe's ``training`` is this section and two more settings.

Importable without torch and transformers, so that a recipe is checked whole before anything is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from pipeline.contracts.errors import InputError
from pipeline.contracts.section import Positive, Section, nearest
from stage2_policy.objectives import find_objective

TRACKERS = (
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)
"""Trackers by the names of transformers, which is not imported for them: a test holds this list to its own."""


def _objective(name: str) -> str:
    try:
        find_objective(name)
    except InputError as error:
        raise ValueError(str(error)) from None
    return name


def _tracker(name: str) -> str:
    if name not in TRACKERS:
        raise ValueError(f"there is no such tracker{nearest(name, TRACKERS)}")
    return name


class TrainSettings(Section):
    """The one fine-tuning run. There is no lambda and no beta here: they come from the dual artifact.

    Raises:
        pydantic.ValidationError: a setting is unknown or out of range, or does not go with the objective; lists all.
    """

    # First: what the others must satisfy depends on it.
    objective: Annotated[str, AfterValidator(_objective)] = "tilted_pairwise"
    """Name of an objective, of :data:`stage2_policy.objectives.OBJECTIVES`."""
    optimizer: Literal["adamw", "natural_gradient"] = "adamw"
    """Steps of AdamW, or one step of least squares in the tangent of an adapter, for a few thousand responses
    (:mod:`stage2_policy.natural_gradient`): it reads neither rate nor steps. It wants `adapter: lora`, and the
    objective `tilted_pairwise`, whose step it is."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak rate of AdamW."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training responses."""
    tokens_per_step: Positive = 16384
    """Tokens an optimisation step reads, prompt and response, about."""
    tokens_per_microbatch: Positive = 8192
    """Tokens in memory at once; speed and memory only."""
    responses_per_group: Positive = 8
    """How many responses to a prompt are compared with each other, about."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises; after it, it falls to zero on a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the train prompts that choose the checkpoint instead of training it."""
    evaluations: Positive = 12
    """How often the gap to the tilted optimum is estimated on held-out prompts, and a checkpoint saved."""
    patience: Positive = 4
    """Stop after so many evaluations without a better one."""
    negligible_mass: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a prompt's tilted weight that may be skipped, least weights first; only for an objective that weighs
    responses by it alone, `tilted_nll`."""
    match_prediction: bool = False
    """After training, move along the ray from the reference until what the constraints add to s is on held-out prompts
    what the dual predicts (:mod:`stage2_policy.stretch`): the fitted log-ratios are shrunken, as those of any
    regression are. Where constraints gain little, all of s is. Where several bind, each part of the change then has a
    factor of its own (:mod:`stage2_policy.parts`). With `natural_gradient` each score has one, so that every
    constraint's mean is what the dual predicts. Not with sharded weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; weights that are trained, and the optimiser, stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass; speed and memory only."""
    adapter: Annotated[Literal["none", "lora", "qlora"], Field(validate_default=True)] = "none"
    """Train all weights, low-rank updates of them, or low-rank updates of weights in 4 bits (a CUDA device). The
    reference is the model with the adapter off."""
    lora_r: Positive = 16
    """Rank of the updates."""
    lora_alpha: Positive = 32
    """The updates are scaled by ``lora_alpha / lora_r``."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of what enters a low-rank update that is dropped in training, at random; none in any evaluation."""
    lora_target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get an update, or `all-linear`: all but the head."""
    report_to: tuple[Annotated[str, AfterValidator(_tracker)], ...] = ()
    """Trackers by the names of transformers, such as `[tensorboard]`; none by default. Affects nothing else."""

    @property
    def reads_reference(self) -> bool:
        """Whether training reads log pi_ref of every response it is trained on."""
        return self.optimizer == "adamw" and find_objective(self.objective).uses_reference

    # Rules between settings are checked field by field, so that they are reported beside all other faults.
    @field_validator("responses_per_group")
    @classmethod
    def _compared(cls, value: int, info: ValidationInfo) -> int:
        objective = info.data.get("objective")  # absent where it is wrong itself
        if objective is not None and value < 2 and find_objective(objective).uses_groups:
            raise ValueError(f"the objective `{objective}` compares responses of a prompt and needs at least 2")
        return value

    @field_validator("adapter")
    @classmethod
    def _has_tangent(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("optimizer") == "natural_gradient":
            objective = info.data.get("objective", "tilted_pairwise")
            if objective != "tilted_pairwise":
                raise ValueError(
                    f"the optimizer `natural_gradient` takes a step of the objective `tilted_pairwise`, not of "
                    f"`{objective}`"
                )
            if value != "lora":
                raise ValueError("the optimizer `natural_gradient` changes a low-rank adapter; it must be lora")
        return value

    @field_validator("negligible_mass")
    @classmethod
    def _negligible(cls, value: float, info: ValidationInfo) -> float:
        objective = info.data.get("objective")
        if objective is not None and value > 0 and not find_objective(objective).may_skip:
            raise ValueError(
                f"the objective `{objective}` reads responses of little weight as much as others, to keep the policy "
                "from giving them; it must be 0"
            )
        return value


def require_comparison(objective: str) -> None:
    """Check that an objective can be trained on pairs of a data set, which are not draws of the reference.

    Raises:
        InputError: it takes the responses for such draws.
    """
    if not find_objective(objective).any_source:
        raise InputError(
            f"the objective is `{objective}`, which takes the responses for draws of the reference; on pairs of a "
            "data set it must be one that compares two responses, `tilted_pairwise` or `dpo`"
        )


MOST_RESPONSES = 16384
"""Of the natural gradient: its system of equations has as many, and takes 2 GiB of memory with this number."""

FEWEST_PROMPTS = 2
"""Of the natural gradient: one is left out and the other fitted."""


def require_solvable(*, n_prompts: int, n_responses: int) -> None:
    """Check that the natural gradient has prompts to choose its penalty by, and that its equations fit in memory.

    Args:
        n_prompts: trained on.
        n_responses: to all of them.

    Raises:
        InputError: one of the two is not so.
    """
    if n_prompts < FEWEST_PROMPTS:
        raise InputError(
            "training setting `optimizer` is natural_gradient, which chooses its penalty by leaving prompts out, of "
            f"at least {FEWEST_PROMPTS} to train on; there are {n_prompts} beside those of `held_out_fraction`"
        )
    if n_responses > MOST_RESPONSES:
        raise InputError(
            f"training setting `optimizer` is natural_gradient, which solves as many equations as there are "
            f"responses to train on, at most {MOST_RESPONSES}; there are {n_responses}: with so many take adamw, or "
            "sample fewer"
        )


def require_no_start(initial: str | None) -> None:
    """Check that the natural gradient starts from the reference.

    Raises:
        InputError: another policy is given to start from.
    """
    if initial is not None:
        raise InputError(
            f"training setting `initial` is {initial}; the optimizer natural_gradient takes one step from the "
            "reference, and cannot go on from another policy"
        )


def require_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed; imports transformers where there are any.

    Raises:
        InputError: one is not.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    missing = [name for name in names if name not in available]
    if missing:
        raise InputError(
            f"training setting `report_to` names {', '.join(f'`{name}`' for name in missing)}, which is not installed "
            f"here; there is {', '.join(available) or 'no tracker'}"
        )
