"""The dual on any table of scores. No models, no run folder, and no more memory than is needed.

The command line and ``import dualign`` ask the same question of the same functions: a :class:`TableRequest`, answered
by :func:`solve_table`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.artifacts import environment, write_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    Constraint,
    Safeguard,
    expand_constraints,
    few_prompts,
    require_consistent,
    require_few_constraints,
)
from pipeline.dual.output_folder import FILES, PROBLEM, UNFINISHED, drop_results, require_output
from pipeline.dual.posing import (
    ColumnPlan,
    ColumnUnits,
    PosedProblem,
    PromptMeans,
    finish_posing,
    plan_columns,
    plan_linear,
    plan_rows,
)
from pipeline.dual.solving import EvaluationSize, SolvedDual, solve_problem
from pipeline.dual.sweep import sweep_constraints, write_frontier
from pipeline.dual.table_reader import ScoreChunk, ScoreTable
from pipeline.dual.table_sources import ScoreSource
from pipeline.progress import progress_bar
from stage1_dual.dual import (
    DualProblem,
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

if TYPE_CHECKING:
    from pipeline.report.page_data import Command

# Points of a sweep, each some five passes over the scores; fewer where a pass reads the disk.
_FRONTIER_POINTS = 61
_FEW_FRONTIER_POINTS = 11
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
        constraints: what must hold; ``each`` is expanded once the table's values are known.
        beta: KL strength, reward per nat, or None.
        kl: the largest KL to spend instead, nats a prompt, or None; exactly one of the two is given.
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
    beta: float | None
    kl: float | None = None
    seed: int = 0
    n_replicates: int = 1000
    safeguards: Mapping[str, Safeguard] = field(default_factory=dict)
    evaluation: EvaluationSize = _NO_EVALUATION
    corrects_response_bias: bool = False
    executor: PassRunner | None = None
    show_progress: bool = True

    @property
    def scores(self) -> tuple[str, ...]:
        """The score columns: the reward, then those of the constraints."""
        return tuple(dict.fromkeys((self.reward, *scores_of(self.constraints))))

    def open_table(self) -> ScoreTable:
        """The table, once everything is checked that can be before its rows are read.

        Raises:
            InputError: what is asked contradicts itself, or a column is missing or of the wrong type.
        """
        names = [constraint.name for constraint in self.constraints]
        if self.seed < 0:
            raise InputError(f"the seed is {self.seed}; it must not be negative")
        if (self.beta is None) == (self.kl is None):
            given = "neither beta nor kl is" if self.beta is None else "both beta and kl are"
            raise InputError(f"{given} given; a problem has one of the two")
        if not names:
            raise InputError("no constraint is given; without one there is no multiplier to find")
        require_few_constraints(len(names))
        require_consistent(self.constraints)
        if all(constraint.each is None for constraint in self.constraints):
            self.safeguards_of(self.constraints)
        asked = [name for name, safeguard in self.safeguards.items() if safeguard.assurance is not None]
        if asked and min(self.evaluation.n_prompts, self.evaluation.n_responses) < 1:
            raise InputError(
                f"assurance is asked for {asked[0]!r}: it needs the size of the evaluation, --evaluation-prompts and "
                "--evaluation-responses (in Python evaluation_prompts and evaluation_responses)"
            )
        table = ScoreTable(self.source, self.prompt_id, self.scores, labels_of(self.constraints))
        table.require_columns()
        return table

    def problem(self, table: ScoreTable) -> dict[str, Any]:
        """What is asked, of which table: two requests of one problem agree in it. Seeds are no part of a problem.

        Args:
            table: opened from this request; its files are read.
        """
        return {
            "table": table.identity(),
            "prompt_id": self.prompt_id,
            "reward": self.reward,
            "constraints": {one.name: asdict(one) for one in self.constraints},
            "beta": self.beta,
            "kl": self.kl,
            "safeguards": {name: asdict(one) for name, one in sorted(self.safeguards.items())},
            "evaluation": asdict(self.evaluation),
            "correct_response_bias": self.corrects_response_bias,
        }

    @property
    def start_beta(self) -> float:
        """Beta, or where its search starts under a KL budget."""
        return 1.0 if self.beta is None else self.beta

    def safeguards_of(self, constraints: Sequence[Constraint]) -> tuple[Safeguard, ...]:
        """The safeguard of each constraint, given by its own name or by that of the ``each`` it comes from.

        Args:
            constraints: those of the request, expanded.

        Raises:
            InputError: a safeguard is of none of them, or of one that cannot have it.
        """
        own = {constraint.name for constraint in constraints}
        whole = {one.name for one in self.constraints if one.each is not None}
        unknown = sorted(set(self.safeguards) - own - whole)
        if unknown:
            raise InputError(
                f"a safeguard is asked for {unknown[0]!r}; the constraints are {', '.join((*sorted(whole), *own))}"
            )
        found = []
        for constraint in constraints:
            stem = next((name for name in whole if constraint.name.startswith(f"{name}[")), constraint.name)
            found.append(self.safeguards.get(constraint.name, self.safeguards.get(stem, Safeguard())))
            found[-1].require_fit(constraint)
        return tuple(found)


def scores_of(constraints: Sequence[Constraint]) -> tuple[str, ...]:
    """The score columns that constraints are computed from, each once."""
    return tuple(dict.fromkeys(name for one in constraints for name in one.statistic.scores))


def labels_of(constraints: Sequence[Constraint]) -> tuple[str, ...]:
    """The columns that say which rows count for a constraint, each once."""
    found = [name for one in constraints for name in (*one.statistic.columns, *filter(None, [one.each]))]
    return tuple(dict.fromkeys(found))


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
    train, heldout = splits["train"], splits.get("test")
    solved = solve_problem(
        train.posed.within(request.kl),
        heldout=None if heldout is None or heldout.posed.problem.n_prompts < 2 else heldout.posed,
        reward_name=request.reward,
        safeguards=request.safeguards_of(train.posed.constraints),
        evaluation=request.evaluation,
        corrects_response_bias=request.corrects_response_bias,
        n_replicates=request.n_replicates,
        rng=np.random.default_rng(request.seed),
    )
    return TableSolution(request, table, splits, solved, tuple(notes))


@dataclass(frozen=True, eq=False)
class TableSplit:
    """The rows of a split.

    Attributes:
        posed: the problem they make.
        grouped: their columns by prompt.
    """

    posed: PosedProblem
    grouped: GroupedSamples


@dataclass(frozen=True, eq=False)
class TableSolution:
    """A certified solution and the table it is of.

    Attributes:
        request: what was asked.
        table: the table.
        splits: its rows by split.
        solved: the solution.
        notes: what was left out of the table, or could not be told of it.
    """

    request: TableRequest
    table: ScoreTable
    splits: Mapping[str, TableSplit]
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
        return sweep_constraints(self.solved.posed, n_points=n_points, show_progress=shown)

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
        for chunk in _shown(self.table, "writing weights", show_progress=self.request.show_progress):
            weight_n = np.full(len(chunk.prompt_n), np.nan)
            for split, (plan, normaliser, ids, places) in self._normalisers.items():
                mask_n = np.ones(len(weight_n), bool) if chunk.split_n is None else chunk.split_n == split
                rows = chunk if chunk.split_n is None else chunk.select(mask_n)
                place_n = places[np.searchsorted(ids, rows.prompt_n)]
                weight_n[mask_n] = normaliser.weights(place_n, rows.reward_n, plan.turned(rows))
            columns = [chunk.prompt_id_n, pa.array(chunk.sample_index_n), pa.array(weight_n)]
            if chunk.split_n is not None:
                columns.append(pa.array(chunk.split_n, pa.string()))
            of_splits = ~np.isnan(weight_n)
            yield chunk.row_n[of_splits], pa.table(columns, schema=self.weights_schema).filter(pa.array(of_splits))

    def save(self, output: Path, *, commands: Mapping[str, Command] = MappingProxyType({})) -> list[Path]:
        """Write ``weights.parquet``, ``frontier.parquet``, ``report.html``, ``figures/`` and, last, ``dual.json``.

        All of it is written aside first. What the folder had from an earlier solve is replaced once everything is
        there, ``dual.json`` before anything else goes and after everything else has come: files of two problems never
        stand beside a ``dual.json``.

        Args:
            output: the folder, which the caller holds (:func:`hold_output`).
            commands: what asks for another demand, by constraint, for the page.

        Returns:
            What was written, ``dual.json`` first.

        Raises:
            InputError: the folder cannot be written, or lies inside the table's.
        """
        from pipeline.report.table_page import write_table_report  # brings matplotlib along

        require_output(output, self.request.source)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=output.resolve()) as folder:
            aside = Path(folder)
            path = aside / "weights.parquet"
            with pq.ParquetWriter(path, self.weights_schema, compression="zstd", write_page_checksum=True) as writer:
                for _, rows in self.weights():
                    writer.write_table(rows)
            write_frontier(aside / "frontier.parquet", self.frontier, metadata={})
            record = self.request.problem(self.table)
            dual = self.content | {"inputs": record.pop("table"), PROBLEM: record, "environment": environment()}
            problem, solution = self.solved.problem, self.solved.solution
            made = [path, aside / "frontier.parquet"]
            name = self.table.source.name
            made += write_table_report(
                dual, problem, solution, self.frontier, name=name, output=aside, commands=commands
            )
            written = [str(one.relative_to(aside)) for one in made]
            write_json(aside / "dual.json", dual | {FILES: written})
            drop_results(output, except_for=written)
            (output / "figures").mkdir(exist_ok=True)
            for one in (*made, aside / "dual.json"):
                one.replace(output / one.relative_to(aside))
        return [output / "dual.json", *(output / name for name in written)]

    @cached_property
    def _normalisers(self) -> dict[str, tuple[ColumnPlan, Normaliser, np.ndarray, np.ndarray]]:
        """For each split what its columns are, its normaliser, its prompts' ids, ascending, and the place of each."""
        found = {}
        for split, rows in self.splits.items():
            plan, grouped = rows.posed.plan, rows.grouped
            if isinstance(rows.posed.rows, ScoreChunk) and not all(
                one.statistic.is_linear for one in plan.constraints
            ):
                # The columns of the solution, in every split.
                plan = rows.posed.with_columns(self.solved.posed.chosen).plan
                grouped = group_in_memory(_ungrouped(rows.posed.rows, plan, self.table))
            places = np.argsort(grouped.prompt_p)
            problem = self.solved.problem.with_samples(grouped.scores)
            normaliser = build_normaliser(problem, self.solved.solution.multipliers)
            found[split] = (plan, normaliser, grouped.prompt_p[places], places)
        return found


