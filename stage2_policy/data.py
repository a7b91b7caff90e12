"""The training set: sampled token ids joined with tilted weights by key, and the prompts that are held out.

Neither this nor the order of training (:mod:`stage2_policy.step_sampler`) needs torch, so that a run can be planned
where none is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.artifacts import Manifest, checkpoint_sha256, read_json, read_manifest, verify_artifact
from pipeline.contracts.errors import CorruptArtifactError, InputError, StaleArtifactError
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SAMPLE_KEY, SAMPLES, require_unique, tilted_schema

_WEIGHT_TOLERANCE = 1e-6
_SAMPLE_COLUMNS = (*SAMPLE_KEY, "prompt_token_ids", "completion_token_ids", "sampler_logp")


@dataclass(frozen=True)
class TrainingResponses:
    """Scored responses of some prompts, sorted by prompt.

    Of pairs of a data set, every pair stands for itself, and "prompt" means pair: see :func:`split_pairs`.

    Attributes:
        prompt_ids: the prompts, in order; of pairs the prompt of each, so that one may come several times.
        prompt_p: place of each row's prompt in ``prompt_ids``, ascending, shape (n,).
        sample_index: number of each row's response among those of its prompt, shape (n,).
        sequences: prompt and completion token ids of each row, as sampled.
        weight: tilted weight of each row, sums to 1 within a prompt, shape (n,).
        tilt: r + <lam*, g - b> of each row, reward units, shape (n,).
        sampler_logp: log pi_ref by the sampler's arithmetic, nats, shape (n,).
    """

    prompt_ids: tuple[str, ...]
    prompt_p: np.ndarray
    sample_index: np.ndarray
    sequences: Sequence[tuple[np.ndarray, np.ndarray]]
    weight: np.ndarray
    tilt: np.ndarray
    sampler_logp: np.ndarray

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.sequences)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and completion, shape (n,)."""
        return np.array([len(prompt) + len(done) for prompt, done in self.sequences], dtype=np.int64)

    @property
    def n_samples(self) -> np.ndarray:
        """How many responses the prompt of each row has, shape (n,)."""
        return np.asarray(np.bincount(self.prompt_p)[self.prompt_p])

    def row_keys(self) -> list[tuple[str, int]]:
        """Key (prompt_id, sample_index) of each row."""
        return [(self.prompt_ids[place], int(k)) for place, k in zip(self.prompt_p, self.sample_index, strict=True)]

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
            sequences=[self.sequences[row] for row in rows],
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
        n_held_out_pairs: pairs of a data set that are not trained on, because their prompt is held out.
    """

    train: TrainingResponses
    held_out: TrainingResponses
    solution: Solution
    dual: Mapping[str, Any]
    identities: Mapping[str, str]
    n_held_out_pairs: int = 0

    @property
    def beta(self) -> float:
        """KL strength, reward per nat."""
        return self.solution.beta


def read_training_data(
    *, reference: Path, samples: Path, tilted: Path, dual: Path, held_out_fraction: float, pairs: Path | None = None
) -> TrainingData:
    """Read and join the artifacts of stage 1, train split only.

    Args:
        reference: folder of the reference checkpoint.
        samples: folder of the samples table.
        tilted: folder of the tilted table.
        dual: folder of dual.json.
        held_out_fraction: share of the train prompts kept back, chosen by the hash of the prompt.
        pairs: holds the tables ``samples`` and ``tilted`` of the pairs of a data set to train on; what is held out
            are still the reference's own responses.

    Raises:
        CorruptArtifactError: a file is missing, damaged or not what its manifest says.
        StaleArtifactError: the artifacts were not made from each other or from this reference.
        InputError: weights that are missing or extra or do not fit lam* and beta, too few prompts, or held-out prompts
            whose responses have equal scores.
    """
    folders = {"samples": samples, "tilted": tilted, "dual": dual}
    if pairs is not None:
        folders |= {"pairs/samples": pairs / "samples", "pairs/tilted": pairs / "tilted"}
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    _require_chain(manifests, folders, reference=reference)
    for folder in folders.values():
        verify_artifact(folder)
    document = read_json(dual / "dual.json")
    solution = Solution.from_document(document, source=dual / "dual.json")
    responses = _join(samples=samples, tilted=tilted, solution=solution, solved_on=solution.n_samples)
    held_out = choose_held_out(responses.prompt_ids, fraction=held_out_fraction)
    kept = sorted(set(range(len(responses.prompt_ids))) - set(held_out))
    held_out_responses = responses.select(held_out)
    if np.allclose(held_out_responses.weight * held_out_responses.n_samples, 1.0, rtol=0.0, atol=1e-9):
        raise InputError(
            f"training setting `held_out_fraction` is {held_out_fraction}: the responses to each of the "
            f"{len(held_out)} held-out prompts have equal scores, by which no checkpoint can be chosen; hold out more "
            "prompts, or sample more responses"
        )
    train, n_held_out_pairs = responses.select(kept), 0
    if pairs is not None:
        train, n_held_out_pairs = _read_pairs(pairs, solution, held_out=held_out_responses.prompt_ids)
    return TrainingData(
        train=train,
        held_out=held_out_responses,
        solution=solution,
        dual=document,
        identities={
            "reference": manifests["samples"].inputs["reference"],
            **{name: manifest.identity for name, manifest in manifests.items()},
        },
        n_held_out_pairs=n_held_out_pairs,
    )


def _read_pairs(folder: Path, solution: Solution, *, held_out: Sequence[str]) -> tuple[TrainingResponses, int]:
    """The pairs to train on, and the number of those whose prompt is held out."""
    responses = _join(samples=folder / "samples", tilted=folder / "tilted", solution=solution)
    judging = set(held_out)
    kept = responses.select([place for place, name in enumerate(responses.prompt_ids) if name not in judging])
    if len(kept) == 0:
        raise InputError(
            f"all {len(responses) // 2} pairs in {folder} are of held-out prompts; none is left to train on"
        )
    return split_pairs(kept, beta=solution.beta), (len(responses) - len(kept)) // 2


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


def _join(*, samples: Path, tilted: Path, solution: Solution, solved_on: int | None = None) -> TrainingResponses:
    drawn = ShardedTable(folder=samples, schema=SAMPLES, metadata={}).read("train", columns=_SAMPLE_COLUMNS)
    weighted = _read_tilted(tilted, constraint_names=solution.names)
    drawn_keys, weighted_keys = _keys(drawn), _keys(weighted)
    require_unique(drawn_keys, what=f"the samples in {samples}")
    require_unique(weighted_keys, what=f"the tilted table in {tilted}")
    place = {key: row for row, key in enumerate(weighted_keys)}
    extra = place.keys() - set(drawn_keys)
    if extra:
        raise InputError(
            f"the tilted table in {tilted} does not fit the samples in {samples}: {len(extra)} weights have no sample "
            f"(first: {min(extra)}); each needs exactly one"
        )
    # Samples without a weight are those that the dual was solved without: no score, or cut off and dropped.
    if solved_on is not None and len(weighted_keys) != solved_on:
        raise InputError(
            f"the tilted table in {tilted} has {len(weighted_keys)} train rows, but dual.json was solved on "
            f"{solved_on} responses; each of them needs exactly one weight"
        )
    drawn = drawn.filter(pa.array([key in place for key in drawn_keys], pa.bool_()))
    drawn_keys = [key for key in drawn_keys if key in place]
    prompt_ids, prompt_p = np.unique([prompt for prompt, _ in drawn_keys], return_inverse=True)
    order = np.lexsort((np.array([index for _, index in drawn_keys]), prompt_p))
    joined = np.array([place[drawn_keys[row]] for row in order])
    weight = weighted["weight"].to_numpy()[joined]
    tilt = solution.tilt(weighted)[joined]
    sample_index = np.array([index for _, index in drawn_keys])[order]
    responses = TrainingResponses(
        prompt_ids=tuple(str(prompt) for prompt in prompt_ids),
        prompt_p=prompt_p[order],
        sample_index=sample_index,
        sequences=_sequences(drawn, order),
        weight=weight,
        tilt=tilt,
        sampler_logp=drawn["sampler_logp"].to_numpy()[order],
    )
    _require_weights(responses, beta=solution.beta, tilted=tilted)
    return responses


def _read_tilted(folder: Path, *, constraint_names: Sequence[str]) -> pa.Table:
    columns = [*SAMPLE_KEY, "reward", *(CONSTRAINT_PREFIX + name for name in constraint_names), "weight"]
    paths = sorted(folder.glob("data/train-*.parquet"))
    if not paths:
        raise InputError(f"the tilted table in {folder} has no train split")
    return pa.concat_tables(
        [read_parquet(path, columns=columns, schema=tilted_schema(constraint_names)) for path in paths]
    )


def _keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(*(table[name].to_pylist() for name in SAMPLE_KEY), strict=True))


def _sequences(drawn: pa.Table, order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    columns = []
    for name in ("prompt_token_ids", "completion_token_ids"):
        lists = drawn[name].combine_chunks()
        values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        columns.append([values[offsets[row] : offsets[row + 1]] for row in order])
    return list(zip(*columns, strict=True))


def _require_weights(responses: TrainingResponses, *, beta: float, tilted: Path) -> None:
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
