"""The dual on any table of scores. No models, no run folder, and no more memory than is needed."""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.contracts.artifacts import environment, require_writable, write_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    MAX_CONSTRAINTS,
    MAX_FRONTIER_POINTS,
    Constraint,
    Safeguard,
    holds_range,
    read_constraint,
    read_constraint_range,
)
from pipeline.dual.solving import EvaluationSize, build_problem_on_samples, constraint_signs, solve_problem
from pipeline.dual.sweep import solve_points, sweep_constraints, write_frontier
from pipeline.dual.table_reader import ScoreChunk, ScoreTable
from pipeline.report import write_stage1_figures
from stage1_dual.dual import (
    GroupedSamples,
    Normaliser,
    Partition,
    PassRunner,
    ThreadExecutor,
    UngroupedScores,
    build_normaliser,
    group_in_memory,
    group_on_disk,
)

_log = logging.getLogger("dualign")

# Points of a sweep, each some five passes over the scores; fewer where a pass reads the disk.
_FRONTIER_POINTS = 61
_FEW_FRONTIER_POINTS = 11
_NO_EVALUATION = EvaluationSize(0, 0)
# Scores beyond this are kept on disk, in the output folder, while it works. To group them in memory takes five times
# their size.
MEMORY_BYTES = 2**28


@dataclass(frozen=True)
class TableRequest:
    """What to solve on which table.

    Attributes:
        table: Parquet, CSV or JSON Lines file, or folder of such files.
        prompt_id: column that says which prompt a row answers.
        reward: column to maximise.
        constraints: texts such as ``harmless >= ref + 0.8``; in :func:`frontier_table` some of them hold a range
            ``start:stop:step`` in place of the number.
        beta: KL strength, reward per nat.
        output: folder for the results.
        seed: of the bootstrap.
        n_replicates: bootstrap replicates over prompts.
        safeguards: what is asked beyond a constraint, by its name.
        evaluation: size of the final evaluation, for ``assurance``.
        corrects_response_bias: take the multipliers that are corrected for finitely many responses, where they can be.
        executor: runs the passes over the scores; None for the threads of this process.
        show_progress: show progress bars.
    """

    table: Path
    prompt_id: str
    reward: str
    constraints: tuple[str, ...]
    beta: float
    output: Path
    seed: int = 0
    n_replicates: int = 1000
    safeguards: dict[str, Safeguard] = field(default_factory=dict)
    evaluation: EvaluationSize = _NO_EVALUATION
    corrects_response_bias: bool = False
    executor: PassRunner | None = None
    show_progress: bool = True


def solve_table(request: TableRequest) -> dict[str, Any]:
    """Solve, certify and write ``dual.json``, ``frontier.parquet``, ``weights.parquet`` and ``figures/``.

    Where the table has a column ``split`` with the values ``train`` and ``test``, the train rows determine lambda* and
    the test rows give held-out predictions; without one, every row determines lambda*.

    Returns:
        The content of ``dual.json``.

    Raises:
        InputError: a column is missing or of the wrong type, or a value is null, NaN or infinite; names both.
        InfeasibleError: no reweighting of the rows meets the thresholds.
        NotCertifiedError: the solution failed the independent check.
    """
    _require_few(request.constraints)
    constraints = [read_constraint(text) for text in request.constraints]
    names = [constraint.name for constraint in constraints]
    unknown = sorted(set(request.safeguards) - set(names))
    if unknown:
        raise InputError(f"a safeguard is asked for {unknown[0]!r}; the constraints are {', '.join(names)}")
    table = _open(request, names)
    with tempfile.TemporaryDirectory(prefix=".scores-", dir=request.output.resolve()) as scratch:
        scores, notes = _read_scores(table, request, constraints, folder=Path(scratch))
        train = build_problem_on_samples(scores["train"].scores, constraints=constraints, beta=request.beta)
        heldout = None
        if "test" in scores and len(scores["test"].prompt_p) > 1:
            heldout = build_problem_on_samples(scores["test"].scores, constraints=constraints, beta=request.beta)
        solved = solve_problem(
            train,
            heldout=heldout,
            reward_name=request.reward,
            constraints=constraints,
            safeguards=[request.safeguards.get(name, Safeguard()) for name in names],
            evaluation=request.evaluation,
            corrects_response_bias=request.corrects_response_bias,
            n_replicates=request.n_replicates,
            rng=np.random.default_rng(request.seed),
        )
        normalisers = {
            split: (
                build_normaliser(train.with_samples(grouped.scores), solved.solution.multipliers),
                grouped.prompt_p,
            )
            for split, grouped in scores.items()
        }
        _write_weights(table, request, constraints, normalisers)
        n_points = _FRONTIER_POINTS if _fits_in_memory(table) else _FEW_FRONTIER_POINTS
        frontier = sweep_constraints(
            solved.problem, constraints, n_points=n_points, show_progress=request.show_progress
        )
        write_frontier(request.output / "frontier.parquet", frontier, metadata={})
        dual = solved.content | {
            "warnings": [*notes, *solved.content["warnings"]],
            "seed": request.seed,
            "inputs": table.identity(),
            "environment": environment(),
        }
        write_stage1_figures(dual, solved.problem, solved.solution, frontier, output=request.output / "figures")
    write_json(request.output / "dual.json", dual)
    return dual