def read_splits(table: ScoreTable, request: TableRequest, *, scratch: Path) -> tuple[dict[str, TableSplit], list[str]]:
    """The problems of a table by split: in memory where they fit, else in the empty folder ``scratch``.

    Returns:
        The problems, and what was left out of the table or cannot be told of it, which is logged too.

    Raises:
        InputError: a value is null, NaN or infinite, a response is there twice, a prompt is in both splits, there
            are fewer than two prompts to solve on, or a constraint is of rows that are not there.
    """
    splits = ("train", "test") if table.has_split else ("train",)
    notes = table.notes(splits)
    executor = request.executor or ThreadExecutor()
    reader = (
        _InMemory(table, request, executor) if _fits_in_memory(table) else _OnDisk(table, request, executor, scratch)
    )
    constraints, few = _expanded(request.constraints, lambda: reader.chunks("train"))
    found = {split: rows for split in splits if (rows := reader.split(split, constraints)) is not None}
    notes += few
    notes += table.require_distinct({split: rows.grouped for split, rows in found.items()})
    if "test" in found and len(found["test"].grouped.prompt_p) < 2:
        notes.append(f"{table.source.name}: the split 'test' has 1 prompt, too few for held-out predictions")
    for note in notes:
        _log.warning("%s", note)
    if len(found["train"].grouped.prompt_p) < 2:
        raise InputError(
            f"{request.source.name} has 1 prompt to solve on; intervals are between prompts and need at least 2"
        )
    return found, notes


