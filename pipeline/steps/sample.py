"""A policy's responses in a samples table: for stage 1, and for the evaluation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.artifacts import begin_step, checkpoint_sha256, content_sha256, is_complete, read_manifest
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.shards import ShardedTable, read_parquet, write_table
from pipeline.contracts.tables import PROMPTS, SAMPLE_KEY, SAMPLES, SPLITS
from pipeline.run.execution import build_execution, worker_device
from pipeline.run.run import Run
from pipeline.run.step import derived_step_is_current, finish_step, has_all_files, log, record_failures, remedy, reopen
from pipeline.scoring.log_ratios import check_sampler_logp
from pipeline.sources.pairs import PAIRS_SECTION, DataSetPair, pair_settings, read_pairs
from stage1_dual.chat_templates import read_template, template_file
from stage1_dual.sampling.rendering import (
    RenderedPrompt,
    UnusablePrompt,
    load_tokenizer,
    read_max_positions,
    render_prompts,
)
from stage1_dual.sampling.tokens import find_eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stage1_dual.sampling.protocol import Sampler


def write_pairs(run: Run) -> None:
    """Write ``pairs/prompts/`` and ``pairs/samples/``: the pairs as if their responses had been sampled.

    The prompt is rendered and tokenised as for sampling; a response is tokenised by itself, as it stands, and ends
    with the tokenizer's EOS. Nothing was drawn: ``seed`` is -1 and ``sampler_logp`` NaN. A larger limit adds to a
    smaller one.

    Raises:
        InputError: see :func:`read_pairs`; or no pair is left.
        StaleArtifactError: the table was begun with other pairs, another model or other settings, or holds more than
            is asked for.
    """
    started = time.monotonic()
    config, folder = run.config, run.pairs / "samples"
    source = pair_settings(config).source
    splits = run.prompts_table().select(["prompt_id", "split"]).to_pylist()
    read = read_pairs(config, test_prompts={row["prompt_id"] for row in splits if row["split"] == "test"})
    policy = reference_policy(run)
    settings = {
        **pair_settings(config).model_dump(mode="json", exclude={"limit"}),
        "system": config.prompts.system,
        "test_fraction": config.prompts.test_fraction,
        "template": template_text(config.reference.template),
        "max_new_tokens": config.sampling.max_new_tokens,
    }
    origin = {"reference": checkpoint_sha256(Path(policy.folder)), PAIRS_SECTION: read.sha256}
    inputs = {**origin, "rows": content_sha256([(pair.prompt_id, pair.number) for pair in read.pairs])}
    if _pairs_are_current(run.pairs / "prompts", {}, inputs) and _pairs_are_current(folder, settings, inputs):
        log.info("sample: pairs of the data set written before, kept")
        return
    tokenised, dropped, details = _tokenise(run, read.pairs)
    counts = {**read.counts, **dropped, "pairs": tokenised.num_rows // 2}
    shown = ", ".join(f"{name} {n}" for name, n in counts.items())
    log.info("sample: pairs of %s: %s", source, shown)
    if tokenised.num_rows == 0:
        reason = details["unusable_prompt"]
        also = "" if reason is None else f"; {reason}"
        raise InputError(f"`{PAIRS_SECTION}.source` is {source!r}: no pair is left to train on ({shown}{also})")
    # Not before: pairs that cannot be trained on claim no folder.
    begin_step(folder, settings=settings, inputs=origin, remedy=_pairs_remedy(run))
    table = run.samples_table(folder)
    _require_pair_growth(run, table, tokenised)
    _write_prompts(run, read.pairs, inputs=inputs, started=started)
    reopen(folder)
    for name in ("data", "parts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for place, start in enumerate(range(0, tokenised.num_rows, config.sampling.shard_rows)):
        shard = tokenised.slice(start, config.sampling.shard_rows)
        table.write_shard(shard, split="train", order=f"{place:06d}")
    finish_step(
        run.name,
        folder,
        "sample",
        settings=settings,
        inputs=inputs,
        files=table.finish(),
        counts={"rows": tokenised.num_rows, **counts},
        details=details,
        started=started,
    )


def _pairs_remedy(run: Run) -> str:
    return (
        f"Go back to what it was made with, choose another --run name, or remove {run.pairs} to make the pairs anew; "
        "what was sampled and solved stays."
    )


def _pairs_are_current(folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    if not is_complete(folder):
        return False
    found = read_manifest(folder)
    return found.settings == settings and found.inputs == inputs and has_all_files(folder, found)


def _tokenise(run: Run, pairs: Sequence[DataSetPair]) -> tuple[pa.Table, dict[str, int], dict[str, Any]]:
    """The samples table of the pairs that can be trained on, the others counted by the reason, and details."""
    policy = reference_policy(run)
    tokenizer = load_tokenizer(policy.folder)
    ends = find_eos_token_ids(policy.folder, tokenizer)
    end = ends[0] if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    messages = {pair.prompt_id: pair.messages for pair in pairs}
    rendered, unusable = render_for(run, policy, tokenizer, list(messages.items()))
    prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in rendered}
    dropped = dict.fromkeys(("unusable_prompt", "too_long", "end_inside"), 0)
    texts = [text for pair in pairs for text in pair.texts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    rows: list[dict[str, Any]] = []
    for pair, answers in zip(pairs, zip(ids[::2], ids[1::2], strict=True), strict=True):
        if pair.prompt_id not in prompt_ids:
            dropped["unusable_prompt"] += 1
        elif max(map(len, answers)) + 1 > run.config.sampling.max_new_tokens:
            dropped["too_long"] += 1
        elif any(token in ends for answer in answers for token in answer):
            dropped["end_inside"] += 1
        else:
            rows += [
                {
                    "prompt_id": pair.prompt_id,
                    "sample_index": 2 * pair.number + place,
                    "completion": pair.texts[place],
                    "prompt_token_ids": prompt_ids[pair.prompt_id],
                    "completion_token_ids": [*answer, end],
                    "finish_reason": "stop",
                    "seed": -1,
                    "sampler_logp": float("nan"),
                }
                for place, answer in enumerate(answers)
            ]
    details = {
        "eos_token_id": end,
        "bos_token_id": tokenizer.bos_token_id,
        "unusable_prompt": f"{unusable[0].prompt_id}: {unusable[0].reason}" if unusable else None,
    }
    return pa.Table.from_pylist(rows, schema=SAMPLES), dropped, details


def _require_pair_growth(run: Run, table: ShardedTable, rows: pa.Table) -> None:
    """Refuse to leave out what is on disk: scores of it may be there too, and would belong to nothing."""
    asked_for = _keys(rows)
    for path in table.paths("train"):
        gone = _keys(read_parquet(path, columns=SAMPLE_KEY)) - asked_for
        if gone:
            raise StaleArtifactError(
                f"{path} holds {len(gone)} responses of pairs that are no longer asked for: `{PAIRS_SECTION}.limit` "
                f"is smaller than it was, or a prompt is now a test prompt of the run\n{_pairs_remedy(run)}"
            )


def _keys(rows: pa.Table) -> set[tuple[str, int]]:
    return set(zip(*(rows[name].to_pylist() for name in SAMPLE_KEY), strict=True))


def _write_prompts(run: Run, pairs: Sequence[DataSetPair], *, inputs: Mapping[str, str], started: float) -> None:
    folder = run.pairs / "prompts"
    if derived_step_is_current(folder, step="sample", settings={}, inputs=inputs):
        return
    rows = [
        {
            "prompt_id": key,
            "prompt": [{"role": message["role"], "content": message["content"]} for message in messages],
            "split": "train",
            "source": pair_settings(run.config).source,
            "category": "",
        }
        for key, messages in {pair.prompt_id: pair.messages for pair in pairs}.items()
    ]
    files = write_table(folder, pa.Table.from_pylist(rows, schema=PROMPTS), metadata=run.table_metadata())
    counts = {"prompts": len(rows)}
    finish_step(run.name, folder, "sample", settings={}, inputs=inputs, files=files, counts=counts, started=started)


def sample(run: Run) -> None:
    """Draw responses of the reference to the prompts of both splits, and tokenise the pairs of a data set, if any."""
    if run.config.training.pairs is not None:
        write_pairs(run)  # first: what is wrong with them is known before anything is drawn
    sample_policy(
        run,
        reference_policy(run),
        folder=run.folder / "samples",
        step="sample",
        splits=SPLITS,
        samples_per_prompt=run.config.sampling.samples_per_prompt,
        seed=run.config.seed,
    )


_CPU_KV_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class SampledPolicy:
    """A policy to sample from.

    Attributes:
        role: ``reference`` or ``policy``, its name among the inputs of what is sampled.
        folder: its checkpoint.
        quantization: vLLM's name of a quantisation to load it with.
    """

    role: str
    folder: str
    quantization: str | None = None


def reference_policy(run: Run) -> SampledPolicy:
    """The reference of the recipe."""
    reference = run.config.reference
    return SampledPolicy("reference", run.model(reference, "reference"), quantization=reference.quantization)


def sample_policy(
    run: Run,
    policy: SampledPolicy,
    *,
    folder: Path,
    step: str,
    splits: Sequence[str],
    samples_per_prompt: int,
    seed: int,
) -> None:
    """Draw a policy's responses into a samples table; continues a killed run and adds to a smaller one.

    Args:
        run: the run.
        policy: the policy.
        folder: folder of the samples table.
        step: the step this belongs to, for manifest and messages.
        splits: splits of the prompts to draw for.
        samples_per_prompt: responses to each prompt.
        seed: of this policy's responses.

    Raises:
        StaleArtifactError: the table was begun with another model or other settings, or holds more than is asked for.
        InputError: too many prompts cannot be sampled from, the model cannot be loaded, or its log-probabilities are
            not those of the training stack.
    """
    from stage1_dual.sampling.sample_table import PromptTokens, sample_table

    started = time.monotonic()
    identity = checkpoint_sha256(Path(policy.folder))
    settings = _sampling_identity(run, policy, seed)
    begin_step(folder, settings=settings, inputs={policy.role: identity}, remedy=remedy(step))
    prompts = [row for row in run.prompts_table().to_pylist() if row["split"] in splits]
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
        sampler_factory=_sampler_factory(run, policy, rendered),
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


def show_prompts(run: Run, *, prompts: Sequence[tuple[str, Sequence[Mapping[str, str]]]]) -> str:
    """What the reference would read of some prompts and how it would be sampled, as text; nothing is written.

    Args:
        run: the run.
        prompts: (prompt_id, messages) of each.

    Raises:
        InputError: the tokenizer or the template cannot be used.
    """
    policy = reference_policy(run)
    settings = run.config.sampling
    tokenizer = load_tokenizer(policy.folder)
    rendered, unusable = render_for(run, policy, tokenizer, prompts)
    lines = [
        f"reference   {policy.folder}",
        f"engine      {settings.engine}, {run.config.reference.dtype}",
        (
            f"sampling    {settings.samples_per_prompt} responses a prompt, at most {settings.max_new_tokens} tokens, "
            f"temperature {settings.temperature:g}, top_p {settings.top_p:g}, top_k {settings.top_k}, "
            f"min_p {settings.min_p:g}"
        ),
        f"BOS         {tokenizer.bos_token_id}",
    ]
    for prompt in rendered:
        lines += [
            "",
            f"prompt {prompt.prompt_id}",
            prompt.text,
            f"{len(prompt.token_ids)} tokens: {prompt.token_ids.tolist()}",
        ]
    for failure in unusable:
        lines += ["", f"prompt {failure.prompt_id}: {failure.reason}"]
    return "\n".join(lines)


def render_for(
    run: Run,
    policy: SampledPolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, Sequence[Mapping[str, str]]]],
) -> tuple[list[RenderedPrompt], list[UnusablePrompt]]:
    """Prompts as a policy of the run reads them, and those that it cannot read.

    Raises:
        InputError: there is no chat template.
    """
    return render_prompts(
        tokenizer,
        prompts,
        template=run.config.reference.template,
        max_new_tokens=run.config.sampling.max_new_tokens,
        max_positions=read_max_positions(policy.folder),
        day=run.config.reference.template_date,
        refuses_control_tokens=run.config.reference.special_tokens_in_prompts == "refuse",
    )


def _require_usable(unusable: Sequence[UnusablePrompt], n_prompts: int, *, max_share: float) -> None:
    if len(unusable) > max_share * n_prompts:
        shown = "; ".join(f"{failure.prompt_id}: {failure.reason}" for failure in unusable[:3])
        raise InputError(
            f"{len(unusable)} of {n_prompts} prompts cannot be sampled from, a larger share than `max_failed_share`, "
            f"{max_share:g} ({shown})"
        )


def _sampler_factory(run: Run, policy: SampledPolicy, prompts: Sequence[RenderedPrompt]) -> Callable[[], Sampler]:
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
            batch_rows=settings.max_num_seqs,
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
        kv_cache_bytes=_CPU_KV_CACHE_BYTES if device == "cpu" else None,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )


def _sampling_identity(run: Run, policy: SampledPolicy, seed: int) -> dict[str, Any]:
    """The settings that decide which tokens are drawn; speed and the number of responses are not among them."""
    settings, day = run.config.sampling, run.config.reference.template_date
    return {
        "engine": settings.engine,
        "max_new_tokens": settings.max_new_tokens,
        **asdict(settings.distribution),
        "dtype": run.config.reference.dtype,
        "quantization": policy.quantization,
        "template": template_text(run.config.reference.template),
        **({} if day is None else {"template_date": day.isoformat()}),
        "seed": seed,
    }


def template_text(template: str | None) -> str | None:
    """A template of the recipe by its content: a file of the same name may change."""
    path = None if template is None else template_file(template)
    return template if path is None else read_template(path, setting="reference.template")


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