def frontier_table(request: TableRequest) -> pa.Table:
    """Solve for ranges of thresholds, every combination of them, and write ``frontier.parquet``; returns its rows.

    Raises:
        InputError: no range among the constraints, a malformed range, or as :func:`solve_table`.
    """
    _require_few(request.constraints)
    families = [read_constraint_range(text) for text in request.constraints]
    ranged = [place for place, text in enumerate(request.constraints) if holds_range(text)]
    if not ranged:
        raise InputError(
            f"none of the constraints {list(request.constraints)} holds a range; a frontier needs one of the form "
            "'NAME >= ref + START:STOP:STEP'"
        )
    n_points = math.prod(map(len, families))
    if n_points > MAX_FRONTIER_POINTS:
        raise InputError(
            f"the ranges of the constraints have {n_points} combinations; a frontier has at most "
            f"{MAX_FRONTIER_POINTS} points: take longer steps"
        )
    first = [family[0] for family in families]
    table = _open(request, [constraint.name for constraint in first])
    with tempfile.TemporaryDirectory(prefix=".scores-", dir=request.output.resolve()) as scratch:
        scores, _ = _read_scores(table, request, first, folder=Path(scratch))
        problem = build_problem_on_samples(scores["train"].scores, constraints=first, beta=request.beta)
        frontier = solve_points(problem, list(itertools.product(*families)), swept=ranged)
    write_frontier(request.output / "frontier.parquet", frontier, metadata={})
    return frontier


def _require_few(constraints: Sequence[str]) -> None:
    if len(constraints) > MAX_CONSTRAINTS:
        raise InputError(f"{len(constraints)} constraints are given; a problem has at most {MAX_CONSTRAINTS}")


def _open(request: TableRequest, constraint_names: Sequence[str]) -> ScoreTable:
    if request.seed < 0:
        raise InputError(f"--seed is {request.seed}; it must not be negative")
    repeated = sorted(name for name, count in Counter(constraint_names).items() if count > 1)
    if repeated:
        raise InputError(f"{repeated[0]!r} is bounded twice; a constraint bounds a score of its own")
    asked = [name for name, safeguard in request.safeguards.items() if safeguard.assurance is not None]
    if asked and min(request.evaluation.n_prompts, request.evaluation.n_responses) < 1:
        raise InputError(
            f"assurance is asked for {asked[0]!r}: it needs the size of the evaluation, "
            "--evaluation-prompts and --evaluation-responses"
        )
    if request.table.is_dir() and request.output.resolve().is_relative_to(request.table.resolve()):
        raise InputError(
            f"--output {request.output} lies inside --table {request.table}: the results would be read as scores"
        )
    require_writable(request.output)
    table = ScoreTable(request.table, request.prompt_id, (request.reward, *constraint_names))
    table.require_columns()
    return table


def _read_scores(
    table: ScoreTable, request: TableRequest, constraints: Sequence[Constraint], *, folder: Path
) -> tuple[dict[str, GroupedSamples], list[str]]:
    """The splits of a table, in memory where they fit, else under ``folder``; and what was not read of it."""
    splits = ("train", "test") if table.has_split else ("train",)
    notes = table.notes(splits)
    executor = request.executor or ThreadExecutor()
    found: dict[str, GroupedSamples] = {}
    if _fits_in_memory(table):
        chunks = list(_turned(table, constraints, show_progress=request.show_progress))
        for split in splits:
            whole = UngroupedScores.concatenate([_of_split(rows, split_n, split) for rows, split_n in chunks])
            if len(whole.prompt_n):
                found[split] = group_in_memory(whole, executor=executor)
    else:
        shown = ShownPasses(executor) if request.show_progress else executor
        for split in splits:
            inside = folder / split
            inside.mkdir()
            chunks_of_split = (
                _of_split(rows, split_n, split)
                for rows, split_n in _turned(table, constraints, show_progress=request.show_progress)
            )
            grouped = group_on_disk(
                chunks_of_split,
                folder=inside,
                n_rows=table.n_responses,
                n_constraints=len(constraints),
                executor=shown,
            )
            if grouped is not None:
                found[split] = grouped
    notes += table.require_distinct(found)
    if "test" in found and len(found["test"].prompt_p) < 2:
        notes.append(f"{table.path}: the split 'test' has 1 prompt, too few for held-out predictions")
    for note in notes:
        _log.warning("%s", note)
    if len(found["train"].prompt_p) < 2:
        raise InputError(f"{table.path} has 1 prompt to solve on; intervals are between prompts and need at least 2")
    return found, notes


