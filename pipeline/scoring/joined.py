"""Scored samples as arrays: what the dual, the export and the evaluation read, joined by key and never by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.keys import PromptPlaces, find_keys
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.statistics import Statistic, StatisticColumns, statistic_columns
from pipeline.contracts.tables import PROMPT_COLUMNS, SAMPLE_KEY, SCORES
from pipeline.run.run import Run


@dataclass(frozen=True, eq=False)
class SortedKeys:
    """Keys of rows as numbers, place of the prompt * width + sample_index.

    Attributes:
        prompts: the prompts' places.
        width: above every ``sample_index``.
        key_n: of each row, ascending, shape (n,).
    """

    prompts: PromptPlaces
    width: int
    key_n: np.ndarray

    def find(self, table: pa.Table) -> np.ndarray:
        """The row of each key of a table, shape (n,); -1 for keys that are not here.

        Args:
            table: with the columns ``prompt_id`` and ``sample_index``.
        """
        place = self.prompts.of(table["prompt_id"])
        index = table["sample_index"].to_numpy().astype(np.int64)
        inside = (place >= 0) & (index >= 0) & (index < self.width)
        return np.where(inside, find_keys(self.key_n, place * self.width + index), -1)


@dataclass(frozen=True, eq=False)
class JoinedScores:
    """One row a response, sorted by key, in the user's own directions and units.

    Attributes:
        prompt_ids: the prompts that have responses, sorted; shape (p,).
        prompt_n: place of each row's prompt among them, ascending, shape (n,).
        sample_index_n: shape (n,), integers, ascending within a prompt.
        reward_n: shape (n,), reward units.
        score_names: the s scores that the constraints are computed from.
        scores_ns: their raw scores, shape (n, s), score units.
        cut_off_n: whether the token limit ended the response, shape (n,).
        prompt_columns: what else is known of the prompts, such as ``category``: texts of shape (p,) by name.
    """

    prompt_ids: tuple[str, ...]
    prompt_n: np.ndarray
    sample_index_n: np.ndarray
    reward_n: np.ndarray
    score_names: tuple[str, ...]
    scores_ns: np.ndarray
    cut_off_n: np.ndarray
    prompt_columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def n_samples(self) -> int:
        """Number of responses."""
        return len(self.reward_n)

    @property
    def starts(self) -> np.ndarray:
        """The first row of each prompt, shape (p,)."""
        return np.searchsorted(self.prompt_n, np.arange(len(self.prompt_ids)))

    def select(self, mask_n: np.ndarray) -> JoinedScores:
        """The rows where a boolean mask, shape (n,), is true; prompts without rows are left out."""
        kept, prompt_n = np.unique(self.prompt_n[mask_n], return_inverse=True)
        return JoinedScores(
            prompt_ids=tuple(self.prompt_ids[place] for place in kept),
            prompt_n=prompt_n,
            sample_index_n=self.sample_index_n[mask_n],
            reward_n=self.reward_n[mask_n],
            score_names=self.score_names,
            scores_ns=self.scores_ns[mask_n],
            cut_off_n=self.cut_off_n[mask_n],
            prompt_columns={name: values_p[kept] for name, values_p in self.prompt_columns.items()},
        )

    def of_prompts(self, prompt_ids: Set[str]) -> JoinedScores:
        """The rows of some of the prompts."""
        mask_p = np.array([prompt_id in prompt_ids for prompt_id in self.prompt_ids], dtype=bool)
        return self.select(mask_p[self.prompt_n])

    def by_prompt(self) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        """Prompt ids in sorted order, and for each its rewards (k_p,) and its raw scores (k_p, s)."""
        cuts = self.starts[1:]
        return list(self.prompt_ids), np.split(self.reward_n, cuts), np.split(self.scores_ns, cuts)

    def score_n(self, name: str) -> np.ndarray:
        """The raw scores of a name, shape (n,)."""
        return np.asarray(self.scores_ns[:, self.score_names.index(name)])

    def statistic_columns(self, statistic: Statistic, *, at: float | None = None) -> StatisticColumns:
        """U and h of a statistic for each row (:mod:`pipeline.contracts.statistics`).

        Args:
            statistic: of scores and columns that are here.
            at: t of a cvar, score units.

        Raises:
            InputError: ``per`` is a score that is not positive.
        """
        return statistic_columns(
            statistic,
            {name: self.score_n(name) for name in statistic.scores},
            {name: self.prompt_columns[name][self.prompt_n] for name in statistic.columns},
            at=at,
        )

    def find_in(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a table are here, and which ones of these they are.

        Args:
            table: with the columns ``prompt_id`` and ``sample_index``, each key at most once.

        Returns:
            Rows of the table, in the order of the rows here, and the row here of each; both of shape (n,).
        """
        row_n = self._keys.find(table)
        found = np.flatnonzero(row_n >= 0)
        found = found[np.argsort(row_n[found], kind="stable")]
        return found, row_n[found]

    @cached_property
    def _keys(self) -> SortedKeys:
        width = int(self.sample_index_n.max(initial=0)) + 1
        return SortedKeys(PromptPlaces(self.prompt_ids), width, self.prompt_n * width + self.sample_index_n)


