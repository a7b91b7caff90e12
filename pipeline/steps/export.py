"""The table that stage 1 hands on: every response with its scores and its weight under the tilted policy."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, StrictUndefined

from pipeline.contracts.artifacts import atomic_write_bytes, read_json, read_manifest
from pipeline.contracts.errors import InputError
from pipeline.contracts.keys import PromptPlaces, row_keys
from pipeline.contracts.markdown import code_markdown, plain_markdown
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SAMPLE_KEY, SAMPLES, SCORE_PREFIX
from pipeline.dual.solving import solution_columns, tilted_weights
from pipeline.report.solved import ReportedSolution
from pipeline.report.terminal import print_stage1
from pipeline.run.response_set import ResponseSet
from pipeline.run.run import Run
from pipeline.run.step import derived_step_is_current, finish_step, log
from pipeline.scoring.joined import JoinedScores, all_scores, reference_scores


def export(run: Run) -> None:
    """Write the tilted tables: every response with its scores and its weight under the tilted policy.

    Raises:
        InputError: no pair of a data set has all scores.
    """
    path = run.dual / "dual.json"
    dual = read_json(path)
    ReportedSolution.from_document(dual, source=path)  # all that the table below shows
    for responses in run.response_sets():
        _export_set(run, responses, dual)
    print_stage1(dual)


def _export_set(run: Run, responses: ResponseSet, dual: Mapping[str, Any]) -> None:
    started = time.monotonic()
    folder = responses.tilted
    inputs = {"dual": read_manifest(run.dual).identity, **_made_from(run, responses)}
    if derived_step_is_current(folder, step="export", settings={}, inputs=inputs):
        return
    files, n_rows = write_tilted_table(
        folder,
        prompts=run.prompts_table(responses.prompts),
        samples=run.samples_table(responses.samples),
        scored={split: _scored(run, responses, split) for split in responses.splits},
        solution=Solution.from_document(dual, source=run.dual / "dual.json"),
        metadata=run.table_metadata(),
    )
    counts = {"rows": n_rows}
    if responses.paired:
        counts |= {"pairs": n_rows // 2, "unscored": _count_pairs(responses) - n_rows // 2}
        log.info("export: %d pairs of the data set to train on", counts["pairs"])
    else:
        write_dataset_card(folder, dual=dual, n_rows=n_rows, run=run.name, inputs=inputs)
    finish_step(run.name, folder, "export", settings={}, inputs=inputs, files=files, counts=counts, started=started)


def _made_from(run: Run, responses: ResponseSet) -> dict[str, str]:
    """The artifacts of a set that its tilted table is made from; the samples' scores stand in the dual."""
    names = ["prompts", "samples"]
    if responses.paired:
        names += [f"scores/{name}" for name in run.config.needed_scores()]
    return {responses.prefix + name: read_manifest(responses.root / name).identity for name in names}


def _scored(run: Run, responses: ResponseSet, split: str) -> JoinedScores:
    """The responses of a set that take part; of pairs, those of which both responses have all scores.

    Raises:
        InputError: none of the pairs has.
    """
    if not responses.paired:
        return reference_scores(run, split)
    rows, _ = all_scores(
        run, samples=responses.samples, scores=responses.scores, split=split, prompts=responses.prompts
    )
    whole = _whole_pairs(rows)
    if whole.n_samples == 0:
        raise InputError(
            f"none of the {_count_pairs(responses)} pairs of `{responses.setting}` has all scores of both responses"
        )
    return whole


def _count_pairs(responses: ResponseSet) -> int:
    return read_manifest(responses.samples).count("pairs")


