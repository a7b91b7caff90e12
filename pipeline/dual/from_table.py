"""The dual on any table of scores. No models, no run folder, and no more memory than is needed.

The command line and ``import dualign`` ask the same question of the same functions: a :class:`TableRequest`, answered
by :func:`solve_table`.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.artifacts import environment, require_writable, run_lock, write_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    Constraint,
    Safeguard,
    constraint_signs,
    read_constraint,
    require_few_constraints,
)
from pipeline.dual.solving import EvaluationSize, SolvedDual, build_problem_on_samples, solve_problem
from pipeline.dual.sweep import sweep_constraints, write_frontier
from pipeline.dual.table_reader import ScoreChunk, ScoreTable
from pipeline.dual.table_sources import ScoreFiles, ScoreSource
from pipeline.progress import progress_bar
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

# Points of a sweep, each some five passes over the scores; fewer where a pass reads the disk.
_FRONTIER_POINTS = 61
_FEW_FRONTIER_POINTS = 11
# Begins the names of folders that are gone when the work is done.
_UNFINISHED = ".scores-"
_NO_EVALUATION = EvaluationSize(0, 0)
# Scores beyond this are kept on disk while it works. To group them in memory takes five times their size.
MEMORY_BYTES = 2**28

_log = logging.getLogger("dualign")

SafeguardName = Literal["reserve", "assurance", "score_error"]

_SAFEGUARD_RULES: dict[SafeguardName, tuple[str, Callable[[float], bool]]] = {
    "reserve": ("finite", lambda _: True),
    "assurance": ("between 0 and 1", lambda value: 0 < value < 1),
    "score_error": ("finite and not negative", lambda value: value >= 0),
}


def require_safeguard(safeguard: SafeguardName, value: float, *, given: str) -> float:
    """The number, if it is one that the safeguard can be.

    Args:
        safeguard: which.
        value: the number.
        given: how the user gave it, for the message.

    Raises:
        InputError: it is not finite, or outside the range.
    """
    rule, allowed = _SAFEGUARD_RULES[safeguard]
    if not (math.isfinite(value) and allowed(value)):
        raise InputError(f"{given}: the number must be {rule}")
    return value


@dataclass(frozen=True)
class TableRequest:
    """What to solve on which table.

    Attributes:
        source: the table.
        prompt_id: column that says which prompt a row answers.
        reward: column to maximise.
        constraints: what must hold, each of a column of its own.
        beta: KL strength, reward per nat.
        seed: of the bootstrap.
        n_replicates: bootstrap replicates over prompts.
        safeguards: what is asked beyond a constraint, by its name.
        evaluation: size of the final evaluation, for ``assurance``.
        corrects_response_bias: take the multipliers that are corrected for finitely many responses, where they can be.
        executor: runs the passes over the scores; None for the threads of this process.
        show_progress: show progress bars.
    """

    source: ScoreSource
    prompt_id: str
    reward: str
    constraints: tuple[Constraint, ...]
    beta: float
    seed: int = 0
    n_replicates: int = 1000
    safeguards: Mapping[str, Safeguard] = field(default_factory=dict)
    evaluation: EvaluationSize = _NO_EVALUATION
    corrects_response_bias: bool = False
    executor: PassRunner | None = None
    show_progress: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of the constraints."""
        return tuple(constraint.name for constraint in self.constraints)

    def open_table(self) -> ScoreTable:
        """The table, once everything is checked that can be before its rows are read.

        Raises:
            InputError: what is asked contradicts itself, or a column is missing or of the wrong type.
        """
        names = self.names
        if self.seed < 0:
            raise InputError(f"the seed is {self.seed}; it must not be negative")
        if not names:
            raise InputError("no constraint is given; without one there is no multiplier to find")
        require_few_constraints(len(names))
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise InputError(f"{repeated[0]!r} is bounded twice; a constraint bounds a score of its own")
        unknown = sorted(set(self.safeguards) - set(names))
        if unknown:
            raise InputError(f"a safeguard is asked for {unknown[0]!r}; the constraints are {', '.join(names)}")
        asked = [name for name, safeguard in self.safeguards.items() if safeguard.assurance is not None]
        if asked and min(self.evaluation.n_prompts, self.evaluation.n_responses) < 1:
            raise InputError(
                f"assurance is asked for {asked[0]!r}: it needs the size of the evaluation, --evaluation-prompts and "
                "--evaluation-responses (in Python evaluation_prompts and evaluation_responses)"
            )
        table = ScoreTable(self.source, self.prompt_id, (self.reward, *names))
        table.require_columns()
        return table


