"""A policy's responses in a samples table: for stage 1, and for what judges a trained policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.sections import SamplingSettings
from pipeline.contracts.artifacts import begin_step, checkpoint_sha256, content_sha256, is_complete, read_manifest
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SPLITS
from pipeline.run.execution import build_execution, worker_device
from pipeline.run.response_set import ResponseSet
from pipeline.run.run import Run
from pipeline.run.step import finish_step, has_all_files, log, record_failures, remedy, reopen
from pipeline.sampling.policies import SampledPolicy, render_for, template_text
from pipeline.scoring.log_ratios import check_sampler_logp
from stage1_dual.checkpoints import count_weights
from stage1_dual.sampling.rendering import RenderedPrompt, UnusablePrompt, load_tokenizer

if TYPE_CHECKING:
    from stage1_dual.sampling.protocol import Sampler

_AT_ONCE = 256
"""Responses decoded at the same time, where neither the recipe nor vLLM says."""

_WORK_WORTH_COMPILING = 3e13
"""Weights times tokens at most from which a CPU compiles the model first (docs/decisions.md has the measurement)."""


def sample_policy(
    run: Run,
    policy: SampledPolicy,
    responses: ResponseSet,
    *,
    step: str,
    samples_per_prompt: int,
    seed: int,
) -> None:
    """Draw a policy's responses into a samples table; continues a killed run and adds to a smaller one.

    Args:
        run: the run.
        policy: the policy.
        responses: the set to draw.
        step: the step this belongs to, for manifest and messages.
        samples_per_prompt: responses to each prompt.
        seed: of this policy's responses.

    Raises:
        StaleArtifactError: the table was begun with another model or other settings, or holds more than is asked for.
        InputError: too many prompts cannot be sampled from, the model cannot be loaded, or its log-probabilities are
            not those of the training stack.
    """
    from stage1_dual.sampling.sample_table import PromptTokens, sample_table

    started = time.monotonic()
    folder = responses.samples
    identity = checkpoint_sha256(Path(policy.folder))
    settings = sampling_settings(run, quantization=policy.quantization, seed=seed)
    begin_step(folder, settings=settings, inputs={policy.role: identity}, remedy=remedy(step))
    prompts = [row for row in run.prompts_table(responses.prompts).to_pylist() if row["split"] in responses.splits]
    split_of = {row["prompt_id"]: row["split"] for row in prompts}
    inputs = {policy.role: identity, "prompts": content_sha256(split_of)}
    recorded = {**settings, "samples_per_prompt": samples_per_prompt}
    if is_complete(folder):
        _require_growth(folder, samples_per_prompt=samples_per_prompt, n_prompts=len(prompts), step=step)
        found = read_manifest(folder)
        unchanged = found.settings == recorded and found.inputs == inputs
        if unchanged and not found.count("failed") and has_all_files(folder, found):
            log.info("%s: samples drawn before, kept", step)
            return
    table = run.samples_table(folder)
    _require_asked_for(table, split_of, samples_per_prompt=samples_per_prompt, step=step)
    tokenizer = load_tokenizer(policy.folder)
    rendered, unusable = render_for(run, policy, tokenizer, [(row["prompt_id"], row["prompt"]) for row in prompts])
    _require_usable(unusable, len(prompts), max_share=run.config.max_failed_share)
    if with_control_tokens := sum(prompt.has_control_tokens for prompt in rendered):
        log.warning(
            "%s: %d prompts write special tokens of the tokenizer, which the policy reads as control tokens; "
            "`reference.special_tokens_in_prompts: refuse` leaves such prompts out",
            step,
            with_control_tokens,
        )
    reopen(folder)
    counts = sample_table(
        sampler_factory=_sampler_factory(run, policy, rendered, samples_per_prompt),
        prompts=[PromptTokens(prompt.prompt_id, split_of[prompt.prompt_id], prompt.token_ids) for prompt in rendered],
        samples_per_prompt=samples_per_prompt,
        run_seed=seed,
        table=table,
        shard_rows=run.config.sampling.shard_rows,
        show_progress=run.show_progress,
        max_failed_share=run.config.max_failed_share,
        execution=build_execution(run),
    )
    details: dict[str, Any] = {
        "last_call": {**asdict(counts), "failures": len(counts.failures)},
        "example": {"text": rendered[0].text, "token_ids": rendered[0].token_ids.tolist()},
        "bos_token_id": tokenizer.bos_token_id,
    }
    if policy.role == "reference" and run.config.sampling.logp_rows:
        details["sampler_logp_difference"] = check_sampler_logp(run, table)
    failures = [
        *({"prompt_id": failure.prompt_id, "reason": failure.reason} for failure in unusable),
        *(asdict(failure) for failure in counts.failures),
    ]
    record_failures(folder, failures)
    rows = counts.rows_sampled + counts.rows_present
    finish_step(
        run.name,
        folder,
        step,
        settings=recorded,
        inputs=inputs,
        files=table.finish(),
        counts={
            "rows": rows,
            "prompts": len(prompts),
            "failed": len(prompts) * samples_per_prompt - rows,
        },
        details=details,
        started=started,
    )
    if counts.rows_sampled:
        rate = counts.tokens_sampled / max(counts.sampling_seconds, 1e-9)
        log.info(
            "%s: %d samples, %.0f tokens/s, finish reasons %s", step, counts.rows_sampled, rate, counts.finish_reasons
        )
    if failures:
        log.info("%s: %d failures, in %s", step, len(failures), folder / "failures.json")


def _require_usable(unusable: Sequence[UnusablePrompt], n_prompts: int, *, max_share: float) -> None:
    if len(unusable) > max_share * n_prompts:
        shown = "; ".join(f"{failure.prompt_id}: {failure.reason}" for failure in unusable[:3])
        raise InputError(
            f"{len(unusable)} of {n_prompts} prompts cannot be sampled from, a larger share than `max_failed_share`, "
            f"{max_share:g} ({shown})"
        )


def _sampler_factory(
    run: Run, policy: SampledPolicy, prompts: Sequence[RenderedPrompt], samples_per_prompt: int
) -> Callable[[], Sampler]:
    """Starts the sampler; picklable, since it may have to go to another machine."""
    from stage1_dual.sampling.transformers_sampler import TransformersSampler
    from stage1_dual.sampling.vllm_sampler import VllmSampler

    settings = run.config.sampling
    device = worker_device(run)
    if settings.engine == "transformers":
        return partial(
            TransformersSampler,
            policy.folder,
            max_new_tokens=settings.max_new_tokens,
            dtype=run.config.reference.dtype,
            distribution=settings.distribution,
            batch_rows=settings.max_num_seqs or _AT_ONCE,
            device=device,
        )
    return partial(
        VllmSampler,
        policy.folder,
        max_new_tokens=settings.max_new_tokens,
        # No engine needs more positions than the longest prompt and its completion take.
        max_positions=max(len(prompt.token_ids) for prompt in prompts) + settings.max_new_tokens,
        dtype=run.config.reference.dtype,
        quantization=policy.quantization,
        tensor_parallel_size=settings.tensor_parallel_size,
        distribution=settings.distribution,
        max_num_seqs=settings.max_num_seqs,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        device=device,
        compiles=device != "cpu" or _is_worth_compiling(policy, len(prompts) * samples_per_prompt, settings),
    )


def _is_worth_compiling(policy: SampledPolicy, n_rows: int, settings: SamplingSettings) -> bool:
    """Whether what a compiled model saves is more than the compilation takes.

    By all the rows of the table, not those that are missing: a continued run is compiled if the first one was.
    """
    weights = count_weights(Path(policy.folder))
    return weights * n_rows * settings.max_new_tokens >= _WORK_WORTH_COMPILING


def sampling_settings(run: Run, *, quantization: str | None, seed: int) -> dict[str, Any]:
    """The settings that decide which tokens are drawn; speed and the number of responses are not among them.

    Args:
        run: the run.
        quantization: of the policy that is sampled.
        seed: of its responses.
    """
    settings, day = run.config.sampling, run.config.reference.template_date
    return {
        "engine": settings.engine,
        "max_new_tokens": settings.max_new_tokens,
        **asdict(settings.distribution),
        "dtype": run.config.reference.dtype,
        "quantization": quantization,
        "template": template_text(run.config.reference.template),
        **({} if day is None else {"template_date": day.isoformat()}),
        "seed": seed,
    }


def _require_growth(folder: Path, *, samples_per_prompt: int, n_prompts: int, step: str) -> None:
    found = read_manifest(folder)
    for name, then, now in (
        ("samples_per_prompt", found.settings["samples_per_prompt"], samples_per_prompt),
        ("prompts", found.count("prompts"), n_prompts),
    ):
        if now < then:
            raise StaleArtifactError(
                f"{folder} holds more than is asked for:\n  - {name}: {then} then, {now} now\n{remedy(step)}"
            )


def _require_asked_for(
    table: ShardedTable, split_of: Mapping[str, str], *, samples_per_prompt: int, step: str
) -> None:
    """Refuse samples on disk, of an unfinished table too, that would take part without being asked for."""
    for split in SPLITS:
        prompts = PromptPlaces([prompt for prompt, its_split in split_of.items() if its_split == split])
        for path in table.paths(split):
            place, index = table.keys(path, prompts)
            for wrong, what in (
                (place < 0, f"of prompts that are not (or no longer) in the {split} split of the run"),
                (index >= samples_per_prompt, f"beyond the {samples_per_prompt} a prompt that are asked for"),
            ):
                if wrong.any():
                    raise StaleArtifactError(f"{path} holds {np.count_nonzero(wrong)} samples {what}\n{remedy(step)}")
