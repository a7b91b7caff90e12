"""What can be known of a run before anything is built, sampled or trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.sections import ReferenceSettings, TrainingSettings
from pipeline.contracts.artifacts import read_json_object
from pipeline.contracts.errors import InputError, require_extra
from pipeline.microworld.gold import SCORES as EMBEDDED_SCORERS
from pipeline.networks import require_safe_adapter
from pipeline.run.run import Run
from pipeline.scorers.models import EMBEDDED, Locate, is_gguf, resolve_model
from pipeline.scoring.groups import check_new_responses, check_scorers
from pipeline.steps.prepare import prompts_are_prepared
from stage2_policy.data import count_held_out
from stage2_policy.settings import require_no_start, require_solvable, require_trackers

_TRAINING_PACKAGES = ("torch", "transformers", "accelerate", "peft")


def check_run(run: Run, steps: Sequence[str]) -> None:
    """Check the packages and the models that the planned steps need; fetches models that are not here.

    Raises:
        InputError: a folder that is not there, not a checkpoint, of another kind, or without template or head; what
            training needs is not here.
        MissingExtraError: a package that a planned step needs is not installed.
    """
    check_packages(run, steps)
    if {"prepare", "sample", "score"} & set(steps):
        check_models(run)
    if "evaluate" in steps:
        check_new_responses(run.config)
    if "sample" in steps:
        _check_weights(run)
    if {"sample", "train"} & set(steps):
        check_training(run)


def check_packages(run: Run, steps: Sequence[str]) -> None:
    """Check the packages that the planned steps need.

    Raises:
        MissingExtraError: one is not installed.
    """
    if "sample" in steps or "evaluate" in steps:
        require_extra("sample", "torch", "transformers", run.config.sampling.engine, purpose="sampling")
    if {"score", "evaluate"} & set(steps):
        for name, scorer in run.config.used_scorers().items():
            if packages := scorer.packages():
                require_extra("sample", *packages, purpose=f"`scorers.{name}`")
    if {"sample", "score", "evaluate"} & set(steps) and run.config.execution.kind == "ray":
        require_extra("ray", "ray", purpose="`execution: ray`")
    if "train" in steps:
        require_extra("train", *_TRAINING_PACKAGES, purpose="training")
        if run.config.training.adapter == "qlora":
            require_extra("qlora", "bitsandbytes", purpose="`training.adapter: qlora`")
    if {"prepare", "sample", "score"} & set(steps) and run.config.reference.adapter is not None:
        require_extra("train", "peft", purpose="`reference.adapter`")
    if {"prepare", "sample", "score"} & set(steps) and is_gguf(run.config.reference.model):
        require_extra("gguf", "gguf", purpose="a GGUF file as the reference")


def check_models(run: Run, *, locate: Locate = resolve_model) -> None:
    """Check the models of the recipe by their files, and what the recipe says of them.

    Args:
        run: the run.
        locate: finds each model; of one that it does not find, what the recipe says of it is checked.

    Raises:
        InputError: a folder that is not there, not a checkpoint, of another kind, or without template or head.
    """
    from stage1_dual.checkpoints import check_policy_checkpoint, check_prompt_template
    from stage1_dual.gguf_models import check_gguf_file

    # The embedded models are made by `prepare`; only their names can be checked before it.
    embedded = {name: Path() for name in ("reference", *EMBEDDED_SCORERS)}
    reference = run.config.reference
    model = locate(reference, embedded, setting="reference")
    if model is None:
        check_prompt_template(reference.template)
    elif is_gguf(reference.model):
        check_gguf_file(model, template=reference.template)
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
    if reference.model.startswith(EMBEDDED) or is_gguf(reference.model):
        return  # `prepare` sees to them
    folder = resolve_model(reference, {}, setting="reference")
    if reference.quantization is None:
        check_weights(AutoModelForCausalLM, folder, what="the policy")


def check_training(run: Run, *, locate: Locate = resolve_model) -> None:
    """Check what training needs besides settings that are right each for itself, before anything is sampled.

    Nothing is checked on a machine that cannot train: where packages are missing, training is meant for another one.

    Args:
        run: the run.
        locate: finds the reference; the layers of an adapter are not checked where it does not.

    Raises:
        InputError: a tracker that is not installed, a start that is not there or of another shape, an adapter on
            layers that the reference has not, or prompts and responses that the natural gradient cannot take.
    """
    training = run.config.training
    if any(importlib.util.find_spec(name) is None for name in _TRAINING_PACKAGES):
        return
    require_trackers(training.report_to)
    if training.optimizer == "natural_gradient":
        require_no_start(training.initial)
        if training.pairs is None and prompts_are_prepared(run):
            n_prompts = run.prompts_table()["split"].to_pylist().count("train")
            n_trained = n_prompts - count_held_out(n_prompts, fraction=training.held_out_fraction)
            require_solvable(n_prompts=n_trained, n_responses=n_trained * run.config.sampling.samples_per_prompt)
    if training.initial is not None:
        _check_initial(training, Path(training.initial))
    if training.adapter != "none" and training.lora_target_modules != "all-linear":
        _check_layers(run.config.reference, training.lora_target_modules, locate=locate)


def _check_layers(reference: ReferenceSettings, modules: str | Sequence[str], *, locate: Locate) -> None:
    from transformers import AutoConfig

    from stage2_policy.adapters import check_target_modules

    if reference.model.startswith(EMBEDDED):  # a Llama, which `prepare` builds
        check_target_modules(AutoConfig.for_model("llama", num_hidden_layers=1), modules)
    elif (found := locate(reference, {}, setting="reference")) is not None:
        place, file = (Path(found).parent, Path(found).name) if is_gguf(reference.model) else (found, None)
        check_target_modules(AutoConfig.from_pretrained(place, gguf_file=file), modules)


def _check_initial(training: TrainingSettings, initial: Path) -> None:
    if not (initial / "config.json").is_file():
        raise InputError(f"`training.initial` is {training.initial!r}; it must be the folder of a checkpoint")
    if training.adapter != "none" and not (initial / "adapter" / "adapter_config.json").is_file():
        raise InputError(
            f"`training.initial` is {training.initial!r} and `training.adapter` {training.adapter!r}; it must be the "
            "folder of a policy that was trained with an adapter, which is in its adapter/"
        )
    if training.adapter != "none":
        shape = read_json_object(initial / "adapter" / "adapter_config.json")
        for setting, name in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
            if shape.get(name) != getattr(training, setting):
                raise InputError(
                    f"`training.{setting}` is {getattr(training, setting)}, and the adapter of `training.initial`, "
                    f"{training.initial!r}, has {shape.get(name)}; they must be the same"
                )
