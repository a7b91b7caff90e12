"""The step ``train``: one fine-tuning run on the tilted responses."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.recipe import RunConfig
from pipeline.contracts.artifacts import begin_step, checkpoint_sha256, file_sha256, is_complete, read_manifest
from pipeline.contracts.errors import TrainingDidNotPayError, require_extra
from pipeline.contracts.shards import read_parquet
from pipeline.contracts.tables import PROMPTS
from pipeline.contracts.training_verdict import read_training_verdict
from pipeline.run.run import Run
from pipeline.run.step import finish_step, log, remedy

if TYPE_CHECKING:
    from stage2_policy.trainer import TrainResult


_PROMPTS_SERVED = 64
"""Prompts on which the template saved with a policy must give the token ids it was trained on."""

_SPEED_ONLY = {"tokens_per_microbatch", "gradient_checkpointing", "report_to"}
"""Training settings that change no result."""

_BEFORE_IT_WAS_A_SETTING = {"max_grad_norm": 1.0, "optimizer": "adamw"}
"""What a younger setting always was before a recipe could set it. At that value it is not recorded, so that a policy
trained then is still the one that is asked for."""


def train(run: Run) -> None:
    """Fine-tune the reference once on the tilted samples."""
    started = time.monotonic()
    folder = run.policy
    # Lambda and beta are not among the settings: they are in the dual, which is an input, and so are the pairs.
    initial = run.config.training.initial
    recorded = recorded_settings(run.config)
    tables = [responses.prefix + name for responses in run.response_sets() for name in ("samples", "tilted")]
    inputs = {
        **{name: read_manifest(run.folder / name).identity for name in ("dual", *tables)},
        "reference": read_manifest(run.samples).inputs["reference"],
        **({"initial": checkpoint_sha256(Path(initial))} if initial is not None else {}),
    }
    begin_step(folder, settings=recorded, inputs=inputs, remedy=remedy("train"))
    if is_complete(folder):
        log.info("train: done before, kept")
        _say_verdict(folder)
        return
    result = perform_training(run)
    log.info("train: %d steps, kept the one of step %d; %s", result.steps, result.best_step, result.stop_reason)
    if result.factors:
        factors = ", ".join(f"{name} {factor:.2f}" for name, factor in result.factors.items())
        log.info("train: factor of what was learnt of each score, to match the prediction: %s", factors)
        if result.reached < 1:
            log.warning(
                "train: what was learnt reaches %.0f%% of what the constraints ask for on held-out prompts; sample "
                "more prompts, or demand less",
                100 * result.reached,
            )
    elif run.config.training.match_prediction:
        log.info("train: moved along the ray from the reference by %.3f to match the prediction", result.stretch)
        if result.part_factors:
            factors = ", ".join(f"{part} {factor:.2f}" for part, factor in result.part_factors.items())
            log.info("train: and of its change what is %s", factors)
        if result.falls_short_of_prediction:
            log.warning(
                "train: the prediction is further off than that; train longer, or give the constraint a `reserve`"
            )
    # The card is left out: `evaluate` completes it with what was realised.
    files = {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted([*folder.iterdir(), *folder.glob("adapter/*")])
        if path.is_file() and path.name not in {"README.md", "settings.json"}
    }
    finish_step(
        run.name,
        folder,
        "train",
        settings=recorded,
        inputs=inputs,
        files=files,
        counts={"responses": result.n_responses, "prompts": result.n_train_prompts, "steps": result.steps},
        details={**asdict(result), "verdict": result.verdict.model_dump(mode="json")},
        started=started,
    )
    _say_verdict(folder)


def require_improvement(run: Run, *, certainly: bool) -> None:
    """Check that training paid, once everything that was asked for is done.

    Args:
        run: a run whose policy is trained.
        certainly: refuse a policy that cannot be told from the reference, too.

    Raises:
        TrainingDidNotPayError: the policy is not better than the reference on held-out prompts.
    """
    verdict = read_training_verdict(run.folder / "policy")
    if verdict is not None and (verdict.verdict == "did not pay" or (certainly and verdict.verdict != "paid")):
        raise TrainingDidNotPayError(
            f"training of run `{run.name}` {verdict.verdict.upper()}: {verdict.reasons[0]}. What was asked for is "
            "done and written; what to try is in the log above and in the report"
        )


def _say_verdict(folder: Path) -> None:
    verdict = read_training_verdict(folder)
    if verdict is not None:
        log.log(logging.INFO if verdict.verdict == "paid" else logging.WARNING, "train: %s", verdict.sentence)


def perform_training(run: Run) -> TrainResult:
    """The work of the step ``train``, without its manifest: what each process does under a launcher."""
    require_extra("train", "torch", "transformers", "accelerate", "peft", purpose="training")
    from stage2_policy.trainer import train_policy

    training = run.config.training
    return train_policy(
        reference=Path(run.model(run.config.reference, "reference")),
        samples=run.samples,
        tilted=run.tilted,
        dual=run.dual,
        output=run.policy,
        settings=training,
        seed=run.config.seed,
        show_progress=run.show_progress,
        initial=None if training.initial is None else Path(training.initial),
        pairs=run.trained_on.root if run.trained_on.paired else None,
        reference_logp=run.reference_logp,
        chat_template=_own_chat_template(run),
    )


def recorded_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that determine the policy, as the manifest has them."""
    settings = {
        **config.training.model_dump(mode="json", exclude={*_SPEED_ONLY, "initial", "pairs"}),
        "seed": config.seed,
    }
    return {
        name: value
        for name, value in settings.items()
        if name not in _BEFORE_IT_WAS_A_SETTING or value != _BEFORE_IT_WAS_A_SETTING[name]
    }


def _some_prompts(run: Run) -> list[Any]:
    """Messages of a few of the prompts that are trained on."""
    table = run.folder / "tilted" / "data"
    shards = [
        read_parquet(path, columns=["prompt_id", "prompt"], schema=PROMPTS)
        for path in sorted(table.glob("train-*"))[:1]
    ]
    first = {row["prompt_id"]: row["prompt"] for shard in shards for row in shard.slice(0, 4_096).to_pylist()}
    return list(first.values())[:_PROMPTS_SERVED]


def _own_chat_template(run: Run) -> str | None:
    """The chat template that gives users of the policy the token ids it was trained on; None for the tokenizer's."""
    from stage1_dual.sampling.rendering import load_tokenizer, served_template

    reference = run.config.reference
    tokenizer = load_tokenizer(run.model(reference, "reference"))
    template = served_template(tokenizer, _some_prompts(run), template=reference.template, day=reference.template_date)
    return None if template == tokenizer.chat_template else template
