"""A policy's responses, their scores and their log-ratio to the reference: for stage 1 and for the evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EMBEDDED, SamplingSettings, resolve_model
from pipeline.contracts.artifacts import (
    begin_step,
    checkpoint_sha256,
    content_sha256,
    is_complete,
    read_json,
    read_manifest,
)
from pipeline.contracts.errors import StaleArtifactError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SCORES
from pipeline.microworld.gold import SCORES as EMBEDDED_SCORERS
from pipeline.run import Run, finish_step, log, remedy, reopen, require_extra
from pipeline.scores import ScoredRows

_CPU_KV_CACHE_BYTES = 512 * 2**20
_LOGP_TOKEN_BUDGET = 16384


def check_models(run: Run, steps: Sequence[str]) -> None:
    """Check what can be known of the models a run will use, before anything is built, sampled or trained.

    Raises:
        InputError: a folder that is not there, not a checkpoint, of another kind, or without template or head.
        MissingExtraError: a package that a planned step needs is not installed.
    """
    if "sample" in steps or "evaluate" in steps:
        engine = run.config.sampling.engine
        require_extra("sample", "torch", "transformers", engine, purpose="sampling")
    if "train" in steps:
        require_extra("train", "torch", "transformers", "accelerate", purpose="training")
    if not {"prepare", "sample", "score"} & set(steps):
        return
    from stage1_dual.checkpoints import check_policy_checkpoint, check_scorer_checkpoint

    # The embedded models are made by `prepare`; only their names can be checked before it.
    embedded = {name: Path() for name in ("reference", *EMBEDDED_SCORERS)}
    reference = run.config.reference
    model = resolve_model(reference, embedded, setting="reference")
    if not reference.model.startswith(EMBEDDED):
        check_policy_checkpoint(model, revision=reference.revision)
    for name, scorer in run.config.scorers.items():
        model = resolve_model(scorer, embedded, setting=f"scorers.{name}")
        if not scorer.model.startswith(EMBEDDED):
            check_scorer_checkpoint(model, head=scorer.head, template=scorer.template, revision=scorer.revision)


def sample_policy(
    run: Run,
    *,
    folder: Path,
    step: str,
    model: str,
    model_role: str,
    splits: Sequence[str],
    samples_per_prompt: int,
    seed: int,
) -> None:
    """Draw a policy's responses into a samples table; continues a killed run and adds to a smaller one.

    Args:
        run: the run.
        folder: folder of the samples table.
        step: the step this belongs to, for manifest and messages.
        model: path or Hub id of the policy.
        model_role: ``reference`` or ``policy``, the name of the checkpoint among the inputs.
        splits: splits of the prompts to draw for.
        samples_per_prompt: responses to each prompt.
        seed: of this policy's responses.

    Raises:
        StaleArtifactError: the table was begun with another model or other settings, or holds more than is asked for.
        InputError: a prompt leaves no room for a completion, or the model cannot be loaded.
    """
    from stage1_dual.sampling.prompts import load_tokenizer, read_max_positions, render_prompts
    from stage1_dual.sampling.run import sample_table

    started = time.monotonic()
    revision = run.config.reference.revision if model_role == "reference" else None
    checkpoint = _checkpoint_identity(model, revision)
    settings = _sampling_identity(run, seed)
    begin_step(folder, settings=settings, inputs={model_role: checkpoint}, remedy=remedy(step))
    prompts = [row for row in run.prompts_table().to_pylist() if row["split"] in splits]
    wanted = {"samples_per_prompt": samples_per_prompt, "prompts": [row["prompt_id"] for row in prompts]}
    inputs = {model_role: checkpoint, "prompts": content_sha256(wanted["prompts"])}
    recorded = {**settings, "samples_per_prompt": samples_per_prompt}
    if is_complete(folder):
        _require_growth(folder, samples_per_prompt=samples_per_prompt, n_prompts=len(prompts), step=step)
        if (found := read_manifest(folder)).settings == recorded and found.inputs == inputs:
            log.info("%s: samples drawn before, kept", step)
            return
    max_new_tokens = run.config.sampling.max_new_tokens
    max_positions = read_max_positions(model, revision=revision)
    rendered = render_prompts(
        load_tokenizer(model, revision=revision),
        [(row["prompt_id"], row["prompt"]) for row in prompts],
        max_new_tokens=max_new_tokens,
        max_positions=max_positions,
    )
    # No engine needs more positions than the longest prompt and its completion take.
    positions = max(len(prompt.token_ids) for prompt in rendered) + max_new_tokens
    reopen(folder)
    table = run.samples_table(folder)
    counts = sample_table(
        sampler_factory=lambda: _start_sampler(run, model, revision=revision, max_positions=positions),
        prompts=[(row["prompt_id"], row["split"], p.token_ids) for row, p in zip(prompts, rendered, strict=True)],
        samples_per_prompt=samples_per_prompt,
        run_seed=seed,
        table=table,
        shard_rows=run.config.sampling.shard_rows,
        show_progress=run.show_progress,
    )
    finish_step(
        run,
        folder,
        step,
        settings=recorded,
        inputs=inputs,
        files=table.finish(),
        counts={"rows": counts.rows_sampled + counts.rows_present, "prompts": len(prompts)},
        details={
            "last_call": asdict(counts),
            "example": {"text": rendered[0].text, "token_ids": rendered[0].token_ids},
        },
        started=started,
    )
    if counts.rows_sampled:
        rate = counts.tokens_sampled / max(counts.sampling_seconds, 1e-9)
        log.info(
            "%s: %d samples, %.0f tokens/s, finish reasons %s", step, counts.rows_sampled, rate, counts.finish_reasons
        )


def score_samples(run: Run, name: str, *, samples: Path, folder: Path, splits: Sequence[str]) -> None:
    """Score a samples table with one scorer; continues a killed run and scores only what is new.

    Args:
        run: the run.
        name: the scorer.
        samples: folder of the samples table.
        folder: folder of the score table.
        splits: splits to score.

    Raises:
        StaleArtifactError: the scores were begun with another scorer, other settings or other samples.
        InputError: the scorer cannot be loaded, or gave a score that is not finite.
    """
    from stage1_dual.scoring.run import score_table
    from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer

    started = time.monotonic()
    step = "score" if samples.parent == run.folder else "evaluate"
    scorer = run.config.scorers[name]
    model = run.model(scorer, f"scorers.{name}")
    settings = scorer.model_dump(mode="json", exclude={"model", "revision"})
    # What the samples were begun with stands for their content: more of the same samples leave it as it is.
    origin = {
        "scorer": _checkpoint_identity(model, scorer.revision),
        "samples_begun_with": content_sha256(read_json(samples / "settings.json")),
    }
    begin_step(folder, settings=settings, inputs=origin, remedy=remedy(step))
    inputs = {**origin, "samples": read_manifest(samples).identity}
    if is_complete(folder) and dict(read_manifest(folder).inputs) == inputs:
        log.info("%s: scores of %s computed before, kept", step, name)
        return
    reopen(folder)
    prompts = run.prompts_table()
    table = ShardedTable(folder=folder, schema=SCORES, metadata={**run.table_metadata(), "scorer": name})
    counts = score_table(
        scorer_factory=lambda: SequenceClassificationScorer(
            model,
            revision=scorer.revision,
            template=scorer.template,
            head=scorer.head,
            dtype=scorer.dtype,
            max_length=scorer.max_length,
            device=_device(),
        ),
        samples={
            split: run.samples_table(samples).read(split, columns=["prompt_id", "sample_index", "completion"])
            for split in splits
        },
        messages=dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True)),
        table=table,
        shard_rows=run.config.sampling.shard_rows,
        show_progress=run.show_progress,
    )
    finish_step(
        run,
        folder,
        step,
        settings=settings,
        inputs=inputs,
        files=table.finish(),
        counts={"rows": counts.rows_scored + counts.rows_present},
        details={"last_call": asdict(counts)},
        started=started,
    )
    if counts.rows_scored:
        rate = counts.rows_scored / max(counts.scoring_seconds, 1e-9)
        truncated = f", {counts.rows_truncated} cut to the scorer's length" if counts.rows_truncated else ""
        log.info("%s: %d samples by %s, %.0f/s%s", step, counts.rows_scored, name, rate, truncated)


def log_ratios(run: Run, *, policy_samples: Path, rows: ScoredRows) -> list[np.ndarray]:
    """Values of log pi_theta(y|x) - log pi_ref(y|x) on the policy's samples, nats, one array a prompt, as in ``rows``.

    Both by the training stack in float32, on the sampled token ids: a sampler's own log-probabilities are never mixed
    with another arithmetic's in one ratio.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from stage2_policy.logprobs import score_sequences

    columns = ["prompt_id", "sample_index", "prompt_token_ids", "completion_token_ids"]
    table = run.samples_table(policy_samples).read("test", columns=columns)
    table = table.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])
    assert table["prompt_id"].to_pylist() == rows.prompt_id_n.tolist()
    sequences = list(
        zip(table["prompt_token_ids"].to_pylist(), table["completion_token_ids"].to_pylist(), strict=True)
    )
    logp = {}
    for role, model in (
        ("policy", str(run.folder / "policy")),
        ("reference", run.model(run.config.reference, "reference")),
    ):
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        network.to(_device()).eval()
        logp[role] = score_sequences(
            network,
            sequences,
            token_budget=_LOGP_TOKEN_BUDGET,
            show_progress=run.show_progress,
            description=f"log-probabilities, {role}",
        )
    ratio = np.asarray(logp["policy"], dtype=np.float64) - np.asarray(logp["reference"], dtype=np.float64)
    cuts = np.unique(rows.prompt_id_n, return_index=True)[1][1:]
    return np.split(ratio, cuts)


