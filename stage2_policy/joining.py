"""Samples joined with their tilted weights by key, as numbers: no object for a response, no text of one is read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.contracts.errors import InputError
from pipeline.contracts.keys import PromptPlaces, find_keys, row_keys
from pipeline.contracts.shards import ShardedTable, count_parquet, iterate_parquet
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SAMPLE_KEY, SAMPLES, TOKEN_IDS
from stage2_policy.mapped_files import TokenListWriter


@dataclass(frozen=True, eq=False)
class JoinedRows:
    """The samples that have a weight, sorted by prompt and ``sample_index``.

    Attributes:
        prompt_ids: the prompts that have rows, sorted.
        prompt_p: place of each row's prompt among them, ascending, shape (n,).
        sample_index: shape (n,).
        weight: shape (n,).
        tilt: r + <lam*, g - b>, reward units, shape (n,).
        sampler_logp: nats, shape (n,).
        source_n: number of each row in the samples table, read file by file, shape (n,).
        n_samples: rows of that table.
    """

    prompt_ids: tuple[str, ...]
    prompt_p: np.ndarray
    sample_index: np.ndarray
    weight: np.ndarray
    tilt: np.ndarray
    sampler_logp: np.ndarray
    source_n: np.ndarray
    n_samples: int


@dataclass(frozen=True, eq=False)
class CopiedTokens:
    """Where the token ids of the rows of a samples table were copied to.

    Attributes:
        prompt_n: which list of prompts each row of the table has, shape (rows of the table,); -1 for rows not copied.
        completion_n: which list of completions.
        prompt_length_n: tokens of the prompt.
        completion_length_n: tokens of the completion.
    """

    prompt_n: np.ndarray
    completion_n: np.ndarray
    prompt_length_n: np.ndarray
    completion_length_n: np.ndarray


def samples_table(folder: Path) -> ShardedTable:
    """The samples table of a folder, to be read."""
    return ShardedTable(folder=folder, schema=SAMPLES, metadata={})


def join_weights(*, samples: Path, tilted: Path, solution: Solution, solved_on: int | None = None) -> JoinedRows:
    """Join the train samples with the tilted table.

    Args:
        samples: folder of the samples table.
        tilted: folder of the tilted table.
        solution: whose constraints the tilted table has.
        solved_on: how many weights there must be; any number where not given.

    Raises:
        InputError: keys that repeat, weights without a sample, or another number of weights.
        CorruptArtifactError: a file is damaged.
    """
    table = samples_table(samples)
    prompts = PromptPlaces(table.prompt_ids("train"))
    key_n, sampler_logp_n = _sample_keys(table, prompts)
    order = np.argsort(key_n, kind="stable")
    _require_unique(key_n[order], prompts, what=f"the samples in {samples}")
    weighted = _read_weights(tilted, prompts, solution)
    _require_unique(weighted.key_n, prompts, what=f"the tilted table in {tilted}")
    place_n = find_keys(key_n[order], weighted.key_n)
    extra = [*_keys_of(weighted.key_n[place_n < 0], prompts), *weighted.of_other_prompts]
    if extra:
        raise InputError(
            f"the tilted table in {tilted} does not fit the samples in {samples}: {len(extra)} weights have no sample "
            f"(first: {min(extra)}); each needs exactly one"
        )
    # Samples without a weight are those that the dual was solved without: no score, or cut off and dropped.
    if solved_on is not None and len(place_n) != solved_on:
        raise InputError(
            f"the tilted table in {tilted} has {len(place_n)} train rows, but dual.json was solved on "
            f"{solved_on} responses; each of them needs exactly one weight"
        )
    kept, prompt_p = np.unique(weighted.key_n // 2**32, return_inverse=True)
    ids = prompts.ids
    source_n = order[place_n]
    return JoinedRows(
        prompt_ids=tuple(ids[place] for place in kept),
        prompt_p=prompt_p,
        sample_index=weighted.key_n % 2**32,
        weight=weighted.weight_n,
        tilt=weighted.tilt_n,
        sampler_logp=sampler_logp_n[source_n],
        source_n=source_n,
        n_samples=len(key_n),
    )


def read_columns(tilted: Path, *, solution: Solution, prompts: PromptPlaces, key_n: np.ndarray) -> np.ndarray:
    """The reward and what each multiplier multiplies, of some rows of the train split, shape (n, 1 + m).

    Args:
        tilted: folder of the tilted table.
        solution: whose constraints it has; their columns are turned by its ``signs_m``, so that more is better.
        prompts: of the rows.
        key_n: of the rows (:func:`pipeline.contracts.keys.row_keys`), shape (n,); all are in the table.

    Raises:
        CorruptArtifactError: a file is damaged.
    """
    names = ["reward", *(CONSTRAINT_PREFIX + name for name in solution.names)]
    keys, values = [np.empty(0, np.int64)], [np.empty((0, len(names)))]
    for group, key_of_row, known in _tilted_groups(_tilted_files(tilted), names, prompts, solution):
        keys.append(key_of_row[known])
        values.append(np.column_stack([group[name].to_numpy()[known] for name in names]))
    found_n = np.concatenate(keys)
    order = np.argsort(found_n)
    rows = order[find_keys(found_n[order], key_n)]
    return np.asarray(np.concatenate(values)[rows] * np.append(1.0, solution.signs_m))


def copy_tokens(samples: Path, wanted_n: np.ndarray, *, prompts: Path, completions: Path) -> CopiedTokens:
    """Copy the token ids of some train samples into files that can be mapped, a row group in memory at a time.

    A prompt that follows itself is written once for all its responses.

    Args:
        samples: folder of the samples table.
        wanted_n: which of its rows, shape (rows of the table,).
        prompts: file that the prompts are written to.
        completions: file that the completions are written to.

    Raises:
        CorruptArtifactError: a file is damaged.
    """
    prompt_n, completion_n = np.full(len(wanted_n), -1), np.full(len(wanted_n), -1)
    lengths = np.zeros((2, len(wanted_n)), dtype=np.int32)
    start = 0
    with TokenListWriter(prompts) as prompt_writer, TokenListWriter(completions) as completion_writer:
        for path in samples_table(samples).paths("train"):
            for group in iterate_parquet(path, columns=TOKEN_IDS, schema=SAMPLES):
                rows = start + np.flatnonzero(wanted_n[start : start + group.num_rows])
                group_rows, start = rows - start, start + group.num_rows
                asked, done = (_lists(group[name], group_rows) for name in TOKEN_IDS)
                lengths[:, rows] = [np.diff(lists.offsets.to_numpy()) for lists in (asked, done)]
                new = ~_follows_itself(asked)
                prompt_n[rows] = prompt_writer.n_lists + np.cumsum(new) - 1
                completion_n[rows] = completion_writer.n_lists + np.arange(len(rows))
                prompt_writer.write(asked.take(pa.array(np.flatnonzero(new))))
                completion_writer.write(done)
    return CopiedTokens(prompt_n, completion_n, *lengths)


def require_room(folder: Path, samples: Path, wanted_n: np.ndarray, *, n_prompts: int) -> None:
    """Check that what :func:`copy_tokens` writes, and the columns beside it, fit on the disk before it is written.

    Args:
        folder: that will hold the files; it must exist.
        samples: folder of the samples table.
        wanted_n: which of its rows are copied, shape (rows of the table,).
        n_prompts: that these rows have.

    Raises:
        InputError: it does not.
    """
    values = np.array([count_parquet(path, TOKEN_IDS)[1] for path in samples_table(samples).paths("train")])
    prompt, completion = values.sum(axis=0) / max(1, len(wanted_n))
    rows = int(np.count_nonzero(wanted_n))
    need = 4 * (rows * completion + n_prompts * prompt) + _BYTES_OF_A_ROW * rows
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"training maps its responses from files in {folder}, which take about {need / 1e9:.1f} GB until it is "
            f"done, and {free / 1e9:.1f} GB are free there; make room, or put the run on another disk (`--data-dir`)"
        )


_BYTES_OF_A_ROW = 72
"""Seven columns of 8 bytes, two of 4, and the offsets of two lists."""


@dataclass(frozen=True, eq=False)
class _Weights:
    """The tilted table as numbers, sorted by key, and the keys of its rows of prompts that have no sample."""

    key_n: np.ndarray
    weight_n: np.ndarray
    tilt_n: np.ndarray
    of_other_prompts: list[tuple[str, int]]


def _sample_keys(table: ShardedTable, prompts: PromptPlaces) -> tuple[np.ndarray, np.ndarray]:
    keys, logp = [np.empty(0, np.int64)], [np.empty(0)]
    for path in table.paths("train"):
        keys.append(row_keys(*table.keys(path, prompts)))
        groups = iterate_parquet(path, columns=["sampler_logp"], schema=SAMPLES)
        logp += [group["sampler_logp"].to_numpy() for group in groups]
    return np.concatenate(keys), np.concatenate(logp)


def _read_weights(folder: Path, prompts: PromptPlaces, solution: Solution) -> _Weights:
    columns = ["reward", *(CONSTRAINT_PREFIX + name for name in solution.names), "weight"]
    paths = _tilted_files(folder)
    if not paths:
        raise InputError(f"the tilted table in {folder} has no train split")
    keys, weights, tilts = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
    strangers: list[tuple[str, int]] = []
    for group, key_of_row, known in _tilted_groups(paths, columns, prompts, solution):
        if not known.all():
            other = group.filter(pa.array(~known))
            strangers += zip(*(other[name].to_pylist() for name in SAMPLE_KEY), strict=True)
        keys.append(key_of_row[known])
        weights.append(group["weight"].to_numpy()[known])
        tilts.append(solution.tilt(group)[known])
    key_n = np.concatenate(keys)
    order = np.argsort(key_n, kind="stable")
    return _Weights(key_n[order], np.concatenate(weights)[order], np.concatenate(tilts)[order], strangers)


def _tilted_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("data/train-*.parquet"))


def _tilted_groups(
    paths: Sequence[Path], columns: Sequence[str], prompts: PromptPlaces, solution: Solution
) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """The row groups of a tilted table, with the key of each row and whether its prompt is among these."""
    for path in paths:
        groups = iterate_parquet(
            path, columns=[*SAMPLE_KEY, *columns], schema=solution.tilted_schema, as_dictionary=["prompt_id"]
        )
        for group in groups:
            place_n = prompts.of(group["prompt_id"])
            yield group, row_keys(place_n, group["sample_index"].to_numpy()), place_n >= 0


def _require_unique(sorted_n: np.ndarray, prompts: PromptPlaces, *, what: str) -> None:
    repeated = sorted_n[1:][np.diff(sorted_n) == 0]
    if len(repeated):
        shown = ", ".join(map(str, _keys_of(repeated[:3], prompts)))
        raise InputError(f"{what}: {len(repeated)} repeated (first: {shown}); each may occur once")


def _keys_of(key_n: np.ndarray, prompts: PromptPlaces) -> list[tuple[str, int]]:
    """Prompt ids and sample indices of numbers, for a message."""
    ids = prompts.ids
    return [(ids[key // 2**32], key % 2**32) for key in key_n.tolist()]


def _lists(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ListArray:
    """Some of the lists of a row group, in one piece."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = pa.concat_arrays(whole.chunks)
    return whole if len(rows) == len(whole) and whole.offset == 0 else whole.take(pa.array(rows))


def _follows_itself(lists: pa.ListArray) -> np.ndarray:
    """Whether each list is the one before it, shape (n,)."""
    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    length = np.diff(offsets)
    same = np.zeros(len(length), dtype=bool)
    same[1:] = length[1:] == length[:-1]
    row_of_value = np.repeat(np.arange(len(length)), length)
    values = values[offsets[0] : offsets[-1]]
    place = np.flatnonzero(same[row_of_value])
    differs = values[place] != values[place - length[row_of_value[place]]]
    same[row_of_value[place[differs]]] = False
    return same