def read_constraints(texts: Sequence[str]) -> tuple[Constraint, ...]:
    """Read texts such as ``harmless >= ref + 0.8``.

    Raises:
        InputError: a text has another form, or it is one text where several are expected.
    """
    if isinstance(texts, str):
        raise InputError(f"the constraints are the text {texts!r}; give a list of texts")
    return tuple(map(read_constraint, texts))


def require_output(output: Path, source: ScoreSource) -> None:
    """Fail before the work where its results could not be written, or would be read as scores the next time.

    Raises:
        InputError: the folder cannot be written, or lies inside the folder of the table.
    """
    table = source.path if isinstance(source, ScoreFiles) else None
    if table is not None and table.is_dir() and output.resolve().is_relative_to(table.resolve()):
        raise InputError(
            f"the output folder {output} lies inside the table {table}: the results would be read as scores"
        )
    require_writable(output)


@contextmanager
def hold_output(output: Path, source: ScoreSource) -> Iterator[None]:
    """Hold an output folder for one process, and clear away what a killed one left unfinished.

    Raises:
        InputError: the folder cannot be written, or lies inside the folder of the table.
        RunLockedError: another process writes there.
    """
    require_output(output, source)
    with run_lock(output):
        for path in output.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)
        try:
            yield
        finally:
            # While it is held: whoever locks a new file of that name comes after this work.
            (output / ".lock").unlink(missing_ok=True)


def solve_table(request: TableRequest, *, scratch: Path) -> TableSolution:
    """Solve and certify.

    Where the table has a column ``split`` with the values ``train`` and ``test``, the train rows determine lambda* and
    the test rows give held-out predictions; without one, every row determines lambda*.

    Args:
        request: what to solve on which table.
        scratch: an empty folder for scores that do not fit in memory; the solution reads them there.

    Raises:
        InputError: a column is missing or of the wrong type, or a value is null, NaN or infinite; names both.
        InfeasibleError: no reweighting of the rows meets the thresholds.
        NotCertifiedError: the solution failed the independent check.
    """
    table = request.open_table()
    splits, notes = read_splits(table, request, scratch=scratch)
    problems = {
        split: build_problem_on_samples(grouped.scores, constraints=request.constraints, beta=request.beta)
        for split, grouped in splits.items()
    }
    heldout = problems.get("test")
    solved = solve_problem(
        problems["train"],
        heldout=None if heldout is None or heldout.n_prompts < 2 else heldout,
        reward_name=request.reward,
        constraints=request.constraints,
        safeguards=[request.safeguards.get(name, Safeguard()) for name in request.names],
        evaluation=request.evaluation,
        corrects_response_bias=request.corrects_response_bias,
        n_replicates=request.n_replicates,
        rng=np.random.default_rng(request.seed),
    )
    return TableSolution(request, table, splits, solved, tuple(notes))