def _start_sampler(run: Run, model: str, *, revision: str | None, max_positions: int) -> Any:
    settings: SamplingSettings = run.config.sampling
    if settings.engine == "transformers":
        from stage1_dual.sampling.transformers_sampler import TransformersSampler

        return TransformersSampler(
            model,
            revision=revision,
            max_new_tokens=settings.max_new_tokens,
            dtype=run.config.reference.dtype,
            batch_rows=settings.max_num_seqs,
            device=_device(),
        )
    from stage1_dual.sampling.vllm_sampler import VllmSampler

    return VllmSampler(
        model,
        revision=revision,
        max_new_tokens=settings.max_new_tokens,
        max_positions=max_positions,
        dtype=run.config.reference.dtype,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_bytes=_CPU_KV_CACHE_BYTES if _device() == "cpu" else None,
    )


def _sampling_identity(run: Run, seed: int) -> dict[str, Any]:
    """The settings that decide which tokens are drawn; speed and the number of responses are not among them."""
    settings = run.config.sampling
    return {
        "engine": settings.engine,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": run.config.reference.dtype,
        "seed": seed,
    }


def _require_growth(folder: Path, *, samples_per_prompt: int, n_prompts: int, step: str) -> None:
    found = read_manifest(folder)
    for name, then, now in (
        ("samples_per_prompt", found.settings["samples_per_prompt"], samples_per_prompt),
        ("prompts", found.counts["prompts"], n_prompts),
    ):
        if now < then:
            raise StaleArtifactError(
                f"{folder} holds more than is asked for:\n  - {name}: {then} then, {now} now\n{remedy(step)}"
            )


def _checkpoint_identity(model: str, revision: str | None) -> str:
    return (
        checkpoint_sha256(Path(model))
        if Path(model).is_dir()
        else content_sha256({"hub": model, "revision": revision})
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
