"""Log-probabilities of the responses under the reference policy: computed once, stored by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from filelock import FileLock

from pipeline.contracts.artifacts import (
    Manifest,
    content_sha256,
    environment,
    is_complete,
    verify_artifact,
    write_manifest,
)
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.keys import PromptPlaces, find_keys, row_keys
from pipeline.contracts.shards import ShardedTable, count_parquet, iterate_parquet
from stage2_policy.data import TrainingData, TrainingResponses
from stage2_policy.logprobs import score_sequences
from stage2_policy.settings import TrainSettings

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("ref_logp", pa.float64(), nullable=False),
    ]
)
_SHARD_ROWS = 16384


@dataclass(frozen=True)
class ReferenceLogp:
    """Log pi_ref of the responses, nats, by the arithmetic of training.

    Attributes:
        train: of those trained on, shape (n,); zeros where training does not read them.
        held_out: of those that choose the checkpoint, shape (h,).
    """

    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class ReferenceStore:
    """Where log-probabilities are kept for the next training run on the same samples.

    Attributes:
        folder: holds one table for each key.
        key: what the values depend on: the model with its tokenizer, the samples, the arithmetic, the rows.
    """

    folder: Path
    key: Mapping[str, Any]

    @property
    def table(self) -> Path:
        """Folder of the table of this key."""
        return self.folder / content_sha256(self.key)[:16]


def reference_store(folder: Path, data: TrainingData, settings: TrainSettings) -> ReferenceStore:
    """The store of the values that a training run with these settings reads.

    Args:
        folder: holds one table for each key; the folder of a run holds it.
        data: what is trained on.
        settings: of the training run.
    """
    whole = settings.reads_reference
    return ReferenceStore(
        folder,
        {
            "reference": data.identities["reference"],
            "samples": data.identities["samples"],
            **{name: identity for name, identity in data.identities.items() if name == "pairs/samples"},
            "responses": _keys_sha256([data.train, data.held_out]),
            "dtype": settings.dtype,
            "weights": {"none": "float32", "lora": settings.dtype, "qlora": "4 bits"}[settings.adapter],
            "rows": "all train prompts" if whole else f"held-out prompts, {settings.held_out_fraction}",
        },
    )


def _keys_sha256(parts: Sequence[TrainingResponses]) -> str:
    """:func:`content_sha256` of the sorted keys of some responses, hashed prompt by prompt, without a list of them."""
    prompts = PromptPlaces(sorted({name for part in parts for name in part.prompt_ids}))
    key_n = np.sort(np.concatenate([part.keys(prompts) for part in parts]))
    digest = hashlib.sha256(b"[")
    rows_p = np.split(key_n % 2**32, np.flatnonzero(np.diff(key_n // 2**32)) + 1)
    for place, (name, index_k) in enumerate(zip(prompts.ids, rows_p, strict=True)):
        quoted = json.dumps(name, ensure_ascii=False)
        text = ",".join(f"[{quoted},{index}]" for index in index_k.tolist())
        digest.update(f"{',' if place else ''}{text}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def arithmetic(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which training computes log-probabilities."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def score_reference(
    model: torch.nn.Module,
    data: TrainingData,
    *,
    settings: TrainSettings,
    show_progress: bool,
    store: ReferenceStore | None = None,
) -> ReferenceLogp:
    """Log-probabilities of the responses under the reference policy, once for the whole run.

    Args:
        model: the reference policy.
        data: the responses.
        settings: of the run; those trained on are left out where it does not read them.
        show_progress: show progress bars.
        store: where they are kept, and taken from if they are there.

    Raises:
        CorruptArtifactError: the stored table is damaged, or lacks rows, or holds values that are not finite.
    """
    parts = {
        "train": data.train if settings.reads_reference else None,
        "held_out": data.held_out,
    }
    device = next(model.parameters()).device

    def score(responses: TrainingResponses, *, description: str) -> np.ndarray:
        with arithmetic(settings.dtype, device):
            return score_sequences(
                model,
                responses.sequences,
                token_budget=settings.tokens_per_microbatch,
                show_progress=show_progress,
                description=description,
            )

    if store is not None:
        with _alone(store):
            for name, responses in parts.items():
                if responses is not None and not is_complete(store.table):
                    _write_shards(store, responses, part=name, score=score)
            _finish(store)
            _require_files(store)
    values = {}
    for name, responses in parts.items():
        if responses is None:
            values[name] = np.zeros(len(data.train))
        elif store is None:
            values[name] = score(responses, description=f"reference, {name} responses")
        else:
            values[name] = _join(responses, store)
    return ReferenceLogp(**values)


def _table(store: ReferenceStore) -> ShardedTable:
    return ShardedTable(folder=store.table, schema=SCHEMA, metadata={"key": content_sha256(store.key)})


@contextmanager
def _alone(store: ReferenceStore) -> Iterator[None]:
    """Hold a table for the processes of this run: two runs that share it would move each other's shards."""
    processes = PartialState()
    store.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{store.table}.lock") if processes.is_main_process else nullcontext():
        processes.wait_for_everyone()
        yield
        processes.wait_for_everyone()


