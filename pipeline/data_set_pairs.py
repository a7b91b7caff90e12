"""Pairs of responses of a data set, to train on instead of the reference's own responses (arXiv 2405.19544, eq. 5).

Each step does for them, in ``pairs/`` of the run, what it does for the samples: ``sample`` reads and tokenises them,
``score`` scores them and ``export`` writes their hand-off table. The responses 2i and 2i + 1 of a prompt are its pair
i, counted in the order of the source.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import PairSettings, PromptSettings, RunConfig
from pipeline.contracts.artifacts import begin_step, checkpoint_sha256, content_sha256, is_complete, read_manifest
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.contracts.shards import ShardedTable, read_parquet, write_table
from pipeline.contracts.tables import PROMPTS, SAMPLE_KEY, SAMPLES, SPLITS, prompt_id
from pipeline.handoff import write_tilted_table
from pipeline.prompts import Messages, SourceRow, read_prompt_row, read_source
from pipeline.responses import reference_policy, render_for, template_text
from pipeline.run import Run, derived_step_is_current, finish_step, has_all_files, log, reopen
from pipeline.run_scores import all_scores
from pipeline.scores import ScoredRows
from pipeline.scoring import score_samples
from stage1_dual.sampling.prompts import load_tokenizer
from stage1_dual.sampling.tokens import find_eos_token_ids

_SECTION = "training.pairs"


@dataclass(frozen=True)
class DataSetPair:
    """A pair of responses to a train prompt.

    Attributes:
        prompt_id: of the prompt.
        messages: the prompt.
        number: of the pair among those of its prompt, from 0; pairs that are left out count too.
        texts: the two responses, which differ.
    """

    prompt_id: str
    messages: Messages
    number: int
    texts: tuple[str, str]


@dataclass(frozen=True)
class ReadPairs:
    """What a source holds.

    Attributes:
        pairs: by prompt_id and number.
        counts: ``source_rows``, and how many of them were left out, by the reason: ``missing`` (no prompt, or
            no response), ``test`` (of a test prompt), ``equal`` (responses), ``beyond_limit``.
        sha256: of all rows of the source, whether they are left out or not.
    """

    pairs: tuple[DataSetPair, ...]
    counts: Mapping[str, int]
    sha256: str


def read_pairs(config: RunConfig, *, test_prompts: Set[str]) -> ReadPairs:
    """The pairs of train prompts of a recipe's source.

    Args:
        config: the run configuration, with ``training.pairs``.
        test_prompts: ids of the run's test prompts: whatever the source says of them, they are not trained on.

    Raises:
        InputError: the source or a column is not there or cannot be read, or a row is malformed.
        MissingExtraError: the source is a data set, and `datasets` is not installed.
    """
    settings = _pair_settings(config)
    reader = pair_reader(config)
    counts: Counter[str] = Counter()
    digest = hashlib.sha256()
    found: list[tuple[str, Messages, tuple[str, str] | None]] = []
    # A prompt that is a test prompt in one row is none to train on in another.
    not_trained = set(test_prompts)
    for row in read_source(reader, section=_SECTION, response_columns=settings.response_columns):
        counts["source_rows"] += 1
        digest.update(json.dumps([row.split, row.values], sort_keys=True, ensure_ascii=False, default=str).encode())
        if _is_missing(row.values[reader.prompt_column]):
            counts["missing"] += 1
            continue
        prompt = read_prompt_row(reader, row)
        if prompt.split not in SPLITS:
            raise InputError(
                f"{row.place}: the prompt has the split {prompt.split!r}; it must be one of {', '.join(SPLITS)}"
            )
        key = prompt_id(prompt.messages)
        if prompt.split == "test":
            not_trained.add(key)
        found.append((key, prompt.messages, _texts(row, settings)))
    pairs: list[DataSetPair] = []
    numbers: Counter[str] = Counter()
    for key, messages, texts in found:
        number = numbers[key]
        numbers[key] += 1
        if key in not_trained:
            counts["test"] += 1
        elif texts is None:
            counts["missing"] += 1
        elif texts[0] == texts[1]:
            counts["equal"] += 1
        else:
            pairs.append(DataSetPair(key, messages, number, texts))
    pairs.sort(key=lambda pair: (pair.prompt_id, pair.number))
    if settings.limit is not None:
        within = set(sorted({pair.prompt_id for pair in pairs})[: settings.limit])
        kept = [pair for pair in pairs if pair.prompt_id in within]
        counts["beyond_limit"] = len(pairs) - len(kept)
        pairs = kept
    return ReadPairs(tuple(pairs), dict(counts), digest.hexdigest())


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
    source = _pair_settings(config).source
    splits = run.prompts_table().select(["prompt_id", "split"]).to_pylist()
    read = read_pairs(config, test_prompts={row["prompt_id"] for row in splits if row["split"] == "test"})
    policy = reference_policy(run)
    settings = {
        **_pair_settings(config).model_dump(mode="json", exclude={"limit"}),
        "system": config.prompts.system,
        "test_fraction": config.prompts.test_fraction,
        "template": template_text(config.reference.template),
        "max_new_tokens": config.sampling.max_new_tokens,
    }
    origin = {"reference": checkpoint_sha256(Path(policy.folder)), _SECTION: read.sha256}
    inputs = {**origin, "rows": content_sha256([(pair.prompt_id, pair.number) for pair in read.pairs])}
    if _is_current(run.pairs / "prompts", {}, inputs) and _is_current(folder, settings, inputs):
        log.info("sample: pairs of the data set written before, kept")
        return
    tokenised, dropped, details = _tokenise(run, read.pairs)
    counts = {**read.counts, **dropped, "pairs": tokenised.num_rows // 2}
    shown = ", ".join(f"{name} {n}" for name, n in counts.items())
    log.info("sample: pairs of %s: %s", source, shown)
    if tokenised.num_rows == 0:
        reason = details["unusable_prompt"]
        also = "" if reason is None else f"; {reason}"
        raise InputError(f"`{_SECTION}.source` is {source!r}: no pair is left to train on ({shown}{also})")
    # Not before: pairs that cannot be trained on claim no folder.
    begin_step(folder, settings=settings, inputs=origin, remedy=_remedy(run))
    table = run.samples_table(folder)
    _require_growth(run, table, tokenised)
    _write_prompts(run, read.pairs, inputs=inputs, started=started)
    reopen(folder)
    for name in ("data", "parts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for place, start in enumerate(range(0, tokenised.num_rows, config.sampling.shard_rows)):
        shard = tokenised.slice(start, config.sampling.shard_rows)
        table.write_shard(shard, split="train", order=f"{place:06d}")
    finish_step(
        run,
        folder,
        "sample",
        settings=settings,
        inputs=inputs,
        files=table.finish(),
        counts={"rows": tokenised.num_rows, **counts},
        details=details,
        started=started,
    )


def score_pairs(run: Run) -> None:
    """Score the pairs with the scorers of the reward and the constraints, into ``pairs/scores/``.

    Raises:
        StaleArtifactError: scores were begun with another scorer, other settings or other pairs.
        InputError: a scorer cannot be loaded, or too many of its scores fail.
    """
    score_samples(
        run,
        samples=run.pairs / "samples",
        folder=run.pairs / "scores",
        splits=("train",),
        step="score",
        names=(run.config.reward, *run.config.constraints),
        prompts=run.pairs / "prompts",
    )


def tilt_pairs(run: Run, dual: Mapping[str, Any]) -> None:
    """Write ``pairs/tilted/``, the hand-off table of the pairs of which both responses have all scores.

    Args:
        run: the run.
        dual: content of ``dual.json``.

    Raises:
        InputError: no pair has all scores.
    """
    started = time.monotonic()
    folder, names = run.pairs / "tilted", (run.config.reward, *run.config.constraints)
    inputs = {
        "dual": read_manifest(run.folder / "dual").identity,
        **{
            f"pairs/{name}": read_manifest(run.pairs / name).identity
            for name in ("prompts", "samples", *(f"scores/{name}" for name in names))
        },
    }
    if derived_step_is_current(folder, step="export", settings={}, inputs=inputs):
        return
    rows, _ = all_scores(run, samples=run.pairs / "samples", scores=run.pairs / "scores", split="train")
    whole = _whole_pairs(rows)
    n_pairs = read_manifest(run.pairs / "samples").counts["pairs"]
    if whole.n_samples == 0:
        raise InputError(f"none of the {n_pairs} pairs of `{_SECTION}` has all scores of both responses")
    files, n_rows = write_tilted_table(
        folder,
        prompts=run.prompts_table(run.pairs / "prompts"),
        samples=run.samples_table(run.pairs / "samples"),
        scored={"train": whole},
        dual=dual,
        metadata=run.table_metadata(),
    )
    counts = {"rows": n_rows, "pairs": n_rows // 2, "unscored": n_pairs - n_rows // 2}
    finish_step(run, folder, "export", settings={}, inputs=inputs, files=files, counts=counts, started=started)
    log.info("export: %d pairs of the data set to train on", counts["pairs"])


def _pair_settings(config: RunConfig) -> PairSettings:
    assert config.training.pairs is not None  # the callers ask first
    return config.training.pairs


def pair_reader(config: RunConfig) -> PromptSettings:
    """The source under the rules of ``prompts``: a prompt has one id and one split in both."""
    return PromptSettings(
        **_pair_settings(config).model_dump(exclude={"response_columns"}),
        system=config.prompts.system,
        test_fraction=config.prompts.test_fraction,
    )


def _remedy(run: Run) -> str:
    return (
        f"Go back to what it was made with, choose another --run name, or remove {run.pairs} to make the pairs anew; "
        "what was sampled and solved stays."
    )


def _is_current(folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    if not is_complete(folder):
        return False
    found = read_manifest(folder)
    return found.settings == settings and found.inputs == inputs and has_all_files(folder, found)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _texts(row: SourceRow, settings: PairSettings) -> tuple[str, str] | None:
    """The two responses of a row; None where one is missing."""
    first, second = (row.values[column] for column in settings.response_columns)
    for column, value in zip(settings.response_columns, (first, second), strict=True):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{row.place}: `{column}` is {str(value)[:60]}; it must be a text")
    return None if _is_missing(first) or _is_missing(second) else (first, second)


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


def _require_growth(run: Run, table: ShardedTable, rows: pa.Table) -> None:
    """Refuse to leave out what is on disk: scores of it may be there too, and would belong to nothing."""
    asked_for = _keys(rows)
    for path in table.paths("train"):
        gone = _keys(read_parquet(path, columns=SAMPLE_KEY)) - asked_for
        if gone:
            raise StaleArtifactError(
                f"{path} holds {len(gone)} responses of pairs that are no longer asked for: `{_SECTION}.limit` is "
                f"smaller than it was, or a prompt is now a test prompt of the run\n{_remedy(run)}"
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
            "source": _pair_settings(run.config).source,
            "category": "",
        }
        for key, messages in {pair.prompt_id: pair.messages for pair in pairs}.items()
    ]
    files = write_table(folder, pa.Table.from_pylist(rows, schema=PROMPTS), metadata=run.table_metadata())
    counts = {"prompts": len(rows)}
    finish_step(run, folder, "sample", settings={}, inputs=inputs, files=files, counts=counts, started=started)


def _whole_pairs(rows: ScoredRows) -> ScoredRows:
    """The rows whose partner is there too."""
    pair_n = np.stack([rows.prompt_n, rows.sample_index_n // 2])
    _, place_n, count = np.unique(pair_n, axis=1, return_inverse=True, return_counts=True)
    return rows.select(count[place_n.ravel()] == 2)