def _expanded(
    constraints: Sequence[Constraint], chunks: Callable[[], Iterable[ScoreChunk]]
) -> tuple[tuple[Constraint, ...], list[str]]:
    """The constraints by value where they say ``each``, and warnings of values that few train prompts have."""
    names = labels_of(constraints)
    if not names:
        return tuple(constraints), []
    prompts: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in names}
    for chunk in chunks():
        for name in names:
            values, code_n = np.unique(chunk.labels[name].astype(str), return_inverse=True)
            for code, value in enumerate(values.tolist()):
                prompts[name].setdefault(value, []).append(np.unique(chunk.prompt_n[code_n == code]))
    counts = {
        name: {value: len(np.unique(np.concatenate(parts))) for value, parts in found.items()}
        for name, found in prompts.items()
    }
    expanded = expand_constraints(constraints, counts)
    return expanded, few_prompts(expanded, counts)


class _InMemory:
    """Reads a table whose scores fit in memory."""

    def __init__(self, table: ScoreTable, request: TableRequest, executor: PassRunner) -> None:
        self._table, self._request, self._executor = table, request, executor
        self._chunks = list(_shown(table, "reading scores", show_progress=request.show_progress))

    def chunks(self, split: str) -> Iterator[ScoreChunk]:
        """The rows of a split."""
        return _of_split(self._chunks, split)

    def split(self, split: str, constraints: Sequence[Constraint]) -> TableSplit | None:
        """The problem of a split; None where it has no rows."""
        chunks = list(self.chunks(split))
        if not chunks:
            return None
        rows = ScoreChunk.concatenate(chunks)
        try:
            plan, units = plan_rows(rows, constraints)
        except InputError as error:
            raise InputError(f"{self._table.source.name}, split {split!r}: {error}") from None
        grouped = group_in_memory(_ungrouped(rows, plan, self._table), executor=self._executor)
        problem = _problem(grouped, constraints, beta=self._request.start_beta)
        return TableSplit(finish_posing(problem, plan, units, rows), grouped)