def _write_shards(store: ReferenceStore, responses: TrainingResponses, *, part: str, score: Any) -> None:
    """Score what is not on disk yet, shard by shard: a killed run loses one."""
    table = _table(store)
    prompts = PromptPlaces(list(dict.fromkeys(responses.prompt_ids)))  # of pairs, a prompt may come several times
    key_n = responses.keys(prompts)
    place_n, index_n = key_n // 2**32, key_n % 2**32
    presence = table.presence("train", prompts, n_samples=int(index_n.max(initial=-1)) + 1)
    absent = np.flatnonzero(~presence[place_n, index_n])
    ids = pa.array(prompts.ids, pa.string())
    for rows in np.split(absent, np.arange(_SHARD_ROWS, len(absent), _SHARD_ROWS)):
        if len(rows) == 0:
            continue
        logp = score(responses.select_rows(rows), description=f"reference, {part} responses")
        prompt_id, sample_index = ids.take(pa.array(place_n[rows])), index_n[rows]
        shard = pa.table({"prompt_id": prompt_id, "sample_index": sample_index, "ref_logp": logp})
        if PartialState().is_main_process:
            # Named by a row that no shard had: another share of held-out prompts cuts the parts elsewhere.
            table.write_shard(shard, split="train", order=f"{part}-{prompt_id[0].as_py()}-{sample_index[0]:09d}")
    PartialState().wait_for_everyone()


def _finish(store: ReferenceStore) -> None:
    if PartialState().is_main_process and not is_complete(store.table):
        table = _table(store)
        counts = {"rows": sum(count_parquet(path, ())[0] for path in table.paths("train"))}
        write_manifest(
            store.table,
            Manifest(
                step="reference_logp",
                run=store.folder.parent.name,
                settings=dict(store.key),
                inputs={},
                files=table.finish(),
                counts=counts,
                environment=environment(),
            ),
        )
    PartialState().wait_for_everyone()


def _require_files(store: ReferenceStore) -> None:
    try:
        verify_artifact(store.table)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{error}. Remove {store.table} to compute its values anew") from error


def _join(responses: TrainingResponses, store: ReferenceStore) -> np.ndarray:
    """The stored value of each response, shape (n,); a shard of the table in memory at a time."""
    prompts = PromptPlaces(list(dict.fromkeys(responses.prompt_ids)))
    key_n = responses.keys(prompts)
    order = np.argsort(key_n, kind="stable")
    sorted_n, logp, found = key_n[order], np.full(len(key_n), np.nan), np.zeros(len(key_n), dtype=bool)
    for path in _table(store).paths("train"):
        for group in iterate_parquet(path, columns=SCHEMA.names, schema=SCHEMA, as_dictionary=["prompt_id"]):
            stored_n = row_keys(prompts.of(group["prompt_id"]), group["sample_index"].to_numpy())
            place_n = find_keys(sorted_n, stored_n)
            rows = order[place_n[place_n >= 0]]
            logp[rows], found[rows] = group["ref_logp"].to_numpy()[place_n >= 0], True
    bad = np.flatnonzero(~np.isfinite(logp))
    if len(bad):
        missing = int(np.count_nonzero(~found[bad]))
        ids = prompts.ids
        shown = ", ".join(str((ids[key // 2**32], key % 2**32)) for key in key_n[bad[:3]].tolist())
        raise CorruptArtifactError(
            f"{store.table} lacks {missing} of {len(responses)} responses, and {len(bad) - missing} have a "
            f"log-probability that is not finite (first: {shown}); remove the folder to compute it anew"
        )
    return logp
