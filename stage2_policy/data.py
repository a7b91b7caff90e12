"""The training set: sampled token ids joined with tilted weights by key, and the prompts that are held out.

The join is made once and kept in files that every process maps: of the numbers and token ids of millions of responses
a process holds what it reads. Neither this nor the order of training (:mod:`stage2_policy.step_sampler`) needs torch,
so that a run can be planned where none is.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.contracts.artifacts import Manifest, checkpoint_sha256, read_json, read_manifest, verify_artifact
from pipeline.contracts.errors import CorruptArtifactError, InputError, StaleArtifactError, writing_failure
from pipeline.contracts.keys import PromptPlaces, row_keys
from pipeline.contracts.shards import count_parquet
from pipeline.contracts.solution import Solution
from stage2_policy.joining import CopiedTokens, JoinedRows, copy_tokens, join_weights, read_columns, require_room
from stage2_policy.mapped_files import MappedFolder, map_columns, map_token_lists, write_columns
from stage2_policy.token_sequences import TokenSequences

PartName = Literal["train", "held_out"]

_WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class TrainingResponses:
    """Scored responses of some prompts, sorted by prompt.

    Of pairs of a data set, every pair stands for itself, and "prompt" means pair: see :func:`split_pairs`.

    Attributes:
        prompt_ids: the prompts, in order; of pairs the prompt of each, so that one may come several times.
        prompt_p: place of each row's prompt in ``prompt_ids``, ascending, shape (n,).
        sample_index: number of each row's response among those of its prompt, shape (n,).
        sequences: prompt and completion token ids of each row, as sampled, read when they are asked for.
        weight: tilted weight of each row, sums to 1 within a prompt, shape (n,).
        tilt: r + <lam*, g - b> of each row, reward units, shape (n,).
        sampler_logp: log pi_ref by the sampler's arithmetic, nats, shape (n,).
    """

    prompt_ids: tuple[str, ...]
    prompt_p: np.ndarray
    sample_index: np.ndarray
    sequences: TokenSequences
    weight: np.ndarray
    tilt: np.ndarray
    sampler_logp: np.ndarray

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.sequences)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and completion, shape (n,)."""
        return self.sequences.lengths

    @cached_property
    def n_responses_p(self) -> np.ndarray:
        """How many responses each prompt has, shape (p,)."""
        return np.bincount(self.prompt_p, minlength=len(self.prompt_ids))

    @property
    def n_samples(self) -> np.ndarray:
        """How many responses the prompt of each row has, shape (n,)."""
        return np.asarray(self.n_responses_p[self.prompt_p])

    def keys(self, prompts: PromptPlaces) -> np.ndarray:
        """Key of each row as a number (:func:`pipeline.contracts.keys.row_keys`), shape (n,).

        Args:
            prompts: the places that the prompts' numbers are; all of ours are among them.
        """
        place_p = prompts.of(pa.chunked_array([pa.array(self.prompt_ids, pa.string())]))
        return row_keys(place_p[self.prompt_p], self.sample_index)

    def select(self, prompts: Sequence[int]) -> TrainingResponses:
        """The responses of some prompts, given by their places."""
        return self.select_rows(np.flatnonzero(np.isin(self.prompt_p, prompts)))

    def select_rows(self, rows: np.ndarray) -> TrainingResponses:
        """Some of the responses, given by their numbers, ascending; weights stay as they are."""
        places, prompt_p = np.unique(self.prompt_p[rows], return_inverse=True)
        return TrainingResponses(
            prompt_ids=tuple(self.prompt_ids[place] for place in places),
            prompt_p=prompt_p,
            sample_index=self.sample_index[rows],
            sequences=self.sequences.select(rows),
            weight=self.weight[rows],
            tilt=self.tilt[rows],
            sampler_logp=self.sampler_logp[rows],
        )