def read_scores(
    samples: ShardedTable,
    scores: Mapping[str, ShardedTable],
    *,
    reward: str,
    constraints: Sequence[str],
    split: str,
    max_unscored: int,
    prompts: pa.Table | None = None,
) -> tuple[JoinedScores, int]:
    """Join the samples and the score tables of the reward and the constraints on their key.

    Args:
        samples: the samples table.
        scores: the score tables by scorer.
        reward: scorer of the reward.
        constraints: scorers that the constraints are computed from, in order.
        split: ``train`` or ``test``.
        max_unscored: samples that may lack a score: those whose failure is on record.
        prompts: the prompts table, for what statistics ask of a prompt.

    Returns:
        The samples that have all these scores, and the number of those that have not.

    Raises:
        CorruptArtifactError: more samples lack a score, or there are scores of other samples.
        InputError: a score is not finite; names the rows.
    """
    names = list(dict.fromkeys([reward, *constraints]))
    keys, cut_off_n = _sample_keys(samples, split)
    key_n = keys.key_n
    value = np.full((len(key_n), len(names)), np.nan)
    for column, name in enumerate(names):
        _fill(value[:, column], scores[name], split, keys, name=name)
    scored_n = ~np.isnan(value).any(axis=1)
    unscored = int(np.count_nonzero(~scored_n))
    if unscored > max_unscored:
        raise CorruptArtifactError(
            f"{unscored} of {len(key_n)} {split} samples in {samples.folder} lack a score of {' or '.join(names)}, "
            f"and only {max_unscored} failures are on record; score the samples again"
        )
    everything = JoinedScores(
        prompt_ids=tuple(keys.prompts.ids),
        prompt_n=key_n // keys.width,
        sample_index_n=key_n % keys.width,
        reward_n=value[:, 0],
        score_names=tuple(constraints),
        scores_ns=value[:, [names.index(name) for name in constraints]],
        cut_off_n=cut_off_n,
        prompt_columns={} if prompts is None else _prompt_columns(prompts, keys.prompts.ids),
    )
    return everything.select(scored_n), unscored


