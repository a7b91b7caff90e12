"""The pairs of a data set in a samples table, as if their responses had been sampled."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.recipe import RunConfig
from pipeline.contracts.artifacts import begin_step, checkpoint_sha256, content_sha256, is_complete, read_manifest
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.contracts.shards import ShardedTable, read_parquet, write_table
from pipeline.contracts.tables import PROMPTS, SAMPLE_KEY, SAMPLES
from pipeline.run.response_set import ResponseSet
from pipeline.run.run import Run
from pipeline.run.step import derived_step_is_current, finish_step, has_all_files, log, reopen
from pipeline.sampling.policies import reference_policy, render_for, template_text
from pipeline.sources.pairs import PAIRS_SECTION, DataSetPair, pair_settings, read_pairs
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.sampling.tokens import find_eos_token_ids


def write_pairs(run: Run, responses: ResponseSet) -> None:
    """Write the prompts and the samples of a set of pairs: the pairs as if their responses had been sampled.

    The prompt is rendered and tokenised as for sampling; a response is tokenised by itself, as it stands, and ends
    with the tokenizer's EOS. Nothing was drawn: ``seed`` is -1 and ``sampler_logp`` NaN. A larger limit adds to a
    smaller one.

    Args:
        run: the run, whose recipe names the pairs.
        responses: the set of them.

    Raises:
        InputError: see :func:`read_pairs`; or no pair is left.
        StaleArtifactError: the table was begun with other pairs, another model or other settings, or holds more than
            is asked for.
    """
    started = time.monotonic()
    config, folder = run.config, responses.samples
    source = pair_settings(config).source
    splits = run.prompts_table().select(["prompt_id", "split"]).to_pylist()
    read = read_pairs(config, test_prompts={row["prompt_id"] for row in splits if row["split"] == "test"})
    policy = reference_policy(run)
    settings = pair_table_settings(config)
    origin = {"reference": checkpoint_sha256(Path(policy.folder)), PAIRS_SECTION: read.sha256}
    inputs = {**origin, "rows": content_sha256([(pair.prompt_id, pair.number) for pair in read.pairs])}
    if _is_current(responses.prompts, {}, inputs) and _is_current(folder, settings, inputs):
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
    begin_step(folder, settings=settings, inputs=origin, remedy=_remedy(responses))
    table = run.samples_table(folder)
    _require_growth(responses, table, tokenised)
    _write_prompts(run, responses, read.pairs, inputs=inputs, started=started)
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


def pair_table_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the tokens of pairs, as the manifest has them; how many pairs is not among them."""
    return {
        **pair_settings(config).model_dump(mode="json", exclude={"limit"}),
        "system": config.prompts.system,
        "test_fraction": config.prompts.test_fraction,
        "template": template_text(config.reference.template),
        "max_new_tokens": config.sampling.max_new_tokens,
    }


def _remedy(responses: ResponseSet) -> str:
    return (
        f"Go back to what it was made with, choose another --run name, or remove {responses.root} to make the pairs "
        "anew; what was sampled and solved stays."
    )


def _is_current(folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
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


def _require_growth(responses: ResponseSet, table: ShardedTable, rows: pa.Table) -> None:
    """Refuse to leave out what is on disk: scores of it may be there too, and would belong to nothing."""
    asked_for = _keys(rows)
    for path in table.paths("train"):
        gone = _keys(read_parquet(path, columns=SAMPLE_KEY, schema=SAMPLES)) - asked_for
        if gone:
            raise StaleArtifactError(
                f"{path} holds {len(gone)} responses of pairs that are no longer asked for: `{PAIRS_SECTION}.limit` "
                f"is smaller than it was, or a prompt is now a test prompt of the run\n{_remedy(responses)}"
            )


def _keys(rows: pa.Table) -> set[tuple[str, int]]:
    return set(zip(*(rows[name].to_pylist() for name in SAMPLE_KEY), strict=True))


def _write_prompts(
    run: Run, responses: ResponseSet, pairs: Sequence[DataSetPair], *, inputs: Mapping[str, str], started: float
) -> None:
    folder = responses.prompts
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