class _OnDisk:
    """Reads a table whose scores do not fit in memory, several times where a statistic needs it."""

    def __init__(self, table: ScoreTable, request: TableRequest, executor: PassRunner, scratch: Path) -> None:
        self._table, self._request, self._scratch = table, request, scratch
        self._executor = ShownPasses(executor) if request.show_progress else executor

    def chunks(self, split: str) -> Iterator[ScoreChunk]:
        """The rows of a split."""
        return _of_split(_shown(self._table, "reading scores", show_progress=self._request.show_progress), split)

    def split(self, split: str, constraints: Sequence[Constraint]) -> TableSplit | None:
        """The problem of a split; None where it has no rows."""
        plan, units = self._plan(split, constraints)
        inside = self._scratch / split
        inside.mkdir()
        grouped = group_on_disk(
            (_ungrouped(rows, plan, self._table) for rows in self.chunks(split)),
            folder=inside,
            n_rows=self._table.n_responses,
            n_constraints=len(constraints),
            executor=self._executor,
        )
        if grouped is None:
            return None
        problem = _problem(grouped, constraints, beta=self._request.start_beta)
        return TableSplit(finish_posing(problem, plan, units, None), grouped)

    def _plan(self, split: str, constraints: Sequence[Constraint]) -> tuple[ColumnPlan, tuple[ColumnUnits, ...]]:
        if all(one.statistic.is_linear for one in constraints):
            return plan_linear(constraints)
        for one in constraints:
            if one.statistic.kind == "cvar" or one.statistic.per is not None:
                raise InputError(
                    f"constraint `{one.name}`: a cvar or a ratio needs the scores in memory, at most "
                    f"{MEMORY_BYTES >> 20} MiB of them; {self._table.source.name} has {self._table.n_responses} "
                    f"rows of {len(self._table.scores)} scores"
                )
        means = PromptMeans.of_chunks(self.chunks(split), constraints)
        if not np.isin(means.h_mp, (0.0, 1.0)).all():
            raise InputError(
                f"{self._table.source.name}: a column that says which rows count differs within a prompt, which needs "
                f"the scores in memory, at most {MEMORY_BYTES >> 20} MiB of them"
            )
        return plan_columns(constraints, means)


def _fits_in_memory(table: ScoreTable) -> bool:
    return 8 * len(table.scores) * table.n_responses <= MEMORY_BYTES


def _problem(grouped: GroupedSamples, constraints: Sequence[Constraint], *, beta: float) -> DualProblem:
    names = [constraint.name for constraint in constraints]
    return DualProblem.from_samples(
        grouped.scores, thresholds=np.zeros(len(constraints)), beta=beta, constraint_names=names
    )


def _ungrouped(rows: ScoreChunk, plan: ColumnPlan, table: ScoreTable) -> UngroupedScores:
    index_n = rows.sample_index_n if table.has_sample_index else None
    return UngroupedScores(rows.prompt_n, rows.reward_n.copy(), plan.turned(rows), index_n)


def _shown(table: ScoreTable, what: str, *, show_progress: bool) -> Iterator[ScoreChunk]:
    with progress_bar(total=table.n_responses, doing=what, unit="rows", unit_scale=True, shown=show_progress) as bar:
        for chunk in table.chunks():
            yield chunk
            bar.update(len(chunk.prompt_n))


def _of_split(chunks: Iterable[ScoreChunk], split: str) -> Iterator[ScoreChunk]:
    for chunk in chunks:
        mask_n = None if chunk.split_n is None else chunk.split_n == split
        if mask_n is None:
            yield chunk
        elif mask_n.any():
            yield chunk.select(mask_n)


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