def _prompt_columns(prompts: pa.Table, prompt_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of the prompts table that a statistic may ask for, in the order of some prompts."""
    place = {prompt_id: row for row, prompt_id in enumerate(prompts["prompt_id"].to_pylist())}
    missing = [prompt_id for prompt_id in prompt_ids if prompt_id not in place]
    if missing:
        raise CorruptArtifactError(
            f"{len(missing)} prompts have samples and are not in the prompts table: {missing[0]}"
        )
    row_p = [place[prompt_id] for prompt_id in prompt_ids]
    return {name: np.array(prompts[name].to_pylist(), dtype=object)[row_p] for name in PROMPT_COLUMNS}


def _sample_keys(samples: ShardedTable, split: str) -> tuple[SortedKeys, np.ndarray]:
    """Keys of the samples of a split, and whether the token limit cut each off."""
    prompts = PromptPlaces(samples.prompt_ids(split))
    place, index, cut_off = [], [], []
    for path in samples.paths(split):
        table = read_parquet(
            path, columns=[*SAMPLE_KEY, "finish_reason"], schema=samples.schema, as_dictionary=["prompt_id"]
        )
        place.append(prompts.of(table["prompt_id"]))
        index.append(table["sample_index"].to_numpy().astype(np.int64))
        if index[-1].min(initial=0) < 0:
            raise CorruptArtifactError(f"{path} has the sample_index {index[-1].min()}; it must not be negative")
        cut_off.append(pc.equal(table["finish_reason"], "length").to_numpy())
    index_n = np.concatenate([np.empty(0, np.int64), *index])
    width = int(index_n.max(initial=0)) + 1
    key_n = np.concatenate([np.empty(0, np.int64), *place]) * width + index_n
    order = np.argsort(key_n, kind="stable")
    key_n = key_n[order]
    repeated = np.count_nonzero(np.diff(key_n) == 0)
    if repeated:
        raise CorruptArtifactError(f"{samples.folder}: {repeated} {split} samples are there twice")
    return SortedKeys(prompts, width, key_n), np.concatenate([np.empty(0, bool), *cut_off])[order]


def _fill(value_n: np.ndarray, scores: ShardedTable, split: str, keys: SortedKeys, *, name: str) -> None:
    """Write a scorer's values to the rows they belong to."""
    for path in scores.paths(split):
        table = read_parquet(path, columns=[*SAMPLE_KEY, "value"], schema=scores.schema, as_dictionary=["prompt_id"])
        _require_finite(table, name)
        row_n = keys.find(table)
        unknown = np.count_nonzero(row_n < 0)
        if unknown:
            raise CorruptArtifactError(
                f"{path}: {unknown} scores of samples that are not there; score the samples again"
            )
        value_n[row_n] = table["value"].to_numpy()


def _require_finite(table: pa.Table, name: str) -> None:
    wrong = table.filter(pc.invert(pc.is_finite(table["value"])))
    if wrong.num_rows:
        shown = "; ".join(
            f"{row['prompt_id'][:12]}… sample {row['sample_index']}: {row['value']}"
            for row in wrong.slice(0, 3).to_pylist()
        )
        raise InputError(
            f"scorer `{name}` gave {wrong.num_rows} scores that are not finite ({shown}); all must be finite"
        )


OnLength = Literal["keep", "drop", "flag"]


def apply_length_rule(rows: JoinedScores, on_length: OnLength) -> JoinedScores:
    """The rows that take part: all of them, or those that the token limit did not cut off."""
    return rows.select(~rows.cut_off_n) if on_length == "drop" and rows.cut_off_n.any() else rows


def reference_scores(run: Run, split: str, *, names: Sequence[str] | None = None) -> JoinedScores:
    """The reference's scored samples of a split; ``names`` as of :func:`policy_scores`."""
    samples, scores = run.samples, run.scores
    return policy_scores(run, samples=samples, scores=scores, split=split, names=names)


def policy_scores(
    run: Run, *, samples: Path, scores: Path, split: str, names: Sequence[str] | None = None
) -> JoinedScores:
    """The scored samples of a split of some policy, without those that ``solve.on_length`` drops.

    Args:
        run: the run.
        samples: folder of the samples table.
        scores: holds a folder with a score table for each scorer.
        split: of the prompts.
        names: scorers that stand for the reward, first, and those that the constraints are computed from; those of the
            recipe where not given.

    Raises:
        CorruptArtifactError: a table is damaged, or scores and samples do not belong together.
    """
    rows, _ = all_scores(run, samples=samples, scores=scores, split=split, names=names)
    return apply_length_rule(rows, run.config.solve.on_length)


def all_scores(
    run: Run,
    *,
    samples: Path,
    scores: Path,
    split: str,
    names: Sequence[str] | None = None,
    prompts: Path | None = None,
) -> tuple[JoinedScores, int]:
    """All scored samples of a split, and how many have no score; arguments as of :func:`policy_scores`.

    ``prompts`` is the folder of their prompts table, where it is not the run's own.
    """
    reward, *constraints = names if names is not None else (run.config.reward, *run.config.constraint_scores())
    named = dict.fromkeys((reward, *constraints))
    return read_scores(
        run.samples_table(samples),
        {name: ShardedTable(folder=scores / name, schema=SCORES, metadata={}) for name in named},
        reward=reward,
        constraints=constraints,
        split=split,
        max_unscored=sum(read_manifest(scores / name).count("failed") for name in named),
        prompts=run.prompts_table(prompts) if run.config.asks_of_prompts else None,
    )