def _fits_in_memory(table: ScoreTable) -> bool:
    return 8 * len(table.scores) * table.n_responses <= MEMORY_BYTES


def _turned(
    table: ScoreTable, constraints: Sequence[Constraint], *, show_progress: bool
) -> Iterator[tuple[UngroupedScores, np.ndarray | None]]:
    """Chunks of rows with their splits; here a ``<=`` becomes a ``>=``."""
    signs_m = constraint_signs(constraints)
    for chunk in _shown(table, "reading scores", show_progress=show_progress):
        yield (
            UngroupedScores(
                chunk.prompt_n,
                chunk.scores_ns[:, 0].copy(),
                chunk.scores_ns[:, 1:] * signs_m,
                chunk.sample_index_n if table.has_sample_index else None,
            ),
            chunk.split_n,
        )


def _shown(table: ScoreTable, what: str, *, show_progress: bool) -> Iterator[ScoreChunk]:
    with tqdm(total=table.n_responses, desc=what, unit="row", unit_scale=True, disable=not show_progress) as bar:
        for chunk in table.chunks():
            yield chunk
            bar.update(len(chunk.prompt_n))


def _of_split(rows: UngroupedScores, split_n: np.ndarray | None, split: str) -> UngroupedScores:
    if split_n is None:
        return rows
    mask_n = split_n == split
    index_n = rows.sample_index_n
    return UngroupedScores(
        rows.prompt_n[mask_n],
        rows.reward_n[mask_n],
        rows.scores_nm[mask_n],
        None if index_n is None else index_n[mask_n],
    )


def _write_weights(
    table: ScoreTable,
    request: TableRequest,
    constraints: Sequence[Constraint],
    normalisers: Mapping[str, tuple[Normaliser, np.ndarray]],
) -> None:
    """Every row of the table's train and test prompts with its tilted weight, in the table's order."""
    schema = pa.schema(
        [
            (request.prompt_id, table.prompt_type),
            ("sample_index", pa.int64()),
            ("weight", pa.float64()),
            *([("split", pa.string())] if table.has_split else []),
        ]
    )
    signs_m = constraint_signs(constraints)
    sorted_ids = {split: _sorted(prompt_p) for split, (_, prompt_p) in normalisers.items()}
    path = request.output / "weights.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for chunk in _shown(table, "writing weights", show_progress=request.show_progress):
            weight_n = np.full(len(chunk.prompt_n), np.nan)
            for split, (normaliser, _) in normalisers.items():
                rows = slice(None) if chunk.split_n is None else np.flatnonzero(chunk.split_n == split)
                ids, places = sorted_ids[split]
                place_n = places[np.searchsorted(ids, chunk.prompt_n[rows])]
                scores_ns = chunk.scores_ns[rows]
                weight_n[rows] = normaliser.weights(place_n, scores_ns[:, 0], scores_ns[:, 1:] * signs_m)
            columns = [chunk.prompt_id_n, pa.array(chunk.sample_index_n), pa.array(weight_n)]
            if chunk.split_n is not None:
                columns.append(pa.array(chunk.split_n, pa.string()))
            rows_of_splits = pa.array(~np.isnan(weight_n))
            writer.write_table(pa.table(columns, schema=schema).filter(rows_of_splits))


def _sorted(prompt_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places = np.argsort(prompt_p)
    return prompt_p[places], places


T = TypeVar("T")


class ShownPasses:
    """Runs passes on another executor and shows how far each is.

    How many passes an answer takes is not known beforehand; the number of the current one is shown.

    Args:
        executor: what runs them.
    """

    def __init__(self, executor: PassRunner) -> None:
        self._executor = executor
        self._n_passes = 0

    def run(self, function: Callable[[Partition], T], partitions: Sequence[Partition]) -> Iterator[T]:
        """Results in the order of ``partitions``."""
        self._n_passes += 1
        results = self._executor.run(function, partitions)
        bar = tqdm(results, total=len(partitions), desc=f"pass {self._n_passes} over the scores", leave=False)
        yield from bar