@dataclass(frozen=True, eq=False)
class TableSolution:
    """A certified solution and the table it is of.

    Attributes:
        request: what was asked.
        table: the table.
        splits: its scores by split.
        solved: the solution.
        notes: what was left out of the table, or could not be told of it.
    """

    request: TableRequest
    table: ScoreTable
    splits: Mapping[str, GroupedSamples]
    solved: SolvedDual
    notes: tuple[str, ...] = ()

    @cached_property
    def content(self) -> dict[str, Any]:
        """What ``dual.json`` says, but for where the rows came from (docs/artifacts.md)."""
        found = self.solved.content
        return found | {"seed": self.request.seed, "warnings": [*self.notes, *found["warnings"]]}

    @cached_property
    def frontier(self) -> pa.Table:
        """What ``frontier.parquet`` holds: each threshold swept from the reference to near the best attainable."""
        n_points = _FRONTIER_POINTS if _fits_in_memory(self.table) else _FEW_FRONTIER_POINTS
        shown = self.request.show_progress
        return sweep_constraints(self.solved.problem, self.request.constraints, n_points=n_points, show_progress=shown)

    @property
    def weights_schema(self) -> pa.Schema:
        """Columns of ``weights.parquet``."""
        return pa.schema(
            [
                (self.request.prompt_id, self.table.prompt_type),
                ("sample_index", pa.int64()),
                ("weight", pa.float64()),
                *([("split", pa.string())] if self.table.has_split else []),
            ]
        )

    def weights(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Every response of the train and test prompts with its tilted weight, in the table's order, in chunks.

        Yields:
            Number of the table's row each response stands in, shape (n,), and the columns of :attr:`weights_schema`.
        """
        signs_m = constraint_signs(self.request.constraints)
        for chunk in _shown(self.table, "writing weights", show_progress=self.request.show_progress):
            weight_n = np.full(len(chunk.prompt_n), np.nan)
            for split, (normaliser, ids, places) in self._normalisers.items():
                rows = slice(None) if chunk.split_n is None else np.flatnonzero(chunk.split_n == split)
                place_n = places[np.searchsorted(ids, chunk.prompt_n[rows])]
                scores_ns = chunk.scores_ns[rows]
                weight_n[rows] = normaliser.weights(place_n, scores_ns[:, 0], scores_ns[:, 1:] * signs_m)
            columns = [chunk.prompt_id_n, pa.array(chunk.sample_index_n), pa.array(weight_n)]
            if chunk.split_n is not None:
                columns.append(pa.array(chunk.split_n, pa.string()))
            of_splits = ~np.isnan(weight_n)
            yield chunk.row_n[of_splits], pa.table(columns, schema=self.weights_schema).filter(pa.array(of_splits))

    def save(self, output: Path) -> None:
        """Write ``weights.parquet``, ``frontier.parquet``, ``figures/`` and, last, ``dual.json`` into a folder.

        All of it is written aside first. What the folder had from an earlier solve is replaced once everything is
        there, ``dual.json`` before anything else goes and after everything else has come: files of two problems never
        stand beside a ``dual.json``.

        Args:
            output: the folder, which the caller holds (:func:`hold_output`).

        Raises:
            InputError: the folder cannot be written, or lies inside the table's.
        """
        from pipeline.report.plates import write_stage1_figures  # brings matplotlib along

        require_output(output, self.request.source)
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=output.resolve()) as folder:
            aside = Path(folder)
            path = aside / "weights.parquet"
            with pq.ParquetWriter(path, self.weights_schema, compression="zstd", write_page_checksum=True) as writer:
                for _, rows in self.weights():
                    writer.write_table(rows)
            write_frontier(aside / "frontier.parquet", self.frontier, metadata={})
            dual = self.content | {"inputs": self.table.identity(), "environment": environment()}
            problem, solution = self.solved.problem, self.solved.solution
            figures = write_stage1_figures(dual, problem, solution, self.frontier, output=aside / "figures")
            write_json(aside / "dual.json", dual)
            (output / "dual.json").unlink(missing_ok=True)
            (output / "figures").mkdir(exist_ok=True)
            for made in (path, aside / "frontier.parquet", *figures, aside / "dual.json"):
                made.replace(output / made.relative_to(aside))

    @cached_property
    def _normalisers(self) -> dict[str, tuple[Normaliser, np.ndarray, np.ndarray]]:
        """For each split its normaliser, its prompts' ids in ascending order, and the place of each."""
        found = {}
        for split, grouped in self.splits.items():
            places = np.argsort(grouped.prompt_p)
            problem = self.solved.problem.with_samples(grouped.scores)
            normaliser = build_normaliser(problem, self.solved.solution.multipliers)
            found[split] = (normaliser, grouped.prompt_p[places], places)
        return found


def read_splits(
    table: ScoreTable, request: TableRequest, *, scratch: Path
) -> tuple[dict[str, GroupedSamples], list[str]]:
    """The scores of a table by split: in memory where they fit, else in the empty folder ``scratch``.

    Returns:
        The scores, and what was left out of the table or cannot be told of it, which is logged too.

    Raises:
        InputError: a value is null, NaN or infinite, a response is there twice, a prompt is in both splits, or there
            are fewer than two prompts to solve on.
    """
    constraints = request.constraints
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
            inside = scratch / split
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
        notes.append(f"{table.source.name}: the split 'test' has 1 prompt, too few for held-out predictions")
    for note in notes:
        _log.warning("%s", note)
    if len(found["train"].prompt_p) < 2:
        raise InputError(
            f"{request.source.name} has 1 prompt to solve on; intervals are between prompts and need at least 2"
        )
    return found, notes


def _fits_in_memory(table: ScoreTable) -> bool:
    return 8 * len(table.scores) * table.n_responses <= MEMORY_BYTES


def _turned(
    table: ScoreTable, constraints: Sequence[Constraint], *, show_progress: bool
) -> Iterator[tuple[UngroupedScores, np.ndarray | None]]:
    """Chunks of rows with their splits, the scores turned (:mod:`pipeline.contracts.problem`)."""
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
    with progress_bar(total=table.n_responses, doing=what, unit="rows", unit_scale=True, shown=show_progress) as bar:
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
        doing = f"pass {self._n_passes} over the scores"
        with progress_bar(total=len(partitions), doing=doing, unit="parts", stays=False) as bar:
            for result in results:
                yield result
                bar.update()
