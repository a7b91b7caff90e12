"""What can be known of a run before anything is built, sampled or trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.sections import TrainingSettings
from pipeline.contracts.artifacts import read_json
from pipeline.contracts.errors import InputError, require_extra
from pipeline.microworld.gold import SCORES as EMBEDDED_SCORERS
from pipeline.networks import require_safe_adapter
from pipeline.run.run import Run
from pipeline.scorers.models import EMBEDDED, Locate, resolve_model
from pipeline.scoring.groups import check_scorers


def check_run(run: Run, steps: Sequence[str]) -> None:
    """Check the packages and the models that the planned steps need; fetches models that are not here.

    Raises:
        InputError: a folder that is not there, not a checkpoint, of another kind, or without template or head.
        MissingExtraError: a package that a planned step needs is not installed.
    """
    check_packages(run, steps)
    if {"prepare", "sample", "score"} & set(steps):
        check_models(run)
    if "sample" in steps:
        _check_weights(run)
    if "train" in steps:
        _check_initial(run.config.training)


def check_packages(run: Run, steps: Sequence[str]) -> None:
    """Check the packages that the planned steps need.

    Raises:
        MissingExtraError: one is not installed.
    """
    if "sample" in steps or "evaluate" in steps:
        require_extra("sample", "torch", "transformers", run.config.sampling.engine, purpose="sampling")
    if {"sample", "score", "evaluate"} & set(steps) and run.config.execution.kind == "ray":
        require_extra("ray", "ray", purpose="`execution: ray`")
    if "train" in steps:
        require_extra("train", "torch", "transformers", "accelerate", "peft", purpose="training")
    if {"prepare", "sample", "score"} & set(steps) and run.config.reference.adapter is not None:
        require_extra("train", "peft", purpose="`reference.adapter`")


def check_models(run: Run, *, locate: Locate = resolve_model) -> None:
    """Check the models of the recipe by their files, and what the recipe says of them.

    Args:
        run: the run.
        locate: finds each model; of one that it does not find, what the recipe says of it is checked.

    Raises:
        InputError: a folder that is not there, not a checkpoint, of another kind, or without template or head.
    """
    from stage1_dual.checkpoints import check_policy_checkpoint, check_prompt_template

    # The embedded models are made by `prepare`; only their names can be checked before it.
    embedded = {name: Path() for name in ("reference", *EMBEDDED_SCORERS)}
    reference = run.config.reference
    model = locate(reference, embedded, setting="reference")
    if model is None:
        check_prompt_template(reference.template)
    elif not reference.model.startswith(EMBEDDED):
        check_policy_checkpoint(model, template=reference.template)
    if reference.adapter is not None and not (Path(reference.adapter) / "adapter_config.json").is_file():
        raise InputError(f"`reference.adapter` is {reference.adapter!r}; it must be a folder with adapter_config.json")
    if reference.adapter is not None:
        require_safe_adapter(reference.adapter, what="`reference.adapter`")
    if reference.quantization is not None and run.config.sampling.engine != "vllm":
        raise InputError(
            f"`reference.quantization` is {reference.quantization!r}, which is vLLM's to do, but `sampling.engine` is "
            f"{run.config.sampling.engine!r}"
        )
    check_scorers(run.config, embedded, locate=locate)


def _check_weights(run: Run) -> None:
    """Compare the weights of the reference with those its class has, whichever engine samples it.

    An engine may leave out what it does not know, or draw what is missing.

    Raises:
        InputError: a weight is missing, unexpected or of another shape.
    """
    from transformers import AutoModelForCausalLM

    from pipeline.networks import check_weights

    reference = run.config.reference
    folder = None if reference.model.startswith(EMBEDDED) else resolve_model(reference, {}, setting="reference")
    if folder is not None and reference.quantization is None:
        check_weights(AutoModelForCausalLM, folder, what="the policy")


def _check_initial(training: TrainingSettings) -> None:
    if training.initial is None:
        return
    if not (Path(training.initial) / "config.json").is_file():
        raise InputError(f"`training.initial` is {training.initial!r}; it must be the folder of a checkpoint")
    if training.adapter != "none" and not (Path(training.initial) / "adapter" / "adapter_config.json").is_file():
        raise InputError(
            f"`training.initial` is {training.initial!r} and `training.adapter` {training.adapter!r}; it must be the "
            "folder of a policy that was trained with an adapter, which is in its adapter/"
        )
    if training.adapter != "none":
        shape = read_json(Path(training.initial) / "adapter" / "adapter_config.json")
        for setting, name in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
            if shape.get(name) != getattr(training, setting):
                raise InputError(
                    f"`training.{setting}` is {getattr(training, setting)}, and the adapter of `training.initial`, "
                    f"{training.initial!r}, has {shape.get(name)}; they must be the same"
                )