def split_pairs(responses: TrainingResponses, *, beta: float) -> TrainingResponses:
    """Pairs of responses, each for itself: compared with no other of its prompt, and all pairs count the same.

    Args:
        responses: of which 2i and 2i + 1 are pair i of their prompt.
        beta: KL strength, reward per nat; the weights then sum to 1 within a pair.

    Raises:
        InputError: a response without its partner.
    """
    n_pairs = int(responses.sample_index.max(initial=0)) // 2 + 1
    key, pair_n, count = np.unique(
        responses.prompt_p * n_pairs + responses.sample_index // 2, return_inverse=True, return_counts=True
    )
    if (count != 2).any():
        alone = key[count != 2]
        raise InputError(
            f"{len(alone)} pairs have one response (first: pair {alone[0] % n_pairs} of prompt "
            f"{responses.prompt_ids[alone[0] // n_pairs]}); a pair is the responses 2i and 2i + 1 of a prompt"
        )
    return replace(
        responses,
        prompt_ids=tuple(responses.prompt_ids[place] for place in key // n_pairs),
        prompt_p=pair_n,
        weight=segment_softmax(responses.tilt / beta, pair_n),
    )


@dataclass(frozen=True)
class Skipped:
    """What was left out of training for its negligible weight.

    Attributes:
        n_responses: how many responses.
        mass_mean: tilted weight of them, mean over prompts.
        mass_max: the largest of any prompt.
    """

    n_responses: int
    mass_mean: float
    mass_max: float


def skip_negligible(responses: TrainingResponses, *, mass: float) -> tuple[TrainingResponses, Skipped]:
    """Leave out the responses of least weight, up to a total weight of ``mass`` in each prompt.

    The weights that remain are scaled to sum to 1 again: the tilted policy given that one of them is drawn, which is
    within ``mass`` of the whole one in total variation.

    Args:
        responses: with all the responses of each prompt.
        mass: share of the tilted weight that may be lost in any prompt, 0 to below 1; 0 skips nothing.
    """
    order = np.lexsort((responses.weight, responses.prompt_p))
    cumulative = np.cumsum(responses.weight[order])
    first = np.flatnonzero(np.diff(responses.prompt_p, prepend=-1))
    before = np.append(0.0, cumulative)[first]
    skipped = np.zeros(len(responses), dtype=bool)
    skipped[order] = cumulative - before[responses.prompt_p] <= mass
    skipped &= mass > 0
    lost_p = np.bincount(responses.prompt_p, weights=responses.weight * skipped)
    kept = responses.select_rows(np.flatnonzero(~skipped))
    kept = replace(kept, weight=kept.weight / (1.0 - lost_p)[kept.prompt_p])
    return kept, Skipped(int(skipped.sum()), float(lost_p.mean()), float(lost_p.max()))


@dataclass(frozen=True)
class TrainingData:
    """What one training run reads.

    Attributes:
        train: responses trained on.
        held_out: responses of the prompts kept back for the choice of the checkpoint.
        solution: lambda* and beta.
        dual: the content of dual.json, for what it says about the solution.
        identities: identity of each artifact read, by name.
        tilted: folder of the tilted table that has the responses of each part, ``train`` and ``held_out``.
        n_held_out_pairs: pairs of a data set that are not trained on, because their prompt is held out.
    """

    train: TrainingResponses
    held_out: TrainingResponses
    solution: Solution
    dual: Mapping[str, Any]
    identities: Mapping[str, str]
    tilted: Mapping[PartName, Path]
    n_held_out_pairs: int = 0

    @property
    def beta(self) -> float:
        """KL strength, reward per nat."""
        return self.solution.beta

    @property
    def nats(self) -> np.ndarray:
        """Of s a unit of each of :meth:`columns`, of which s is the sum up to a constant, shape (1 + m,)."""
        return np.append(1.0, self.solution.multipliers_m) / self.beta

    def columns(self, part: PartName, rows: np.ndarray) -> np.ndarray:
        """The reward and each constraint's column, turned so that more is better, of some responses, shape (n, 1 + m).

        Args:
            part: that the responses are of.
            rows: which of them, ascending, shape (n,).

        Raises:
            CorruptArtifactError: a file of the tilted table is damaged.
        """
        responses: TrainingResponses = getattr(self, part).select_rows(rows)
        prompts = PromptPlaces(tuple(dict.fromkeys(responses.prompt_ids)))
        return read_columns(self.tilted[part], solution=self.solution, prompts=prompts, key_n=responses.keys(prompts))


def read_training_data(
    *,
    reference: Path,
    samples: Path,
    tilted: Path,
    dual: Path,
    held_out_fraction: float,
    pairs: Path | None = None,
    mapped: Path | None = None,
) -> TrainingData:
    """Read and join the artifacts of stage 1, train split only.

    The tables are checked and joined by the first process that asks; it writes what training reads to files, which
    this and every other process map. Files of an earlier call that read the same are taken as they are.

    Args:
        reference: folder of the reference checkpoint.
        samples: folder of the samples table.
        tilted: folder of the tilted table.
        dual: folder of dual.json.
        held_out_fraction: share of the train prompts kept back, chosen by the hash of the prompt.
        pairs: holds the tables ``samples`` and ``tilted`` of the pairs of a data set to train on; what is held out
            are still the reference's own responses.
        mapped: folder of the mapped files, which whoever calls removes at the end; a temporary one, gone when nobody
            maps it any more, where not given.

    Raises:
        CorruptArtifactError: a file is missing, damaged or not what its manifest says.
        StaleArtifactError: the artifacts were not made from each other or from this reference.
        InputError: weights that are missing or extra or do not fit lam* and beta, too few prompts, held-out prompts
            whose responses have equal scores, or a disk without room for the mapped files.
    """
    folders = {"samples": samples, "tilted": tilted, "dual": dual}
    if pairs is not None:
        folders |= {"pairs/samples": pairs / "samples", "pairs/tilted": pairs / "tilted"}
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    _require_chain(manifests, folders, reference=reference)
    verify_artifact(dual)
    document = read_json(dual / "dual.json")
    solution = Solution.from_document(document, source=dual / "dual.json")
    identities = {name: manifest.identity for name, manifest in manifests.items()}
    with nullcontext(mapped) if mapped is not None else tempfile.TemporaryDirectory() as folder:
        files = MappedFolder(Path(folder), {**identities, "held_out_fraction": held_out_fraction})
        with files.lock():
            if not files.is_whole():
                files.clear()
                for table in folders.values():
                    verify_artifact(table)
                with _full_disks_named(files.folder):
                    _write_mapped(files.folder, folders, solution, held_out_fraction=held_out_fraction)
                    files.seal()
        train, held_out = (_map_responses(files.folder, part) for part in _PARTS)
    if np.allclose(held_out.weight * held_out.n_samples, 1.0, rtol=0.0, atol=1e-9):
        raise InputError(
            f"training setting `held_out_fraction` is {held_out_fraction}: the responses to each of the "
            f"{len(held_out.prompt_ids)} held-out prompts have equal scores, by which no checkpoint can be chosen; "
            "hold out more prompts, or sample more responses"
        )
    n_held_out_pairs = 0
    if pairs is not None:
        paths = folders["pairs/tilted"].glob("data/train-*.parquet")
        n_held_out_pairs = (sum(count_parquet(path, ())[0] for path in paths) - len(train)) // 2
        train = split_pairs(train, beta=solution.beta)
    return TrainingData(
        train=train,
        held_out=held_out,
        solution=solution,
        dual=document,
        identities={"reference": manifests["samples"].inputs["reference"], **identities},
        tilted={"train": tilted if pairs is None else pairs / "tilted", "held_out": tilted},
        n_held_out_pairs=n_held_out_pairs,
    )


@contextmanager
def _full_disks_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        failure = writing_failure(error, place=folder)
        if failure is None:
            raise
        raise failure from error


_PARTS: tuple[PartName, ...] = ("train", "held_out")
_NUMBERS = ("sample_index", "weight", "tilt", "sampler_logp")
_PLACES = ("prompt_n", "completion_n", "prompt_length_n", "completion_length_n")


@dataclass(frozen=True, eq=False)
class _Part:
    """What becomes one of the parts: some of the rows of a join."""

    rows: JoinedRows
    chosen_n: np.ndarray
    table: str


def _write_mapped(folder: Path, tables: Mapping[str, Path], solution: Solution, *, held_out_fraction: float) -> None:
    """Join the tables, and write what is trained on and what is held out to files."""
    rows = join_weights(
        samples=tables["samples"], tilted=tables["tilted"], solution=solution, solved_on=solution.n_samples
    )
    _require_weights(rows, beta=solution.beta, tilted=tables["tilted"])
    held_out = choose_held_out(rows.prompt_ids, fraction=held_out_fraction)
    is_held_out_n = np.isin(rows.prompt_p, held_out)
    parts = {"train": _Part(rows, ~is_held_out_n, "samples"), "held_out": _Part(rows, is_held_out_n, "samples")}
    if "pairs/samples" in tables:
        parts["train"] = _apart(tables, solution, {rows.prompt_ids[place] for place in held_out})
    copied = {}
    for table in dict.fromkeys(part.table for part in parts.values()):
        own = [part for part in parts.values() if part.table == table]
        wanted_n = np.zeros(own[0].rows.n_samples, dtype=bool)
        for part in own:
            wanted_n[part.rows.source_n[part.chosen_n]] = True
        n_prompts = sum(len(np.unique(part.rows.prompt_p[part.chosen_n])) for part in own)
        require_room(folder, tables[table], wanted_n, n_prompts=n_prompts)
        prefix = table.replace("/", "-")
        copied[table] = copy_tokens(
            tables[table],
            wanted_n,
            prompts=folder / f"{prefix}-prompts.arrow",
            completions=folder / f"{prefix}-completions.arrow",
        )
    for name, part in parts.items():
        _write_part(folder, name, part, copied[part.table])


def _apart(tables: Mapping[str, Path], solution: Solution, judging: Set[str]) -> _Part:
    """The pairs whose prompt is not held out."""
    rows = join_weights(samples=tables["pairs/samples"], tilted=tables["pairs/tilted"], solution=solution)
    _require_weights(rows, beta=solution.beta, tilted=tables["pairs/tilted"])
    apart_p = np.array([name not in judging for name in rows.prompt_ids])
    if not apart_p.any():
        raise InputError(
            f"all {len(rows.weight) // 2} pairs in {tables['pairs/samples'].parent} are of held-out prompts; none is "
            "left to train on"
        )
    return _Part(rows, apart_p[rows.prompt_p], "pairs/samples")


def _write_part(folder: Path, name: str, part: _Part, copied: CopiedTokens) -> None:
    rows, chosen = part.rows, part.chosen_n
    kept, prompt_p = np.unique(rows.prompt_p[chosen], return_inverse=True)
    source_n = rows.source_n[chosen]
    write_columns(
        folder / f"{name}.arrow",
        {
            "prompt_p": prompt_p,
            **{column: getattr(rows, column)[chosen] for column in _NUMBERS},
            **{column: getattr(copied, column)[source_n] for column in _PLACES},
        },
    )
    ids = pa.array([rows.prompt_ids[place] for place in kept], pa.string())
    write_columns(folder / f"{name}-{part.table.replace('/', '-')}.arrow", {"prompt_ids": ids})


def _map_responses(folder: Path, name: str) -> TrainingResponses:
    """A part of what was written, mapped."""
    columns = {column: values.to_numpy() for column, values in map_columns(folder / f"{name}.arrow").items()}
    (about,) = folder.glob(f"{name}-*.arrow")
    prefix = about.stem.removeprefix(f"{name}-")
    return TrainingResponses(
        prompt_ids=tuple(map_columns(about)["prompt_ids"].to_pylist()),
        prompt_p=columns["prompt_p"],
        **{column: columns[column] for column in _NUMBERS},
        sequences=TokenSequences(
            prompts=map_token_lists(folder / f"{prefix}-prompts.arrow"),
            completions=map_token_lists(folder / f"{prefix}-completions.arrow"),
            **{column: columns[column] for column in _PLACES},
        ),
    )


def count_held_out(n_prompts: int, *, fraction: float) -> int:
    """How many of the train prompts are held out: about ``fraction`` of them, at least one and not all.

    Raises:
        InputError: fewer than two prompts.
    """
    if n_prompts < 2:
        raise InputError(f"{n_prompts} train prompts: training needs at least 2, one of them held out")
    return min(max(1, round(fraction * n_prompts)), n_prompts - 1)


def choose_held_out(prompt_ids: Sequence[str], *, fraction: float) -> list[int]:
    """Places of the prompts with the smallest hashes, as many as :func:`count_held_out` says, ascending.

    Raises:
        InputError: fewer than two prompts.
    """
    count = count_held_out(len(prompt_ids), fraction=fraction)
    # Hashed again: other choices, such as the test split, may already read the digits of the id itself.
    order = sorted(
        range(len(prompt_ids)), key=lambda place: hashlib.sha256(f"held-out {prompt_ids[place]}".encode()).digest()
    )
    return sorted(order[:count])


def _require_chain(manifests: Mapping[str, Manifest], folders: Mapping[str, Path], *, reference: Path) -> None:
    if not reference.is_dir():
        raise InputError(f"the reference checkpoint {reference} is not a folder")
    places = {**folders, "reference": reference}
    identities = {name: manifest.identity for name, manifest in manifests.items()}
    identities["reference"] = checkpoint_sha256(reference)
    links = (
        ("tilted", "dual"),
        ("tilted", "samples"),
        ("dual", "samples"),
        ("samples", "reference"),
        ("pairs/tilted", "dual"),
        ("pairs/tilted", "pairs/samples"),
        ("pairs/samples", "reference"),
    )
    for name, input_name in links:
        if name not in manifests:
            continue
        recorded, found = manifests[name].inputs.get(input_name), identities[input_name]
        if recorded is None:
            raise CorruptArtifactError(f"{places[name]}/manifest.json does not record its input `{input_name}`")
        if recorded != found:
            raise StaleArtifactError(
                f"{places[name]} was made from another `{input_name}` than {places[input_name]}: "
                f"{recorded[:12]} then, {found[:12]} now; redo the steps from `{input_name}` on"
            )


def _require_weights(responses: JoinedRows, *, beta: float, tilted: Path) -> None:
    """The weights must be those of this lam* and beta: w_pk proportional to exp(tilt / beta), summing to one."""
    expected = segment_softmax(responses.tilt / beta, responses.prompt_p)
    error = np.abs(responses.weight - expected)
    worst = int(np.argmax(error))
    if not error[worst] <= _WEIGHT_TOLERANCE:  # catches NaN too
        prompt = responses.prompt_ids[responses.prompt_p[worst]]
        raise InputError(
            f"the weights in {tilted} are not those of dual.json: prompt {prompt} "
            f"has a response of weight {responses.weight[worst]:.6g} where lam* and beta give {expected[worst]:.6g}"
        )


def segment_softmax(values: np.ndarray, prompt_p: np.ndarray) -> np.ndarray:
    """Softmax within each prompt; rows sorted by prompt, shape (n,)."""
    starts = np.flatnonzero(np.diff(prompt_p, prepend=-1))
    shifted = np.exp(values - np.maximum.reduceat(values, starts)[prompt_p])
    return np.asarray(shifted / np.add.reduceat(shifted, starts)[prompt_p])


def less_means(values: np.ndarray, prompt_p: np.ndarray) -> np.ndarray:
    """Values less the mean of each row's prompt, shape and dtype as given; rows sorted by prompt, shape (n, ...)."""
    starts = np.flatnonzero(np.diff(prompt_p, prepend=-1))
    counts = np.diff(starts, append=len(prompt_p)).reshape(-1, *[1] * (values.ndim - 1))
    means = np.add.reduceat(values, starts, axis=0) / counts.astype(values.dtype)
    return np.asarray(values - np.repeat(means, counts.ravel(), axis=0))