def _whole_pairs(rows: JoinedScores) -> JoinedScores:
    """The rows whose partner is there too."""
    pair_n = row_keys(rows.prompt_n, rows.sample_index_n // 2)
    _, place_n, count = np.unique(pair_n, return_inverse=True, return_counts=True)
    return rows.select(count[place_n] == 2)


_CARD = Path(__file__).parent / "dataset_card.md.jinja"
_ROWS_PER_FILE = 100_000


def write_tilted_table(
    folder: Path,
    *,
    prompts: pa.Table,
    samples: ShardedTable,
    scored: Mapping[str, JoinedScores],
    solution: Solution,
    metadata: Mapping[str, str],
) -> tuple[dict[str, str], int]:
    """Join prompts, completions, scores and weights by key and write them, one file of samples in memory at a time.

    Args:
        folder: of the table.
        prompts: the prompts table.
        samples: the samples table.
        scored: the scored samples of each split.
        solution: whose weights they get.
        metadata: key-value metadata of every file.

    Returns:
        The path of each file relative to the folder and its sha256, and the number of rows.
    """
    table = ShardedTable(folder=folder, schema=solution.tilted_schema, metadata=metadata)
    about = _AboutPrompts(PromptPlaces(prompts["prompt_id"].to_pylist()), prompts)
    n_rows = 0
    for split, rows in scored.items():
        weight_n = tilted_weights(rows, solution)
        column_nm = solution_columns(rows, solution)
        pieces = (
            _tilted_rows(_read_texts(path), rows, column_nm, weight_n, about, solution, split)
            for path in samples.paths(split)
        )
        for number, piece in enumerate(_regrouped(pieces)):
            n_rows += piece.num_rows
            table.write_shard(piece, split=split, order=f"{number:06d}")
    return table.finish(), n_rows


def write_dataset_card(
    folder: Path, *, dual: Mapping[str, Any], n_rows: int, run: str, inputs: Mapping[str, str]
) -> None:
    """Write the card that Hugging Face tools and people read first.

    Args:
        folder: of the table.
        dual: content of ``dual.json``.
        n_rows: of the table.
        run: name of the run.
        inputs: identity of each artifact the table was made from.
    """
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701  # Markdown, not HTML
    environment.filters |= {"plain": plain_markdown, "code": code_markdown}
    template = environment.from_string(_CARD.read_text(encoding="utf-8"))
    solution = Solution.from_document(dual)
    text = template.render(solution=solution, dual=dual, n_rows=n_rows, run=run, inputs=inputs)
    atomic_write_bytes(folder / "README.md", text.encode())


@dataclass(frozen=True, eq=False)
class _AboutPrompts:
    """The prompts table, and the row of each prompt in it."""

    places: PromptPlaces
    table: pa.Table


def _read_texts(path: Path) -> pa.Table:
    return read_parquet(path, columns=[*SAMPLE_KEY, "completion"], schema=SAMPLES)


def _tilted_rows(
    samples: pa.Table,
    scored: JoinedScores,
    column_nm: np.ndarray,
    weight_n: np.ndarray,
    about: _AboutPrompts,
    solution: Solution,
    split: str,
) -> pa.Table:
    found, row_n = scored.find_in(samples)
    texts = samples.take(found)
    schema = solution.tilted_schema
    added = [name.removeprefix(SCORE_PREFIX) for name in schema.names if name.startswith(SCORE_PREFIX)]
    prompts = about.table.take(about.places.of(texts["prompt_id"]))
    return pa.table(
        {
            "prompt_id": texts["prompt_id"],
            "sample_index": texts["sample_index"],
            "prompt": prompts["prompt"],
            "completion": texts["completion"],
            "reward": scored.reward_n[row_n],
            **{CONSTRAINT_PREFIX + name: column_nm[row_n, j] for j, name in enumerate(solution.names)},
            **{SCORE_PREFIX + name: scored.score_n(name)[row_n] for name in added},
            "weight": weight_n[row_n],
            "split": pa.repeat(split, len(row_n)),
            "category": prompts["category"],
        },
        schema=schema,
    )


def _regrouped(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(table.num_rows for table in waiting) >= _ROWS_PER_FILE:
            yield pa.concat_tables(waiting)
            waiting = []
    if any(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting)
