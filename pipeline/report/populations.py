"""Responses as the page's script reads them: scores prompt by prompt, and texts, no more than a page should hold."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.shards import read_parquet
from pipeline.contracts.solution import Solution
from pipeline.contracts.statistics import Statistic
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SAMPLE_KEY, SAMPLES, SCORE_PREFIX, SCORES
from pipeline.report.views import brief
from stage1_dual.dual import DualProblem, Partition

Messages = Sequence[Mapping[str, str]]

WEIGHT = "weight"

MOST_TEXT_BYTES = 1_000_000
"""Of texts in a page, compressed."""
_LONGEST_TEXT = 10_000
"""Characters of a response, and of a prompt, that a page shows."""
_MOST_PROMPTS = 400
_FEWER_RESPONSES = (64, 32, 16, 8, 4)


@dataclass(frozen=True, eq=False)
class Population:
    """Scored responses of one policy to the prompts of one split, ordered by prompt, then by number.

    Attributes:
        prompt_ids: of the prompts, length p.
        counts_p: responses of each prompt, shape (p,).
        sample_index_n: number of each response, shape (n,).
        columns: scores by name, each of shape (n,), in the user's own direction and units; of the reference also
            ``weight``, the tilted one.
        n_prompts_in_all: prompts there are; more than p where they were sampled.
    """

    prompt_ids: tuple[str, ...]
    counts_p: np.ndarray
    sample_index_n: np.ndarray
    columns: Mapping[str, FloatArray]
    n_prompts_in_all: int

    @classmethod
    def of_table(cls, table: pa.Table, names: Sequence[str]) -> Population:
        """From rows with the key of the samples table and columns of scores."""
        table = table.sort_by([(name, "ascending") for name in SAMPLE_KEY]).combine_chunks()
        ids = table["prompt_id"].combine_chunks().dictionary_encode()
        return cls(
            prompt_ids=tuple(ids.dictionary.to_pylist()),
            counts_p=np.bincount(np.asarray(ids.indices), minlength=len(ids.dictionary)),
            sample_index_n=table["sample_index"].to_numpy(),
            columns={name: np.asarray(table[name].to_numpy(), dtype=np.float64) for name in names},
            n_prompts_in_all=len(ids.dictionary),
        )

    @property
    def _scores(self) -> dict[str, FloatArray]:
        """What a page holds: it weighs for itself."""
        return {name: value_n for name, value_n in self.columns.items() if name != WEIGHT}

    @property
    def is_whole(self) -> bool:
        """Whether all prompts are there."""
        return len(self.prompt_ids) == self.n_prompts_in_all

    @property
    def fits_single(self) -> bool:
        """Whether numbers of 32 bits hold every score: none is beyond their range, and none vanishes."""
        single = np.finfo(np.float32)
        sizes = (np.abs(value_n[value_n != 0]) for value_n in self._scores.values())
        return all(bool(np.all((size_n >= single.tiny) & (size_n <= single.max))) for size_n in sizes)

    def own_weight_n(self) -> FloatArray:
        """Weights of the policy itself: every prompt counts the same, and all sum to 1; shape (n,)."""
        return np.asarray(np.repeat(1.0 / self.counts_p, self.counts_p) / len(self.counts_p), dtype=np.float64)

    def within(self, most_bytes: int) -> Population:
        """The same, or of evenly taken prompts, so that its scores of 32 bits take at most so many bytes."""
        sizes_p = 4 * self.counts_p * len(self._scores)
        n_kept = len(sizes_p)
        while n_kept > 1 and (size := int(sizes_p[_evenly(len(sizes_p), n_kept)].sum())) > most_bytes:
            n_kept = max(1, min(n_kept - 1, int(n_kept * most_bytes / size)))
        return self.of_prompts({self.prompt_ids[place] for place in _evenly(len(sizes_p), n_kept)})

    def of_prompts(self, prompt_ids: Collection[str]) -> Population:
        """The responses to some of the prompts."""
        kept_p = np.array([one in prompt_ids for one in self.prompt_ids], dtype=bool)
        if kept_p.all():
            return self
        kept_n = np.repeat(kept_p, self.counts_p)
        return Population(
            tuple(one for one, kept in zip(self.prompt_ids, kept_p, strict=True) if kept),
            self.counts_p[kept_p],
            self.sample_index_n[kept_n],
            {name: value_n[kept_n] for name, value_n in self.columns.items()},
            self.n_prompts_in_all,
        )

    def to_document(self) -> dict[str, Any]:
        """As ``responsesOf`` of ``data.js`` reads it."""
        return {
            "counts": self.counts_p.tolist(),
            "prompts": self.n_prompts_in_all,
            "columns": {
                name: base64.b64encode(value_n.astype("<f4").tobytes()).decode("ascii")
                for name, value_n in self._scores.items()
            },
        }


@dataclass(frozen=True)
class PromptTexts:
    """A prompt and the first responses to it, in the order of the rows of their populations.

    Attributes:
        messages: the prompt.
        category: of the prompt, or empty.
        place: of the prompt in the reference's population.
        texts: responses of the reference.
        policy_place: of the prompt in the trained policy's population, or None.
        policy_texts: responses of the trained policy.
    """

    messages: Messages
    category: str
    place: int
    texts: tuple[str, ...]
    policy_place: int | None = None
    policy_texts: tuple[str, ...] = ()

    def first(self, n_responses: int) -> PromptTexts:
        """The same with at most so many responses of either policy."""
        return PromptTexts(
            self.messages,
            self.category,
            self.place,
            self.texts[:n_responses],
            self.policy_place,
            self.policy_texts[:n_responses],
        )


def score_columns(solution: Solution) -> dict[str, str]:
    """For each raw score of the constraints the column of the hand-off table that it stands in."""
    plain = {one.name for one in solution.constraints if one.stated == Statistic(one.name)}
    return {name: (CONSTRAINT_PREFIX if name in plain else SCORE_PREFIX) + name for name in solution.scores}


def read_populations(run_dir: Path, solution: Solution, *, drops_cut_off: bool) -> dict[str, Population]:
    """The reference's responses to ``train`` and ``test`` prompts and the trained ``policy``'s, those that there are.

    A column of the trained policy is named as the reference's column of the same score is.

    Args:
        run_dir: folder of the run.
        solution: its solution.
        drops_cut_off: whether responses that the token limit cut off take no part.

    Raises:
        CorruptArtifactError: a table is damaged or lacks a column.
    """
    found = {split: read_reference(run_dir / "tilted", solution, split) for split in ("train", "test")}
    if (test := found["test"]) is not None:
        there = {column: score for score, column in score_columns(solution).items() if column in test.columns}
        score_of = {"reward": solution.reward.name, **there}
        found["policy"] = read_policy(run_dir, score_of, drops_cut_off=drops_cut_off)
    return {name: one for name, one in found.items() if one is not None}


def judged_split(populations: Mapping[str, Population]) -> str:
    """The split whose prompts the policies are shown on: ``test`` where there is one."""
    return "test" if "test" in populations else "train"


def read_reference(folder: Path, solution: Solution, split: str) -> Population | None:
    """The reference's responses to the prompts of a split, from the hand-off table; None where there are none.

    Args:
        folder: ``tilted/`` of a run.
        solution: whose constraints the table has.
        split: of the prompts.

    Raises:
        CorruptArtifactError: a damaged file, or a column that is missing.
    """
    paths = _files(folder, split)
    if not paths:
        return None
    names = ["reward", WEIGHT, *(CONSTRAINT_PREFIX + name for name in solution.names)]
    names = list(dict.fromkeys([*names, *_there(paths[0], score_columns(solution).values())]))
    columns, schema = [*SAMPLE_KEY, *names], solution.tilted_schema
    rows = pa.concat_tables([read_parquet(path, columns=columns, schema=schema) for path in paths])
    return Population.of_table(rows, names) if rows.num_rows else None


def solved_rows(problem: DualProblem, solution: Solution, *, most_bytes: int) -> Population:
    """The responses that a dual was solved on, where there is no run: of evenly taken prompts where they are many.

    One pass over the samples, wherever they lie. Prompts and responses have their places for names.

    Args:
        problem: what was solved.
        solution: its solution, for the names and directions of the columns.
        most_bytes: about what the scores taken may need, 32 bits each.
    """
    n_columns = 1 + len(solution.names)
    step = max(1, 4 * n_columns * problem.n_samples // most_bytes)
    samples = problem.samples
    parts = list(samples.executor.run(partial(_every_prompt, step=step), samples.partitions))
    counts_p = np.concatenate([counts for counts, _ in parts])
    values_xn = np.concatenate([values for _, values in parts], axis=1)
    values_xn[1:] *= solution.signs_m[:, np.newaxis]
    names = ("reward", *(CONSTRAINT_PREFIX + name for name in solution.names))
    return Population(
        prompt_ids=tuple(map(str, range(len(counts_p)))),
        counts_p=counts_p,
        sample_index_n=np.arange(counts_p.sum()) - np.repeat(np.cumsum(counts_p) - counts_p, counts_p),
        columns=dict(zip(names, values_xn, strict=True)),
        n_prompts_in_all=problem.n_prompts,
    )


def _every_prompt(partition: Partition, *, step: int) -> tuple[np.ndarray, FloatArray]:
    """Of every ``step``-th prompt its number of responses, and these: reward and turned columns, shape (1 + m, n)."""
    counts, values, before = [], [], 0
    for block in partition.blocks():
        counts_p = block.segments.counts_p
        kept_p = (before + np.arange(len(counts_p))) % step == 0
        counts.append(counts_p[kept_p])
        kept_n = np.repeat(kept_p, counts_p)
        values.append(block.values_in[:, kept_n] + np.repeat(block.shift_ip[:, kept_p], counts[-1], axis=1))
        before += len(counts_p)
    return np.concatenate(counts), np.concatenate(values, axis=1)


def read_policy(run_dir: Path, score_of: Mapping[str, str], *, drops_cut_off: bool) -> Population | None:
    """The trained policy's responses to the test prompts that have all scores; None where a run keeps none.

    Args:
        run_dir: folder of the run, with ``evaluation/samples`` and ``evaluation/scores``.
        score_of: for each column to be made the name of its score.
        drops_cut_off: whether responses that the token limit cut off take no part.

    Raises:
        CorruptArtifactError: a damaged file, or a column that is missing.
    """
    folder = run_dir / "evaluation"
    sampled = _files(folder / "samples", "test")
    scored = {column: _files(folder / "scores" / score, "test") for column, score in score_of.items()}
    if not sampled or not all(scored.values()):
        return None
    columns = [*SAMPLE_KEY, "finish_reason"]
    rows = pa.concat_tables([read_parquet(path, columns=columns, schema=SAMPLES) for path in sampled])
    if drops_cut_off:
        rows = rows.filter(pc.not_equal(rows["finish_reason"], "length"))
    rows = rows.select(list(SAMPLE_KEY))
    for column, paths in scored.items():
        found = [read_parquet(path, columns=[*SAMPLE_KEY, "value"], schema=SCORES) for path in paths]
        rows = rows.join(
            pa.concat_tables(found).rename_columns([*SAMPLE_KEY, column]), list(SAMPLE_KEY), join_type="inner"
        )
        rows = rows.filter(pc.is_finite(rows[column]))
    return Population.of_table(rows, list(scored)) if rows.num_rows else None


def read_texts(run_dir: Path, split: str, reference: Population, policy: Population | None) -> list[PromptTexts]:
    """Prompts of a split with the texts of both policies: all of them, or as many as :data:`MOST_TEXT_BYTES` hold.

    Where they are too many, first the responses to each prompt become fewer, from the first on, then the prompts,
    evenly taken; nothing is selected by its score.

    Raises:
        CorruptArtifactError: a damaged file, or a column that is missing.
    """
    places = {one: place for place, one in enumerate(reference.prompt_ids)}
    ids = [reference.prompt_ids[place] for place in _evenly(len(places), _MOST_PROMPTS)]
    about, texts = _texts_of(_files(run_dir / "tilted", split), set(ids), ("prompt", "category"))
    _, answers = _texts_of(_files(run_dir / "evaluation" / "samples", "test"), set(ids) if policy else (), ())
    drawn = _numbers(reference)
    policy_drawn = _numbers(policy) if policy else {}
    policy_places = {one: place for place, one in enumerate(policy.prompt_ids)} if policy else {}
    found = [
        PromptTexts(
            messages=brief_messages(about[one]["prompt"]),
            category=about[one]["category"],
            place=places[one],
            texts=tuple(texts[one, number] for number in drawn[one]),
            policy_place=policy_places.get(one),
            policy_texts=tuple(answers[one, number] for number in policy_drawn.get(one, ())),
        )
        for one in ids
        if one in about
    ]
    return _fitted(found)


def _fitted(found: list[PromptTexts]) -> list[PromptTexts]:
    for limit in (None, *_FEWER_RESPONSES):
        shorter = found if limit is None else [one.first(limit) for one in found]
        # Far too many are not worth a compression.
        if sum(sum(map(len, (*one.texts, *one.policy_texts))) for one in shorter) > 12 * MOST_TEXT_BYTES:
            continue
        sizes = [len(zlib.compress(json.dumps(_document(one)).encode())) for one in shorter]
        if sum(sizes) <= MOST_TEXT_BYTES:
            return shorter
    fewest = [one.first(_FEWER_RESPONSES[-1]) for one in found]
    sizes = [len(zlib.compress(json.dumps(_document(one)).encode())) for one in fewest]
    n_kept = len(fewest)
    while n_kept and sum(sizes[place] for place in _evenly(len(sizes), n_kept)) > MOST_TEXT_BYTES:
        n_kept = int(0.8 * n_kept)
    return [fewest[place] for place in _evenly(len(fewest), n_kept)]


def _document(one: PromptTexts) -> list[Any]:
    return [list(one.messages), one.category, one.texts, one.policy_texts]


def brief_text(text: str) -> str:
    """A response as a page shows it."""
    return brief(text, most=_LONGEST_TEXT)


def brief_messages(messages: Messages) -> Messages:
    """A prompt as a page shows it: of a very long one the last messages."""
    found: list[Mapping[str, str]] = []
    room = _LONGEST_TEXT
    for message in reversed(messages):
        if room <= 0:
            found.append({"role": "…", "content": f"{len(messages) - len(found)} earlier messages"})
            break
        found.append({"role": brief(message["role"], most=100), "content": brief(message["content"], most=room)})
        room -= len(message["content"])
    return found[::-1]


def _numbers(population: Population) -> dict[str, list[int]]:
    """Sample indices of each prompt, in the order of its rows."""
    parts = np.split(population.sample_index_n, np.cumsum(population.counts_p)[:-1])
    return {one: part.tolist() for one, part in zip(population.prompt_ids, parts, strict=True)}


def _texts_of(
    paths: Sequence[Path], ids: Collection[str], about: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, int], str]]:
    """What is known of some prompts, and their texts by prompt and number, one file in memory at a time."""
    known: dict[str, dict[str, Any]] = {}
    texts: dict[tuple[str, int], str] = {}
    for path in paths if ids else ():
        rows = read_parquet(path, columns=[*SAMPLE_KEY, "completion", *about])
        rows = rows.filter(pc.is_in(rows["prompt_id"], value_set=pa.array(sorted(ids), pa.string())))
        for row in rows.to_pylist():
            known.setdefault(row["prompt_id"], {name: row[name] for name in about})
            texts[row["prompt_id"], row["sample_index"]] = brief_text(row["completion"])
    return known, texts


def _evenly(size: int, most: int) -> list[int]:
    """Places of at most so many of ``size``, evenly taken."""
    if size <= most:
        return list(range(size))
    return [int(place * size / most) for place in range(most)]


def _files(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"data/{split}-*.parquet"))


def _there(path: Path, names: Collection[str]) -> list[str]:
    known = set(pq.read_schema(path).names)  # tables of before there were statistics have no raw scores
    return [name for name in names if name in known]
